"""Weights on disk, in one safetensors file, in several, or in several with an index.

`Weights` is a mapping from a tensor's name to its shape that reads one tensor at a time, so that a
model never lies in host memory as a whole. Eight-bit files keep a scale beside each tensor; they
are read as what they stand for.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from sora_jax.convert.tensors import TensorFile, missing_file

INDEX = ".safetensors.index.json"
PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl")
# ComfyUI's eight-bit files: `NAME.weight` is stored divided by `NAME.scale_weight`; the scale of
# the input serves eight-bit products alone, and an empty tensor marks the file as such.
_SCALE = "scale_weight"
_UNUSED = ("scale_input",)
_TOKENIZER = "spiece_model"
# Not weights: ComfyUI's mark of an eight-bit file, and its text encoders' tokenizer.
_MARKS = ("scaled_fp8", _TOKENIZER)


class Weights:
    """Tensors of one or more files by name.

    `config` holds the settings that a file of ours carries in its header, `pipeline` those of the
    pipeline that a transformer is of; None in others.

    Args:
      files: opened files; no name may be in two of them.
      source: what to call them in errors.
      prefix: stands before every name in the files, and is left out here.

    Raises:
      ValueError: a name in two files, or a scale without its tensor or of another size.
    """

    def __init__(self, files: list[TensorFile], *, source: str, prefix: str = ""):
        self.source = source
        self._prefix = prefix
        self.metadata = {key: value for f in files for key, value in f.metadata.items()}
        self.config = next((f.config for f in files if f.config is not None), None)
        self.pipeline = next((f.pipeline for f in files if f.pipeline is not None), None)
        self._home: dict[str, TensorFile] = {}
        for file in files:
            for key in file.shapes:
                if key in self._home:
                    raise ValueError(
                        f"{source}: tensor {key!r} is in {self._home[key].path.name} and in "
                        f"{file.path.name}; these are files of two models: keep those of one."
                    )
                self._home[key] = file
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._scales: dict[str, str] = {}
        for key, file in self._home.items():
            name = key.removeprefix(prefix)
            module, _, leaf = name.rpartition(".")
            if leaf == _SCALE:
                self._scales[f"{module}.weight"] = key
            elif leaf not in _UNUSED and name not in _MARKS:
                self.shapes[name] = file.shapes[key]
        if lost := sorted(set(self._scales) - set(self.shapes)):
            raise ValueError(f"{source}: {lost[0]!r} has a scale but no tensor ({len(lost)} such).")
        for name, key in self._scales.items():
            scale, shape = self._home[key].shapes[key], self.shapes[name]
            if math.prod(scale) not in (1, *shape[:1]):
                raise ValueError(
                    f"{source}: {key!r} has shape {scale} for a tensor of {shape}; a scale is one "
                    "number, or one a row: copy or convert the file again."
                )

    def read(self, key: str) -> np.ndarray:
        """The tensor called `key`; an eight-bit one as float32, multiplied by its scale."""
        full = self._prefix + key
        value = self._home[full].read(full)
        if key in self._scales:
            scale_key = self._scales[key]
            scale = self._home[scale_key].read(scale_key).astype(np.float32)
            return value.astype(np.float32) * scale.reshape(-1, *(1,) * (value.ndim - 1))
        return value.astype(np.float32) if value.dtype.itemsize == 1 else value

    @property
    def sentencepiece(self) -> bytes | None:
        """The spiece.model that ComfyUI's text encoders carry among their tensors."""
        for key in (_TOKENIZER, self._prefix + _TOKENIZER):
            if key in self._home:
                return self._home[key].read(key).tobytes()
        return None

    @property
    def paths(self) -> list[Path]:
        """The files, in order of their names."""
        return sorted({file.path for file in self._home.values()})

    def strip(self, prefix: str) -> "Weights":
        """The same tensors with `prefix` left out of their names."""
        files = list({id(file): file for file in self._home.values()}.values())
        return Weights(files, source=self.source, prefix=self._prefix + prefix)


def open_weights(path: str | Path) -> Weights:
    """The weights at `path`: a safetensors file, an index, or a folder that holds either.

    Raises:
      ValueError: naming the file, and the tensor where it is one, that is missing, damaged,
        pickled, listed twice or outside the folder.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path}: pickled files are refused, because reading one runs whatever code it holds; "
            "convert it to safetensors on a machine that may run it, or take the safetensors file."
        )
    if path.name.endswith(INDEX):
        return _open_index(path)
    if path.suffix != ".safetensors":
        if not path.exists():
            raise ValueError(missing_file(path))
        raise ValueError(f"{path}: not a .safetensors file, nor an index of some ({INDEX}).")
    return Weights([TensorFile(path)], source=str(path))


def _open_folder(path: Path) -> Weights:
    indexes = sorted(path.glob(f"*{INDEX}"))
    files = sorted(path.glob("*.safetensors"))
    if len(indexes) == 1:
        return _open_index(indexes[0])
    if len(files) == 1 and not indexes:
        return Weights([TensorFile(files[0])], source=str(files[0]))
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if not files and pickles:
        return open_weights(path / pickles[0])
    found = ", ".join(p.name for p in [*indexes, *files][:4]) or "none"
    raise ValueError(
        f"{path}: needs one .safetensors file, or one index of several; found: {found}."
    )


def _open_index(path: Path) -> Weights:
    """All files that an index names, each tensor where the index says it is."""
    if not path.is_file():
        raise ValueError(missing_file(path))
    try:
        table = json.loads(path.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not an index of safetensors files; copy or export it again."
        ) from error
    if not isinstance(table, Mapping) or not all(isinstance(v, str) for v in table.values()):
        raise ValueError(f"{path}: its weight_map must give a file name for every tensor.")
    files = {}
    for name in sorted(set(table.values())):
        if PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise ValueError(
                f"{path}: names the file {name!r}, which is not in its own folder; index files "
                "name plain files beside them."
            )
        files[name] = TensorFile(path.parent / name)
    weights = Weights(list(files.values()), source=str(path))
    for key, name in table.items():
        if key not in files[name].shapes:
            raise ValueError(
                f"{path.parent / name}: lacks tensor {key!r}, which {path.name} says it holds; "
                "the files are of two exports: copy them again."
            )
    held = {key for file in files.values() for key in file.shapes}
    if unlisted := sorted(held - set(table)):
        raise ValueError(
            f"{path}: does not list {len(unlisted)} tensors that its files hold, {unlisted[0]!r} "
            "among them; the files are of two exports: copy them again."
        )
    return weights
