"""A pipeline as ONNX, by jax2onnx: for ONNX Runtime and what builds on it.

Each of `convert.programs` becomes an .onnx file, its large weights in an .onnx.data file beside it,
the batch left symbolic. jax2onnx pins an older orbax-checkpoint than this package needs, so it has
an environment of its own: `make onnx` builds it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sora_jax.convert import folder, programs, run_programs
from sora_jax.convert.programs import Program, Programs
from sora_jax.vae.conv import two_dimensional


def write(source: str | Path, out: str | Path, *, dtype: str = "float32", **size) -> Path:
    """Writes the programs, manifest, tokenizer and run.py of pipeline `source`.

    Arguments, and errors raised before anything is written, are those of `programs.load`.

    Raises:
      ValueError: also where jax2onnx is not installed, or for weights other than float32.
    """
    to_onnx = check(dtype)
    with programs.fresh_folder(out) as made:
        _write(programs.load(source, **size), made, to_onnx)
    return Path(out)


def check(dtype: str) -> Callable[..., Any]:
    """jax2onnx's function; raises ValueError where `write` would, before anything is read."""
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise ValueError(
            "ONNX needs jax2onnx, which does not go with this environment's orbax-checkpoint; run "
            "`make onnx` once, then .venv-onnx/bin/sora-jax in place of sora-jax."
        ) from error
    if dtype != "float32":
        raise ValueError(f"dtype {dtype!r}: ONNX programs are float32.")
    return to_onnx


def _write(loaded: Programs, out: Path, to_onnx) -> None:
    for name, program in loaded.programs.items():
        weights = loaded.weights[program.part]
        with two_dimensional():
            to_onnx(
                _with_weights(program, weights),
                inputs=program.arguments(),
                model_name=name,
                return_mode="file",
                output_path=str(out / f"{name}.onnx"),
                input_names=list(program.names),
            )
    loaded.tokenizer.save(out / "tokenizer")
    folder.write_json(out / "manifest.json", loaded.manifest)
    shutil.copyfile(run_programs.__file__, out / "run.py")
    for path in out.glob("*.data"):
        path.chmod(0o644)  # written for the owner alone


def _with_weights(program: Program, weights: dict[str, jax.Array]):
    return lambda *arguments: program.run(weights, *arguments)
