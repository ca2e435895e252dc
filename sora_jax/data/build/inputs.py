"""What a set is built from: a folder, a pattern, a list or a manifest as a sorted list of files.

A folder is read whole, hidden files and folders that are links left out. A list (.txt) names one
file a line, and lines that begin with # are skipped; a manifest
(.csv, .jsonl, .parquet) has a column `path`, and `caption` or `captions`, `start` and `end` where
it likes. Captions that a manifest does not give come from files beside the video: `name.txt` (one
caption) or `name.json` ({"caption": TEXT}, {"captions": {KIND: TEXT}}, {"captions": [TEXT]}, or a
list of texts).
"""

import csv
import glob
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from sora_jax import video_io
from sora_jax.data.build import places, sidecars
from sora_jax.data.build.sidecars import Captions, parse_captions, read_sidecar

MEDIA_SUFFIXES = (*video_io.READABLE_SUFFIXES, ".mkv", ".m4v", ".avi")
MANIFEST_SUFFIXES = (".csv", ".jsonl", ".parquet")
CAPTION_POLICIES = ("error", "drop", "allow")


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
    places.check_scheme(source)
    sidecars.names.cache_clear()
    suffix = os.path.splitext(source)[1].lower()
    if suffix == ".txt" and places.is_file(source):
        found = _from_rows(source, _list_rows(source), what="line")
    elif suffix in MANIFEST_SUFFIXES and places.is_file(source):
        found = _from_rows(source, _manifest_rows(source, suffix), what="row")
    elif places.is_dir(source):
        if out is not None and places.within(out, source):
            raise ValueError(
                f"the input {source} takes in the output folder {out}; choose an --out outside it."
            )
        found = _with_sidecars(_media_below(source), root=places.absolute(source))
    elif places.is_file(source):
        found = _with_sidecars(_media([source]), root=os.path.dirname(places.absolute(source)))
    elif glob.has_magic(source):
        matched = sorted(set(map(str, _glob(source))))  # ** on ** finds files twice
        found = _with_sidecars(_media(matched), root=places.absolute(_root_of_pattern(source)))
    else:
        raise ValueError(
            f"{source}: no such file or folder; give a folder of videos, a pattern in quotes, a "
            f"list (.txt) or a manifest ({', '.join(MANIFEST_SUFFIXES)})."
        )
    if not found:
        links = "; folders that are links are not entered" if _has_linked_folder(source) else ""
        raise ValueError(
            f"{source}: no readable video found; it must name files of {', '.join(MEDIA_SUFFIXES)}"
            f"{links}."
        )
    if out is not None:
        for file in found:
            if places.within(file.path, out):
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


def _media(paths: Iterable[str]) -> list[str]:
    return [
        places.absolute(path)
        for path in paths
        if os.path.splitext(path)[1].lower() in MEDIA_SUFFIXES
        # Elsewhere each question is a request, and a folder is hardly called so.
        and (places.is_remote(path) or places.is_file(path))
    ]


def _media_below(folder: str) -> list[str]:
    found = []
    for place, folders, names in places.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(place, name) for name in names if not name.startswith(".")]
    return _media(found)


def _with_sidecars(paths: Iterable[str], *, root: str) -> list[InputFile]:
    paths = list(paths)
    for path in paths:
        _check_name(path)
    return [InputFile(path, _key(path, root), read_sidecar(path)) for path in paths]


def _check_name(path: str) -> None:
    """Raises ValueError for a name that no record, report or list can hold."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise ValueError(f"{shown}: its name is not UTF-8; rename it.") from error


def _has_linked_folder(source: str) -> bool:
    return (
        not places.is_remote(source)
        and places.is_dir(source)
        and any(
            os.path.islink(os.path.join(place, name))
            for place, folders, _ in places.walk(source)
            for name in folders
        )
    )


def _key(path: str, root: str) -> str:
    if places.is_remote(path):
        return path.removeprefix(root.rstrip("/") + "/")
    return os.path.relpath(path, root).replace(os.sep, "/")


def _list_rows(source: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_read_table(source).split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            yield number, {"path": line.strip()}


def _manifest_rows(source: str, suffix: str) -> Iterator[tuple[int, dict]]:
    if suffix == ".csv":
        yield from _csv_rows(source)
    elif suffix == ".jsonl":
        for number, line in enumerate(_read_table(source).split("\n"), 1):
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
        try:
            with epath.Path(source).open("rb") as file:
                rows = pyarrow.parquet.read_table(file).to_pylist()
        except pyarrow.lib.ArrowException as error:
            raise ValueError(f"{source}: not a Parquet file ({error}).") from error
        yield from enumerate(rows, 1)


def _csv_rows(source: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(_read_table(source), newline=""))
    number = 0
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for number, row in enumerate(reader, 1):
            if any(row.get(None, ())):
                raise ValueError(
                    f"{source}: row {number} has more fields than there are "
                    "columns; put texts with commas in quotes."
                )
            yield number, row
    except csv.Error as error:
        raise ValueError(f"{source}: row {number + 1}: {error}; correct or remove it.") from error


def _read_table(source: str) -> str:
    try:
        return places.read_text(source)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text; save it as UTF-8.") from error


def _from_rows(source: str, rows: Iterable[tuple[int, dict]], *, what: str) -> list[InputFile]:
    """One input for each stretch that rows name, with the captions of all rows that name it."""
    base = os.path.dirname(places.absolute(source))
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
        places.check_scheme(path)
        path = path if places.is_remote(path) else os.path.normpath(os.path.join(base, path))
        if not places.is_file(path):
            absent.append(f"{what} {number}: no such file {path}")
            continue
        _check_name(path)
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
        captions = tuple(dict.fromkeys(captions)) or read_sidecar(path)
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
    if all(places.within(path, base) for path in paths):
        return base
    if all(places.is_remote(path) for path in paths):
        scheme = paths[0].partition("://")[0] + "://"
        folders = [os.path.dirname(path).removeprefix(scheme) for path in paths]
        return scheme + os.path.commonpath(folders)
    if any(places.is_remote(path) for path in paths):
        raise ValueError("a list names files on this machine and elsewhere; make two sets of them.")
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def _root_of_pattern(pattern: str) -> str:
    parts = pattern.split("/")
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:plain]) or ("/" if pattern.startswith("/") else ".")


def _glob(pattern: str) -> Iterable[Any]:
    if not places.is_remote(pattern):
        return glob.iglob(pattern, recursive=True)
    if "**" in pattern:
        raise ValueError(f"{pattern}: no ** on gs://; give the folder, which is read whole.")
    root = _root_of_pattern(pattern)
    return epath.Path(root).glob(pattern.removeprefix(root + "/"))
