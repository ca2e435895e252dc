"""Which files can be read and written, and writing them by atomic rename."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

WRITABLE_SUFFIXES = (".mp4", ".gif", ".webp", ".png", ".webm")
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm")  # decoded by FFmpeg, with seeking
IMAGE_SUFFIXES = (".gif", ".png", ".webp", ".jpg", ".jpeg")  # decoded by Pillow, some animated
READABLE_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
_STEM = 32  # characters of a name that its temporary one keeps: names have a longest length


def check_output_path(
    path: str | os.PathLike, *, allowed: Sequence[str] = WRITABLE_SUFFIXES
) -> Path:
    """Returns `path` as a `Path`, having checked that a file can be written there.

    Call it before any work is done, so that hours of sampling never end in a bad file name.

    Raises:
      ValueError: unknown extension, a name that is too long, a directory, or a parent that is
        missing or takes no files; one line.
    """
    path = Path(path)
    if path.suffix.lower() not in allowed:
        given = f"extension {path.suffix!r}" if path.suffix else "no extension"
        raise ValueError(f"{path}: {given}; use one of {', '.join(allowed)}.")
    check_name(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the name of a file.")
    parent = path.parent
    if not parent.is_dir():
        what = "is a file, not a directory" if parent.exists() else "does not exist"
        raise ValueError(f"{path}: {parent} {what}; create it or choose another output path.")
    try:
        try_folder(parent)
    except OSError as error:
        raise ValueError(
            f"{path}: no file can be made in {parent} ({error.strerror}); choose another directory."
        ) from error
    return path


def check_name(path: str | os.PathLike) -> None:
    """Raises ValueError, in one line, for a name that the file system has no room for."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{path}: {error.strerror}; use a shorter one.") from error


def ffmpeg_name(path: str | os.PathLike) -> str:
    """`path` as FFmpeg is to be told it, which takes a colon in a name for a protocol."""
    return f"file:{os.fspath(path)}"


def try_folder(folder: Path) -> None:
    """Raises OSError unless a file can be made in `folder`: makes one, for permissions are not
    all that it takes."""
    probe = folder / f".probe-{uuid.uuid4().hex[:8]}"
    probe.write_bytes(b"")
    probe.unlink()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path`, renamed to `path` when the block succeeds.

    On any exception, KeyboardInterrupt included, the temporary file is removed and whatever was
    at `path` stays as it was. The extension is kept, because writers go by it.

    Raises:
      OSError: the file cannot be written; it names `path`, which a failing write does not.
    """
    path = Path(path)
    # The same directory, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.stem[:_STEM]}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # where there is no such folder, say
            temporary.unlink()
