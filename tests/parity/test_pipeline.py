"""Whole pipelines against diffusers, which runs beside this package: `make parity`.

The shipped model, loaded by diffusers' `from_pretrained`, renders the frames that `sora-jax sample`
renders from the same noise.
"""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

import sora_jax
from sora_jax import cli, video_io
from sora_jax.train.export import export
from tests.parity import reference

PROMPT = "a red ball rolls left in the meadow"
SIZE, FRAMES, STEPS, GUIDANCE = 64, 17, 6, 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The shipped weights, exported once more, in float32."""
    return export(sora_jax.weights_folder(), tmp_path_factory.mktemp("export") / "paperworld")


def diffusers_video(folder, noise, scheduler=None):
    """(frames in [0, 1], latents after every step, channels last)."""
    pipe = WanPipeline.from_pretrained(str(folder), torch_dtype=torch.float32)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return reference.denoise(
        pipe,
        noise,
        prompt=PROMPT,
        negative_prompt="",
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    )


@pytest.mark.parametrize(("schedule", "solver"), [("wan", "unipc"), ("flow_match_euler", "euler")])
def test_shipped_weights_render_the_same_in_diffusers(folder, tmp_path, schedule, solver):
    pipe = sora_jax.load(folder)
    request = pipe.request(PROMPT, size=(SIZE, SIZE), frames=FRAMES)
    shape = pipe.latent_shape(request)
    noise = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    scheduler = None if schedule == "wan" else FlowMatchEulerDiscreteScheduler(shift=request.shift)
    theirs, latents = diffusers_video(folder, noise, scheduler)
    assert theirs.shape == (FRAMES, SIZE, SIZE, 3) and theirs.std() > 0.05

    status = cli.main(
        [
            *("sample", "--checkpoint", str(folder), "--prompt", PROMPT),
            *("--steps", str(STEPS), "--guidance", str(GUIDANCE), "--solver", solver),
            *("--schedule", schedule, "--noise", str(tmp_path / "noise.npy")),
            *("--save-latents", str(tmp_path / "x.npy"), "--out", str(tmp_path / "x.png")),
        ]
    )
    assert status == 0
    ours = np.load(tmp_path / "x.npy")
    np.testing.assert_allclose(ours, latents[-1], atol=1e-3)
    frames = (np.asarray(pipe.decode(ours)) + 1) / 2
    print(f"{schedule}: frames differ by up to {np.abs(frames - theirs).max():.2e}")
    np.testing.assert_allclose(frames[0], theirs, atol=1e-4)
    written = video_io.read_video(tmp_path / "x.png").frames
    assert np.abs(written / 255 - theirs).max() < 0.5 / 255 + 1e-4
