"""Which files can be read and written, and writing them by atomic rename."""

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

WRITABLE_SUFFIXES = (".mp4", ".gif", ".webp", ".png", ".webm")
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm")  # decoded by FFmpeg, with seeking
IMAGE_SUFFIXES = (".gif", ".png", ".webp", ".jpg", ".jpeg")  # decoded by Pillow, some animated
READABLE_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES


def check_output_path(
    path: str | os.PathLike, *, allowed: Sequence[str] = WRITABLE_SUFFIXES
) -> Path:
    """Returns `path` as a `Path`, having checked that a file can be written there.

    Call it before any work is done, so that hours of sampling never end in a bad file name.

    Raises:
      ValueError: unknown extension, a directory, or a missing or read-only parent; one line.
    """
    path = Path(path)
    if path.suffix.lower() not in allowed:
        given = f"extension {path.suffix!r}" if path.suffix else "no extension"
        raise ValueError(f"{path}: {given}; use one of {', '.join(allowed)}.")
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the name of a file.")
    parent = path.parent
    if not parent.is_dir():
        what = "is a file, not a directory" if parent.exists() else "does not exist"
        raise ValueError(f"{path}: {parent} {what}; create it or choose another output path.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: no permission to write in {parent}; choose another directory.")
    return path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path`, renamed to `path` when the block succeeds.

    On any exception, KeyboardInterrupt included, the temporary file is removed and whatever was
    at `path` stays as it was. The extension is kept, because writers go by it.
    """
    path = Path(path)
    # The same directory, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
