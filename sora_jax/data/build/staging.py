"""What is finished of a build that is under way: OUT/.build, from which it goes on when restarted.

  files/ab/abcd….json     the row of one finished input, with the stamp it was made under
  files/ab/abcd…/         its staged clips, there before the row is
  shards/00003.json       what is in a finished shard, and under which plan it was written
  tmp/                    whatever is being written; swept at each start

A row counts only under its own stamp: the settings of the stages, and the input's name, size, time
of change, captions and stretch. Contents are not hashed, since that would read every file twice. A
file copied anew is done anew, to the same bytes. A row that tells of a file that was late, grew or
crashed is stamped with the limits too, so that wider limits try it again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

import sora_jax
from sora_jax.data.build import places
from sora_jax.data.build.inputs import InputFile
from sora_jax.data.build.settings import BuildSettings
from sora_jax.data.build.stages import staged_path

FOLDER = ".build"
MANIFEST = "manifest.json"
FORMAT = 1  # of what lies there; raised when it changes
# Stages at which a file was given up for what it cost.
COSTLY = ("timeout", "memory", "crash")


class Staging:
    """OUT/.build, on this machine or on gs://."""

    def __init__(self, out: str | os.PathLike) -> None:
        self.out = epath.Path(out)
        self.root = self.out / FOLDER
        self.is_remote = places.is_remote(os.fspath(out))

    def saved(self, key: str) -> tuple[str, dict[str, Any]]:
        """The stamp and the row of a finished input."""
        saved = read_json(self._row_path(key))
        return saved["stamp"], saved["row"]

    def is_finished(self, file: InputFile, stamps: "Stamps") -> bool:
        """Its row is there under the right stamp, and so are its clips, whole."""
        saved = read_json(self._row_path(file.key))
        if saved is None:
            return False
        costly = saved["row"]["stage"] in COSTLY
        if saved["stamp"] != stamps.of(file, costly=costly):
            return False
        if self.is_remote:  # where what was written once stays whole
            return True
        # After a power cut the name of a file may be there without its bytes.
        folder = self._clips_path(file.key)
        for clip in saved["row"]["clips"]:
            path = staged_path(Path(folder), clip["key"])
            if clip["dropped"] is None and not (
                path.is_file() and path.stat().st_size == clip["bytes"]
            ):
                return False
        return True

    def commit(
        self, key: str, row: Mapping[str, Any], stamp: str, clips: Path | None = None
    ) -> None:
        """Makes `row` final, and what the folder `clips` holds its clips; the row comes last.

        Nothing made under `stamp` is ever removed: on Beam the same task may be done twice, the
        second time while the first result is already read.
        """
        target = self._clips_path(key)
        saved = read_json(self._row_path(key))
        if saved is not None and saved["stamp"] != stamp:  # its clips are about to change
            self._row_path(key).unlink(missing_ok=True)
        for path in sorted(clips.iterdir()) if clips is not None else ():
            target.mkdir(parents=True, exist_ok=True)
            if self.is_remote:
                epath.Path(path).copy(target / path.name, overwrite=True)
            else:
                os.replace(path, target / path.name)
        write_json(self._row_path(key), {"stamp": stamp, "row": row})

    def clip(self, source: str, key: str) -> bytes:
        """The staged bytes of the clip `key` of the input `source`."""
        name = staged_path(Path(), key).name
        return (self._clips_path(source) / name).read_bytes()

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder on this machine, gone afterwards unless it was moved away."""
        if self.is_remote:
            path = Path(tempfile.mkdtemp(prefix="sora_jax_"))
        else:  # on the same disk, so that what is in it can be moved
            path = Path(self.root / "tmp" / uuid.uuid4().hex)
            path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, local: Path, name: str) -> None:
        """Gives the file `local` the name `name` in OUT, by a rename, whole or not at all."""
        if not self.is_remote:
            with open(local, "rb") as file:
                os.fsync(file.fileno())  # or a power cut leaves the name without the bytes
            os.replace(local, self.out / name)
            return
        self.out.mkdir(parents=True, exist_ok=True)
        part = self.root / "tmp" / f"{uuid.uuid4().hex}.{name}"
        part.parent.mkdir(parents=True, exist_ok=True)
        epath.Path(local).copy(part)
        part.rename(self.out / name)

    def sweep(self) -> None:
        """Removes what an earlier, killed run was writing."""
        if (self.root / "tmp").exists():
            (self.root / "tmp").rmtree()

    def remove(self) -> None:
        if self.root.exists():
            self.root.rmtree()

    def shard_path(self, index: int) -> epath.Path:
        return self.root / "shards" / f"{index:05d}.json"

    def _row_path(self, key: str) -> epath.Path:
        name = _digest(key)
        return self.root / "files" / name[:2] / f"{name}.json"

    def _clips_path(self, key: str) -> epath.Path:
        name = _digest(key)
        return self.root / "files" / name[:2] / name


class Stamps:
    """What rows are valid under."""

    def __init__(self, settings: BuildSettings) -> None:
        sections = settings.to_dict()
        limits = sections.pop("limits")
        # These act on the set as a whole, once every file is done.
        sections.pop("duplicate")
        for name in ("shard_mebibytes", "seed"):
            sections["write"].pop(name)
        self._plain = _digest(["rows", FORMAT, sora_jax.__version__, sections])
        self._costly = _digest([self._plain, limits])

    def of(self, file: InputFile, *, costly: bool = False) -> str:
        """The stamp of a row of `file`; `costly` where the limits decided what it says."""
        size, changed = size_and_time(file.path)
        return _digest([self._costly if costly else self._plain, list(file), size, changed])


def size_and_time(path: str) -> tuple[int, int]:
    """Bytes, and time of the last change in ns; (-1, 0) if the file has gone."""
    try:
        if places.is_remote(path):
            stat = epath.Path(path).stat()
            return int(stat.length), int(stat.mtime * 1e9)
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    except FileNotFoundError:
        return -1, 0


def failed_row(key: str, stage: str, error: str) -> dict[str, Any]:
    """The row of an input of which nothing came."""
    unknown = dict.fromkeys(("warning", "width", "height", "fps", "seconds", "codec"))
    return {"source": key, "error": error, "stage": stage, **unknown, "clips": []}


def read_json(path: epath.Path) -> Any:
    """What a file that we wrote holds, or None if it is not there or not whole."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def built_manifest(folder: epath.Path) -> dict[str, Any] | None:
    """The manifest of the set that `folder` holds; None if there is none, or it is not whole.

    Raises:
      ValueError: it is another program's; one line.
    """
    manifest = read_json(folder / MANIFEST)
    ours = isinstance(manifest, dict) and {"format", "settings", "shards"} <= manifest.keys()
    if manifest is None or ours:
        return manifest
    raise ValueError(
        f"{folder} holds another program's {MANIFEST}; give the --out folder of `sora-jax data "
        "build`, which is to be new or empty at first."
    )


def write_json(path: epath.Path, value: Any) -> None:
    """Writes by a rename, so that the file is whole whenever it is there."""
    data = (json.dumps(value, sort_keys=True) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if places.is_remote(os.fspath(path)):  # an object appears whole
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _digest(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]
