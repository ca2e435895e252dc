"""A pipeline as StableHLO, for runtimes without this package (OpenXLA's portable form).

Each of `convert.programs` comes as .stablehlo, portable bytecode, and as .jax_export, which
`jax.export.deserialize` reads; each model's weights, in float32 or bfloat16, as safetensors by
their path: a dictionary of them is every program's first argument. Programs are for CPU, CUDA and
TPU (the bytecode's first argument says which, 0 to 2), with the batch left symbolic.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.numpy import save_file

from sora_jax import layers
from sora_jax.convert import folder, programs, run_programs
from sora_jax.convert.programs import Program, Programs

PLATFORMS = ("cpu", "cuda", "tpu")


def write(source: str | Path, out: str | Path, *, dtype: str = "float32", **size) -> Path:
    """Writes the programs, weights, manifest, tokenizer and run.py of pipeline `source`.

    Arguments, and errors raised before anything is written, are those of `programs.load`.
    """
    with programs.fresh_folder(out) as made:
        _write(programs.load(source, dtype=dtype, **size), made)
    return Path(out)


def check(dtype: str) -> None:
    """Raises ValueError where `write` would, before anything is read."""
    programs.check_dtype(dtype)


def _write(loaded: Programs, out: Path) -> None:
    with layers.float32_contractions():
        exports = {
            name: _export(program, loaded.weights[program.part])
            for name, program in loaded.programs.items()
        }
    for name, exported in exports.items():
        (out / f"{name}.stablehlo").write_bytes(exported.mlir_module_serialized)
        (out / f"{name}.jax_export").write_bytes(exported.serialize())
    for name, weights in loaded.weights.items():
        tensors = {key: np.ascontiguousarray(value) for key, value in weights.items()}
        save_file(tensors, out / f"{folder.COMPONENTS[name].folder}.safetensors")
    loaded.tokenizer.save(out / "tokenizer")
    folder.write_json(out / "manifest.json", loaded.manifest | {"platforms": PLATFORMS})
    shutil.copyfile(run_programs.__file__, out / "run.py")


def _export(program: Program, weights: dict[str, jax.Array]) -> export.Exported:
    held = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in weights.items()}
    return export.export(jax.jit(program.run), platforms=PLATFORMS)(held, *program.arguments())
