"""ONNX programs make the same video in ONNX Runtime, for any batch: `make onnx`."""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

import sora_jax
from sora_jax import cli
from sora_jax.train.export import export
from sora_jax.train.loop import train
from tests.convert.test_programs_pictures import (  # noqa: F401
    FAMILIES,
    assert_run_py_makes_the_same_video,
    families,
)

PROMPT = "a red ball rolls left in the meadow"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The shipped model."""
    out = tmp_path_factory.mktemp("onnx") / "out"
    args = ["--checkpoint", "paperworld", "--to", "onnx", "--out", str(out)]
    assert cli.main(["convert", "export", *args]) == 0
    return out


def test_run_py_makes_the_same_video_with_onnxruntime(exported, tmp_path):
    pipe = sora_jax.load("paperworld")
    settings = {"steps": 4, "guidance": 2.0, "solver": "euler", "schedule": "linear"}
    request = pipe.request(PROMPT, **settings)
    noise = np.random.default_rng(0).standard_normal((1, *pipe.latent_shape(request)))
    np.save(tmp_path / "noise.npy", noise.astype(np.float32))
    ours = pipe.run([request], noise=noise)[0].frames
    ids = pipe.tokenizer.encode(PROMPT, max_length=pipe.sampling.text_tokens)
    command = [sys.executable, "-I", "run.py", "--out", str(tmp_path / "x.npy"), "--ids"]
    command += [*map(str, ids), "--noise", str(tmp_path / "noise.npy")]
    command += ["--steps", "4", "--guidance", "2"]
    subprocess.run(command, cwd=exported, check=True, timeout=300)
    frames = np.load(tmp_path / "x.npy")[0]
    assert frames.shape == ours.shape and frames.std() > 10
    assert np.abs(frames.astype(int) - ours).max() <= 1


@pytest.mark.parametrize("batch", [1, 3])
def test_the_encoder_takes_any_batch(exported, batch):
    pipe = sora_jax.load("paperworld")
    video = np.random.default_rng(0).uniform(-1, 1, (batch, 17, 64, 64, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(exported / "encode.onnx"))
    assert [given.name for given in session.get_inputs()] == ["video"]
    theirs = session.run(None, {"video": video})[0]
    np.testing.assert_allclose(theirs, pipe._latents(pipe.vae.params, video), atol=1e-4)


def test_a_training_run_is_read_with_the_older_orbax(dit_config, tmp_path):
    dit_config.num_steps = dit_config.checkpoint_every = 1
    train(dit_config, tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "out", to="onnx", weights="raw")
    assert {"denoise.onnx", "run.py", "manifest.json"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_pictures_or_two_transformers(families, family, tmp_path):  # noqa: F811
    source, count = families[family]
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(source), "--to", "onnx", "--out", str(out)]
    assert cli.main(["convert", "export", *arguments]) == 0
    assert_run_py_makes_the_same_video(source, count, out, tmp_path)
