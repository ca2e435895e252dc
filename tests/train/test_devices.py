"""Eight simulated devices, however the mesh divides them, train as one does."""

import json

import jax
import numpy as np
import pytest

from sora_jax.train.loop import train

STEPS = 3
# tests/test_meshes.py and tests/vae/test_space.py have more of them; here the whole loop runs.
MESH = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}


def losses(config, workdir, *, devices=None, **mesh) -> list[float]:
    config.num_steps, config.checkpoint_every, config.sample_every = STEPS, STEPS, 0
    config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | mesh)
    train(config, workdir, devices=devices)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


@pytest.mark.parametrize("stage", ["dit", "vae"])
def test_losses_on_any_mesh_equal_those_on_one_device(stage, dit_config, vae_config, tmp_path):
    # One level of the VAE, and AdamW: half of the program, of which test_space.py has the rest.
    vae_config.vae.update(dim_mult=(1,), temporal_downsample=())
    vae_config.optim.update(name="adamw", peak_lr=1e-4)
    config = {"dit": dit_config, "vae": vae_config}[stage]
    alone = losses(config, tmp_path / "one", devices=jax.devices()[:1])
    assert len(set(alone)) == len(alone) == 2  # of step 1, and the mean of steps 2 and 3
    many = losses(config, tmp_path / "many", **MESH)
    np.testing.assert_allclose(many, alone, rtol=1e-5)
