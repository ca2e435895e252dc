"""Reads and writes safetensors files, with a checksum per tensor in the file's own header."""

import difflib
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_CHECKSUMS = "crc32"
# Our single files carry the config.json that they lack beside them, and a transformer's what its
# pipeline's model_index.json says of it.
_CONFIG, _PIPELINE = "sora_jax.config", "sora_jax.pipeline"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


# The format's names of element types.
_ELEMENTS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class TensorFile:
    """A safetensors file opened for reading one tensor at a time.

    Tensors are views of the mapped file: reading one costs no memory of its own.

    Raises:
      ValueError: the file is missing or damaged; `read` raises it for a damaged tensor.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(missing_file(self.path))
        self.path.open("rb").close()  # says why it cannot be; the library says "no such file"
        try:
            # The library knows every way in which a header can lie; its numpy reader knows no
            # eight-bit floats, so the tensors are read below.
            with safe_open(self.path, framework="np") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(
                f"{self.path}: damaged safetensors file ({error}); copy or export it again."
            ) from error
        self.metadata: dict[str, str] = metadata
        self._checksums = json.loads(metadata.get(_CHECKSUMS, "{}"))
        self.config, self.pipeline = (
            json.loads(metadata[key]) if key in metadata else None for key in (_CONFIG, _PIPELINE)
        )
        with self.path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(size))
        self._header.pop("__metadata__", None)
        self._data = np.memmap(self.path, np.uint8, "r", 8 + size) if self._header else None
        self.shapes = {key: tuple(entry["shape"]) for key, entry in self._header.items()}

    def dtype(self, key: str) -> np.dtype:
        """Element type of a tensor.

        Raises:
          ValueError: one that is not read here.
        """
        name = self._header[key]["dtype"]
        if name not in _ELEMENTS:
            raise ValueError(
                f"{self.path}: tensor {key!r} has elements {name}; read are {', '.join(_ELEMENTS)}."
            )
        return np.dtype(_ELEMENTS[name])

    def read(self, key: str) -> np.ndarray:
        first, last = self._header[key]["data_offsets"]
        stored = self._data[first:last]
        expected = self._checksums.get(key)
        if expected is not None and zlib.crc32(stored) != expected:
            raise ValueError(
                f"{self.path}: tensor {key!r} is damaged (its checksum differs); "
                "copy or export the file again."
            )
        return stored.view(self.dtype(key)).reshape(self.shapes[key])


def write_shards(
    directory: Path,
    stem: str,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    *,
    dtype: str = "float32",
    max_shard_size: int | None = None,
    config: dict | None = None,
    pipeline: dict | None = None,
) -> None:
    """Writes tensors as `dtype` into STEM.safetensors, or into several files and their index.

    The host holds one file's tensors at a time. Every file appears by an atomic rename, the index
    last, and files of an earlier export under the same stem go.

    Args:
      max_shard_size: bytes a file holds at most, but for a tensor that is larger; None: one file.
      config: settings that go into the header of each file, as do those of its `pipeline`.

    Raises:
      ValueError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    groups: list[list[str]] = [[]]
    size = 0
    for key, shape in shapes.items():
        nbytes = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if max_shard_size is not None and groups[-1] and size + nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += nbytes
    count = len(groups)
    files = [
        f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        for i in range(count)
    ]
    index = directory / f"{stem}.safetensors.index.json"
    # Gone first: a half-written export must not load as if the old index still held.
    index.unlink(missing_ok=True)
    header = {
        key: json.dumps(value)
        for key, value in ((_CONFIG, config), (_PIPELINE, pipeline))
        if value is not None
    }
    total = 0
    for name, keys in zip(files, groups, strict=True):
        path = directory / name
        # Cast one by one: the file is in memory once, and what it is read from never as a whole.
        tensors = {key: _cast(path, key, read(key), dtype) for key in keys}
        total += _write_file(path, tensors, header)
    stale = {directory / f"{stem}.safetensors", *directory.glob(f"{stem}-*-of-*.safetensors")}
    for path in stale - {directory / name for name in files}:
        path.unlink(missing_ok=True)
    if count > 1:
        table = {key: name for name, keys in zip(files, groups, strict=True) for key in keys}
        temporary = index.with_name(f".{index.name}.tmp")
        content = {"metadata": {"total_size": total}, "weight_map": table}
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, index)


def _write_file(path: Path, tensors: dict[str, np.ndarray], header: dict[str, str]) -> int:
    """Writes one file atomically; returns the bytes of its tensors."""
    checksums = {
        key: zlib.crc32(value.reshape(-1).view(np.uint8)) for key, value in tensors.items()
    }
    metadata = {"format": "pt", _CHECKSUMS: json.dumps(checksums), **header}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        temporary.chmod(0o644)  # safetensors writes for the owner alone
        os.replace(temporary, path)
    except SafetensorError as error:  # as where the disk is full
        raise ValueError(
            f"{path}: not written ({error}); make room, or name another disk."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return sum(value.nbytes for value in tensors.values())


def _cast(path: Path, key: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """Contiguous (a transposed view would be written in the wrong order without an error)."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(value, dtype=DTYPES[dtype])
    if dtype == "float16" and np.isinf(cast).any() and np.isfinite(value).all():
        raise ValueError(
            f"{path}: tensor {key!r} holds values beyond float16's 65504; write bfloat16 or "
            "float32."
        )
    return cast


def missing_file(path: Path) -> str:
    """One line that names a missing file and the nearest thing that is there."""
    parent = path.parent
    if not parent.is_dir():
        return f"{path}: no such file, and no folder {parent}; check the path."
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1)
    hint = f"did you mean {near[0]}?" if near else "check its name and its folder."
    return f"{path}: no such file; {hint}"


def hash_files(paths: list[Path]) -> str:
    """Hexadecimal SHA-256 over the contents of `paths`, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
