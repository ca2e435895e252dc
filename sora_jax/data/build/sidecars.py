"""Captions beside a file: `name.txt`, or `name.json` with one or several of several kinds."""

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from sora_jax.data.build import places

Captions = tuple[tuple[str, str], ...]  # (kind, text)
NAMES = ("captions", "caption")


def read_sidecar(path: str) -> Captions:
    """The captions beside `path`: those of its .json, else that of its .txt, else none.

    Raises:
      ValueError: text that is not UTF-8, JSON that is damaged or of another form; one line.
    """
    place, name = os.path.split(path)
    stem = os.path.splitext(name)[0]
    there = names(place)
    for suffix in (".json", ".txt"):
        if stem + suffix not in there:
            continue
        file = os.path.join(place, stem + suffix)
        try:
            text = places.read_text(file)
            if suffix == ".txt":
                captions = parse_captions(text, kind="sidecar")
            else:
                value = json.loads(text)
                # Other programs leave .json files beside videos too: without captions, no error.
                named = isinstance(value, Mapping) and not value.keys().isdisjoint(NAMES)
                told = named or isinstance(value, list | str)
                captions = parse_captions(value, kind="sidecar") if told else ()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: the caption is not UTF-8 text; save it as UTF-8.") from error
        except (ValueError, TypeError) as error:
            raise ValueError(
                f'{file}: {error}; write {{"caption": TEXT}}, {{"captions": {{KIND: TEXT}}}} or a '
                "list of texts."
            ) from error
        if captions:
            return captions
    return ()


@functools.lru_cache(64)  # files come folder by folder
def names(folder: str) -> frozenset[str]:
    if places.is_remote(folder):
        return frozenset(path.name for path in epath.Path(folder).iterdir())
    return frozenset(os.listdir(folder))


def parse_captions(value: Any, *, kind: str) -> Captions:
    """Captions of any of the accepted forms, whitespace folded, empty ones left out.

    Halves of characters, which JSON can hold and UTF-8 cannot, are left out too.

    Args:
      value: a text, a list of texts, {KIND: TEXT}, or any of them under "caption" or "captions".
      kind: of texts that do not say theirs.

    Raises:
      ValueError: anything else; says only what is wrong, not where.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        text = " ".join(_unicode(value).split())
        return ((kind, text),) if text else ()
    if isinstance(value, Mapping):
        named = [value[name] for name in NAMES if name in value]
        if named:
            return tuple(c for part in named for c in parse_captions(part, kind=kind))
        pairs = [(_unicode(str(name)), text) for name, text in value.items()]
    elif isinstance(value, list | tuple):
        pairs = [(kind, text) for text in value]
    else:
        raise ValueError(f"a caption is {type(value).__name__}, not text")
    found = []
    for name, text in pairs:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"a caption is {type(text).__name__}, not text")
        found += parse_captions(text, kind=name)
    return tuple(found)


def _unicode(text: str) -> str:
    return text.encode("utf-8", "ignore").decode()
