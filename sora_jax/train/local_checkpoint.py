"""Copies of the state on each host's own disk, more frequent than shared checkpoints.

Each process writes the pieces that its devices hold, in one file, and restores them only where
every process has the same step: after a crash on the same hosts. A host that is new has none, and
the shared checkpoint is taken. Orbax's emergency manager wants a mesh axis of replicas to copy
from, and slices; this wants neither.

File: 8 bytes of length, a JSON header, the pieces, and 64 bytes of digest of all that.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sora_jax import agreement
from sora_jax.background import Background
from sora_jax.checkpoint import flat

_KEPT = 2  # processes may be killed with different ones complete
_DIGEST = 64  # bytes
ROOM = 3.2  # free space wanted, in sizes of what a process holds: one more is written beside two


def folder_of(directory: str | Path) -> Path:
    """Where this process keeps its copies under `directory`."""
    return Path(directory) / f"sora_jax-{jax.process_index()}-of-{jax.process_count()}"


class LocalCheckpointer:
    """The copies of this process under `directory`.

    Args:
      run: id of the run; copies of another one are removed when the first is written.
    """

    def __init__(self, directory: Path, *, run: str):
        self._folder = folder_of(directory)
        self._run = run
        self._background = Background("local")

    def __enter__(self) -> "LocalCheckpointer":
        return self

    def __exit__(self, *_) -> None:
        self.wait()

    def save(self, step: int, state, *, data: dict, meta: dict) -> None:
        """Copies the state to host memory, and writes it in the background."""
        self.wait()
        leaves, pieces, offset = [], [], 0
        for path, leaf in flat(state).items():
            held = {_key(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
            places = []
            for key, value in held.items():
                # A copy: the buffer is donated to the next step.
                array = np.array(value, copy=True)
                size = {"offset": offset, "bytes": array.nbytes, "shape": array.shape}
                places.append({"index": key} | size)
                pieces.append(array)
                offset += array.nbytes
            dtype = str(leaf.dtype)
            leaves.append({"path": path, "dtype": dtype, "shape": leaf.shape, "pieces": places})
        header = {"run": self._run, "step": step, "data": data, "meta": meta, "leaves": leaves}
        self._background.start(self._write, header, pieces)

    def _write(self, header: dict[str, Any], pieces: list[np.ndarray]) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                if path.suffix == ".partial" or self._is_foreign(path):
                    path.unlink()
            text = json.dumps(header).encode()
            digest = hashlib.blake2b()
            partial = self._folder / f"{header['step']}.partial"
            with partial.open("wb") as file:
                raw = (piece.reshape(-1).view(np.uint8) for piece in pieces)
                for part in (len(text).to_bytes(8, "little"), text, *raw):
                    digest.update(part)
                    file.write(part)
                file.write(digest.digest())
            os.replace(partial, self._folder / str(header["step"]))
            for step in self._steps()[:-_KEPT]:
                (self._folder / str(step)).unlink()
        except OSError as error:  # a full disk, say: the shared checkpoints are still there
            logging.warning("%s: no copy of step %d: %s.", self._folder, header["step"], error)

    def _is_foreign(self, path: Path) -> bool:
        header = _header(path)
        return header is None or header["run"] != self._run

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

    def wait(self) -> None:
        """Returns when what was started is on disk; raises what stopped it."""
        self._background.wait()

    def newest(self, abstract, shardings, *, above: int) -> int | None:
        """The newest step beyond `above` that every process holds, whole and undamaged.

        Args:
          abstract, shardings: of the state, as `Checkpointer.restore` takes them.
        """
        mine = [s for s in self._steps() if s > above and self._fits(s, abstract, shardings)]
        shared = set.intersection(*(set(steps) for steps in agreement.gather(mine)))
        return max(shared, default=None)

    def _fits(self, step: int, abstract, shardings) -> bool:
        file = self._folder / str(step)
        header = _header(file)
        if header is None or header["run"] != self._run or not _is_sound(file):
            return False
        held = {leaf["path"]: leaf for leaf in header["leaves"]}
        placed = flat(shardings)
        for path, leaf in flat(abstract).items():
            saved = held.get(path)
            if saved is None or tuple(saved["shape"]) != leaf.shape:
                return False
            if saved["dtype"] != str(leaf.dtype):
                return False
            known = [piece["index"] for piece in saved["pieces"]]
            wanted = placed[path].addressable_devices_indices_map(leaf.shape).values()
            if any(_key(index, leaf.shape) not in known for index in wanted):
                return False
        return len(held) == len(placed)

    def restore(self, step: int, abstract, shardings) -> tuple[Any, dict, dict]:
        """(state, data, meta) of a step that `newest` gave."""
        file = self._folder / str(step)
        header = _header(file)
        held = {leaf["path"]: leaf for leaf in header["leaves"]}
        placed, begin = flat(shardings), _begin(file)

        def one(path: str, leaf) -> jax.Array:
            pieces = {piece["index"]: piece for piece in held[path]["pieces"]}

            def read(index) -> np.ndarray:
                piece = pieces[_key(index, leaf.shape)]
                with file.open("rb") as opened:
                    opened.seek(begin + piece["offset"])
                    raw = opened.read(piece["bytes"])
                return np.frombuffer(raw, jnp.dtype(leaf.dtype)).reshape(piece["shape"])

            return jax.make_array_from_callback(leaf.shape, placed[path], read)

        leaves = [one(path, leaf) for path, leaf in flat(abstract).items()]
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        return state, header["data"], header["meta"]


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """Where a piece begins and ends along each axis: "0:4,2:4"."""
    ends = (s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    return ",".join(f"{start}:{stop}" for start, stop in ends)


def _begin(file: Path) -> int:
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def _header(file: Path) -> dict[str, Any] | None:
    """None where it cannot be read: `_is_sound` knows of what is in it."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                return None
            return json.loads(opened.read(length))
    except ValueError:
        return None


def _is_sound(file: Path) -> bool:
    digest, left = hashlib.blake2b(), file.stat().st_size - _DIGEST
    with file.open("rb") as opened:
        while left > 0:
            block = opened.read(min(left, 1 << 22))
            digest.update(block)
            left -= len(block)
        return opened.read() == digest.digest()
