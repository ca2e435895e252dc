"""Exported programs make the same video without this package, for any batch."""

import ast
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import sora_jax
from sora_jax import cli

PROMPTS = ("a red ball", "a much longer tree")


@pytest.fixture(scope="module")
def exported(pipeline_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("stablehlo") / "out"
    args = ["--checkpoint", str(pipeline_folder), "--to", "stablehlo", "--out", str(out)]
    assert cli.main(["convert", "export", *args]) == 0
    return out


def test_run_py_alone_makes_the_same_videos(exported, pipeline_folder, tmp_path):
    pipe = sora_jax.load(pipeline_folder)
    requests = [
        pipe.request(p, steps=3, guidance=2.0, solver="euler", schedule="linear") for p in PROMPTS
    ]
    noise = np.random.default_rng(0).standard_normal((2, *pipe.latent_shape(requests[0])))
    noise = noise.astype(np.float32)
    ours = np.stack([v.frames for v in pipe.run(requests, noise=noise)])
    for index, prompt in enumerate(PROMPTS):
        np.save(tmp_path / "noise.npy", noise[index : index + 1])
        ids = pipe.tokenizer.encode(prompt, max_length=24)
        command = [sys.executable, "-I", "run.py", "--out", str(tmp_path / "x.npy")]
        command += ["--ids", *map(str, ids), "--noise", str(tmp_path / "noise.npy")]
        command += ["--steps", "3", "--guidance", "2"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run(command, cwd=exported, env=environment, check=True, timeout=300)
        frames = np.load(tmp_path / "x.npy")
        assert frames.shape == (1, 5, 16, 16, 3) and frames.std() > 1
        assert np.abs(frames.astype(int) - ours[index : index + 1]).max() <= 1
    assert (tmp_path / "x.ppm").read_bytes().startswith(b"P6 80 16 255\n")


def test_a_folder_that_holds_something_is_not_mixed_with_what_is_new(exported, pipeline_folder):
    before = {path.name: path.read_bytes() for path in exported.iterdir() if path.is_file()}
    args = ["--checkpoint", str(pipeline_folder), "--to", "stablehlo", "--out", str(exported)]
    assert cli.main(["convert", "export", *args]) == 2
    assert before == {path.name: path.read_bytes() for path in exported.iterdir() if path.is_file()}
    assert [path.name for path in exported.parent.iterdir()] == ["out"]


def test_run_py_imports_no_package_but_the_runtimes(exported):
    source = (exported / "run.py").read_text()
    nodes = list(ast.walk(ast.parse(source)))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    foreign = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert foreign == {"jax", "numpy", "ml_dtypes", "onnxruntime"}


def test_programs_take_any_batch_and_name_three_platforms(exported, pipeline_folder):
    from jax import export

    programs = sorted(path.stem for path in exported.glob("*.jax_export"))
    assert programs == ["decode", "denoise", "encode", "text_encoder"]
    for name in programs:
        program = export.deserialize((exported / f"{name}.jax_export").read_bytes())
        assert program.platforms == ("cpu", "cuda", "tpu")
        assert str(program.out_avals[0].shape[0]) == "b"
        assert (exported / f"{name}.stablehlo").read_bytes()[:4] == b"ML\xefR"  # MLIR bytecode
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["latents"] == [3, 4, 4, 4] and manifest["text_tokens"] == 24
