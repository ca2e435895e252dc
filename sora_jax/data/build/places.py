"""Paths on this machine and on gs://, looked at by the same names."""

import os
from collections.abc import Iterator

from etils import epath


def within(path: str, folder: str) -> bool:
    """`path` is `folder` or lies below it, links followed."""
    if is_remote(path) or is_remote(folder):
        return (path.rstrip("/") + "/").startswith(folder.rstrip("/") + "/")
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


def is_remote(path: str) -> bool:
    return "://" in path


def check_scheme(path: str) -> None:
    """Raises ValueError for an address that cannot be read; one line."""
    if is_remote(path):
        try:
            epath.Path(path)
        except KeyError as error:
            raise ValueError(
                f"{path}: no files are read or written there; give a path on this machine or a "
                "gs:// address."
            ) from error


def absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)


def is_dir(path: str) -> bool:
    if is_remote(path):
        return epath.Path(path).is_dir()
    return os.path.isdir(path)


def is_file(path: str) -> bool:
    if is_remote(path):
        return epath.Path(path).is_file()
    return os.path.isfile(path)


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk: (folder, names of folders in it, names of files in it), from the top."""
    if not is_remote(folder):
        yield from os.walk(folder)
        return
    folders, files = [], []
    for path in epath.Path(folder).iterdir():
        (folders if path.is_dir() else files).append(path.name)
    yield folder, folders, files
    for name in folders:
        yield from walk(f"{folder.rstrip('/')}/{name}")


def read_text(path: str) -> str:
    """UTF-8 text, with or without the mark that Windows puts in front."""
    if is_remote(path):
        return epath.Path(path).read_text("utf-8-sig")
    with open(path, encoding="utf-8-sig") as file:
        return file.read()
