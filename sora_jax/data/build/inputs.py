"""What a set is built from: a folder, a pattern, a list or a manifest as a sorted list of files.

A folder is read whole, hidden files left out. A list (.txt) names one file a line; a manifest
(.csv, .jsonl, .parquet) has a column `path`, and `caption` or `captions`, `start` and `end` where
it likes. Captions that a manifest does not give come from files beside the video: `name.txt` (one
caption) or `name.json` ({"caption": TEXT}, {"captions": {KIND: TEXT}}, {"captions": [TEXT]}, or a
list of texts).
"""

import csv
import functools
import glob
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sora_jax import video_io

MEDIA_SUFFIXES = (*video_io.READABLE_SUFFIXES, ".mkv", ".m4v")
MANIFEST_SUFFIXES = (".csv", ".jsonl", ".parquet")
CAPTION_POLICIES = ("error", "drop", "allow")

Captions = tuple[tuple[str, str], ...]  # (kind, text)


class InputFile(NamedTuple):
    """One file, or one stretch of it, that clips are cut from.

    Attributes:
      path: where it lies; absolute, or a gs:// address.
      key: its name in the set: the path relative to the input's root, "/" separated, with
        "@start-end" behind it where a manifest asks for a stretch. No two inputs share one.
      captions: (kind, text) of each: kind is "sidecar", "manifest", or the sidecar's own, such as
        "short" and "detailed".
      start: seconds in the file at which clips may begin; None is its beginning.
      end: seconds at which they have ended; None is its end.
    """

    path: str
    key: str
    captions: Captions = ()
    start: float | None = None
    end: float | None = None


def find_inputs(source: str, *, out: str | None = None) -> list[InputFile]:
    """The files that `source` names, sorted by key.

    Args:
      source: a folder, a glob pattern, a list (.txt), a manifest, or one video or image.
      out: the folder that the set is written to, which must not be among what is read.

    Raises:
      ValueError: nothing there, nothing readable, an absent file in a list or manifest, captions
        that cannot be read, or a source that takes in `out`; one line.
    """
    source = os.fspath(source)
    suffix = os.path.splitext(source)[1].lower()
    if suffix == ".txt" and _is_file(source):
        found = _from_rows(source, _list_rows(source), what="line")
    elif suffix in MANIFEST_SUFFIXES and _is_file(source):
        found = _from_rows(source, _manifest_rows(source, suffix), what="row")
    elif _is_dir(source):
        if out is not None and _within(out, source):
            raise ValueError(
                f"the input {source} takes in the output folder {out}; choose an --out outside it."
            )
        found = _with_sidecars(_media_below(source), root=_absolute(source))
    elif _is_file(source):
        found = _with_sidecars(_media([source]), root=os.path.dirname(_absolute(source)))
    elif glob.has_magic(source):
        matched = sorted(map(str, _glob(source)))
        found = _with_sidecars(_media(matched), root=_absolute(_root_of_pattern(source)))
    else:
        raise ValueError(
            f"{source}: no such file or folder; give a folder of videos, a pattern in quotes, a "
            f"list (.txt) or a manifest ({', '.join(MANIFEST_SUFFIXES)})."
        )
    if not found:
        raise ValueError(
            f"{source}: no readable video found; it must name files of {', '.join(MEDIA_SUFFIXES)}."
        )
    if out is not None:
        for file in found:
            if _within(file.path, out):
                raise ValueError(
                    f"the input {source} matches {file.path}, which lies in the output folder "
                    f"{out}; choose an --out that it does not match."
                )
    return sorted(found, key=lambda file: file.key)


def without_caption(files: Iterable[InputFile]) -> list[InputFile]:
    return [file for file in files if not file.captions]


def check_captions(files: Sequence[InputFile], policy: str) -> None:
    """Refuses files without a caption where `policy` is "error".

    Args:
      policy: "error"; "drop" (leave such files out) or "allow" (keep them without), which pass.

    Raises:
      ValueError: an unknown policy, or how many files have no caption and what to do; one line.
    """
    if policy not in CAPTION_POLICIES:
        raise ValueError(f"captions {policy!r}: use one of {', '.join(CAPTION_POLICIES)}.")
    missing = without_caption(files)
    if missing and policy == "error":
        raise ValueError(
            f"{len(missing)} of {len(files)} files have no caption (first: {missing[0].path}); "
            "write it to a .txt or .json of the same name beside each, give a captioner, or set "
            "--captions drop to leave them out or --captions allow to keep them without."
        )


