"""Checksums of all files of a folder, in a file beside them that is itself protected.

The file's first line is the digest of what follows, JSON with one digest a file: no byte of the
folder, of the manifest either, can change unnoticed.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

NAME = "manifest.txt"
_BLOCK = 1 << 22  # bytes read at a time
_THREADS = min(16, os.cpu_count() or 1)  # hashlib lets go of Python's lock


def write(folder: epath.Path, note: dict[str, Any] | None = None) -> None:
    """Hashes every file below `folder` and writes its manifest, atomically.

    Args:
      note: JSON that is kept with it; see `read_note`.
    """
    names = _files(folder)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name), names))
    files = dict(zip(names, digests, strict=True))
    body = json.dumps({"files": files, "note": note or {}}, indent=1, sort_keys=True)
    partial = folder / f"{NAME}.partial"
    partial.write_text(f"{_of_text(body)}\n{body}")
    partial.replace(folder / NAME)


def exists(folder: epath.Path) -> bool:
    return (folder / NAME).exists()


def read_note(folder: epath.Path) -> dict[str, Any]:
    """The note of a sound manifest; {} without one."""
    body = _body(folder) if exists(folder) else None
    return {} if body is None else body["note"]


def damage(folder: epath.Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with the files of `folder`, in words; [] where all are as they were written.

    Args:
      share: (index, count): hash only each count-th file, so that processes can divide the work.
    """
    body = _body(folder)
    if body is None:
        return [f"{NAME} is damaged"]
    index, count = share
    mine: Sequence[tuple[str, str]] = sorted(body["files"].items())[index::count]

    def one(item: tuple[str, str]) -> str | None:
        name, expected = item
        if not (folder / name).exists():
            return f"{name} is missing"
        return None if _digest(folder / name) == expected else f"{name} is damaged"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return [problem for problem in pool.map(one, mine) if problem]


def _body(folder: epath.Path) -> dict[str, Any] | None:
    digest, _, body = (folder / NAME).read_bytes().partition(b"\n")
    if digest != _of_text(body).encode():
        return None
    return json.loads(body)


def _files(folder: epath.Path) -> list[str]:
    root = os.fspath(folder)
    return sorted(
        os.path.relpath(os.path.join(where, name), root)
        for where, _, names in os.walk(root)
        for name in names
        if name not in (NAME, f"{NAME}.partial")
    )


def _of_text(text: str | bytes) -> str:
    return hashlib.blake2b(text.encode() if isinstance(text, str) else text).hexdigest()


def _digest(file: epath.Path) -> str:
    digest = hashlib.blake2b()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