def parse_captions(value: Any, *, kind: str) -> Captions:
    """Captions of any of the accepted forms, whitespace folded, empty ones left out.

    Args:
      value: a text, a list of texts, {KIND: TEXT}, or any of them under "caption" or "captions".
      kind: of texts that do not say theirs.

    Raises:
      ValueError: anything else; says only what is wrong, not where.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        text = " ".join(value.split())
        return ((kind, text),) if text else ()
    if isinstance(value, Mapping):
        named = [value[name] for name in ("captions", "caption") if name in value]
        if named:
            return tuple(c for part in named for c in parse_captions(part, kind=kind))
        pairs = [(str(name), text) for name, text in value.items()]
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


def _media(paths: Iterable[str]) -> list[str]:
    return [
        _absolute(path)
        for path in paths
        if os.path.splitext(path)[1].lower() in MEDIA_SUFFIXES and _is_file(path)
    ]


def _media_below(folder: str) -> list[str]:
    if _is_remote(folder):
        from etils import epath

        root = folder.rstrip("/")
        below = (str(path) for path in epath.Path(folder).rglob("*"))
        return _media(p for p in below if "/." not in p.removeprefix(root))
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(place, name) for name in names if not name.startswith(".")]
    return _media(found)


def _with_sidecars(paths: Iterable[str], *, root: str) -> list[InputFile]:
    return [InputFile(path, _key(path, root), _sidecar(path)) for path in paths]


def _key(path: str, root: str) -> str:
    if _is_remote(path):
        return path.removeprefix(root.rstrip("/") + "/")
    return os.path.relpath(path, root).replace(os.sep, "/")


def _sidecar(path: str) -> Captions:
    place, name = os.path.split(path)
    stem = os.path.splitext(name)[0]
    there = _names(place)
    for suffix in (".json", ".txt"):
        if stem + suffix not in there:
            continue
        file = os.path.join(place, stem + suffix)
        try:
            text = _read_text(file)
            if suffix == ".txt":
                captions = parse_captions(text, kind="sidecar")
            else:
                value = json.loads(text)
                # Other programs leave .json files beside videos too: without captions, no error.
                told = isinstance(value, list | str) or "caption" in value or "captions" in value
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
def _names(folder: str) -> frozenset[str]:
    if _is_remote(folder):
        from etils import epath

        return frozenset(path.name for path in epath.Path(folder).iterdir())
    return frozenset(os.listdir(folder))


def _list_rows(source: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_read_table(source).splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield number, {"path": line.strip()}


def _manifest_rows(source: str, suffix: str) -> Iterator[tuple[int, dict]]:
    if suffix == ".csv":
        reader = csv.DictReader(_read_table(source).splitlines())
        yield from enumerate(reader, 1)
    elif suffix == ".jsonl":
        for number, line in enumerate(_read_table(source).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{source}: line {number} is not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{source}: line {number} is not a JSON object.")
            yield number, row
    else:
        try:
            import pyarrow.lib
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(
                f"{source}: Parquet needs pyarrow; pip install 'sora_jax[data]', or give .csv."
            ) from error
        from etils import epath

        try:
            with epath.Path(source).open("rb") as file:
                rows = pyarrow.parquet.read_table(file).to_pylist()
        except pyarrow.lib.ArrowException as error:
            raise ValueError(f"{source}: not a Parquet file ({error}).") from error
        yield from enumerate(rows, 1)


def _read_table(source: str) -> str:
    try:
        return _read_text(source).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text; save it as UTF-8.") from error


def _from_rows(source: str, rows: Iterable[tuple[int, dict]], *, what: str) -> list[InputFile]:
    """One input for each stretch that rows name, with the captions of all rows that name it."""
    base = os.path.dirname(_absolute(source))
    stretches: dict[tuple, list] = {}
    absent, count = [], 0
    for number, row in rows:
        count += 1
        if not row.get("path"):
            columns = ", ".join(str(name) for name in row) or "none"
            raise ValueError(
                f"{source}: {what} {number} has no path (columns: {columns}); name the column path."
            )
        path = str(row["path"])
        path = path if _is_remote(path) else os.path.normpath(os.path.join(base, path))
        if not _is_file(path):
            absent.append(f"{what} {number}: no such file {path}")
            continue
        try:
            start, end = (_seconds(row.get(name), name) for name in ("start", "end"))
            if end is not None and end <= (start or 0.0):
                raise ValueError(f"end {end:g} is not after start {start or 0:g}")
            captions = [
                caption
                for name in ("caption", "captions")
                for caption in parse_captions(_maybe_json(row.get(name)), kind="manifest")
            ]
        except ValueError as error:
            raise ValueError(f"{source}: {what} {number}: {error}.") from error
        stretches.setdefault((path, start, end), []).extend(captions)
    if absent:
        raise ValueError(
            f"{source}: {absent[0]} ({len(absent)} of {count} {what}s); correct the path, which "
            "is taken relative to this file's folder, or remove it."
        )
    unreadable = [
        p for p, _, _ in stretches if os.path.splitext(p)[1].lower() not in MEDIA_SUFFIXES
    ]
    if unreadable:
        raise ValueError(
            f"{source}: {unreadable[0]} is no video or image ({len(unreadable)} of {count} "
            f"{what}s); use {', '.join(MEDIA_SUFFIXES)}."
        )
    root = _common_root(base, [path for path, _, _ in stretches])
    found = []
    for (path, start, end), captions in stretches.items():
        key = _key(path, root)
        if start is not None or end is not None:
            key += f"@{start or 0:g}-{'' if end is None else f'{end:g}'}"
        captions = tuple(dict.fromkeys(captions)) or _sidecar(path)
        found.append(InputFile(path, key, captions, start, end))
    keys = [file.key for file in found]
    twice = next((key for key in keys if keys.count(key) > 1), None) if _repeats(keys) else None
    if twice:
        raise ValueError(f"{source}: two stretches are called {twice}; tell them further apart.")
    return found


def _repeats(keys: Sequence[str]) -> bool:
    return len(set(keys)) < len(keys)


def _seconds(value: Any, name: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{name} {value!r} is not a number of seconds from 0 on")
    return seconds


def _maybe_json(value: Any) -> Any:
    """A list or an object that a .csv holds as text; other text as it is."""
    if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}" and value:
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _common_root(base: str, paths: Sequence[str]) -> str:
    """The list's own folder where all lies below it, else the deepest folder that holds all."""
    if all(_within(path, base) for path in paths):
        return base
    if all(_is_remote(path) for path in paths):
        return os.path.commonprefix([os.path.dirname(path) + "/" for path in paths]).rpartition(
            "/"
        )[0]
    if any(_is_remote(path) for path in paths):
        raise ValueError("a list names files on this machine and elsewhere; make two sets of them.")
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def _root_of_pattern(pattern: str) -> str:
    parts = pattern.split("/")
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:plain]) or ("/" if pattern.startswith("/") else ".")


def _glob(pattern: str) -> Iterable[Any]:
    if not _is_remote(pattern):
        return glob.iglob(pattern, recursive=True)
    from etils import epath

    root = _root_of_pattern(pattern)
    return epath.Path(root).glob(pattern.removeprefix(root + "/"))


def _within(path: str, folder: str) -> bool:
    """`path` is `folder` or lies below it, links followed."""
    if _is_remote(path) or _is_remote(folder):
        return (path.rstrip("/") + "/").startswith(folder.rstrip("/") + "/")
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


def _is_remote(path: str) -> bool:
    return "://" in path


def _absolute(path: str) -> str:
    return path if _is_remote(path) else os.path.abspath(path)


def _is_dir(path: str) -> bool:
    if _is_remote(path):
        from etils import epath

        return epath.Path(path).is_dir()
    return os.path.isdir(path)


def _is_file(path: str) -> bool:
    if _is_remote(path):
        from etils import epath

        return epath.Path(path).is_file()
    return os.path.isfile(path)


def _read_text(path: str) -> str:
    if _is_remote(path):
        from etils import epath

        return epath.Path(path).read_text("utf-8")
    with open(path, encoding="utf-8") as file:
        return file.read()
