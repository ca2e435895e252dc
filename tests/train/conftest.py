"""Tiny configs of both stages, and a VAE folder with random weights for the second."""

import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `configs`, which is not installed

from configs import base, paperworld_vae
from sora_jax.convert import folder
from sora_jax.vae.model import VAEConfig, VideoVAE


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    """An inference folder with a VAE of 4x16x16 and 4 channels, as it is initialised."""
    path = tmp_path_factory.mktemp("vae")
    config = VAEConfig(
        base_dim=4,
        z_dim=4,
        dim_mult=(1, 2, 2),
        num_res_blocks=1,
        temporal_downsample=(True, True),
        patch_size=4,
        is_residual=True,
        in_channels=48,
        out_channels=48,
        latents_mean=(0.1, -0.1, 0.0, 0.2),
        latents_std=(0.5, 0.6, 0.7, 0.8),
    )
    vae = jax.jit(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))()
    folder.save_component(path, "vae", config, nnx.split(vae, nnx.Param)[1])
    return path


@pytest.fixture
def vae_config():
    """The VAE stage: `configs/paperworld_vae.py:smoke` as it is, unlocked."""
    return paperworld_vae.get_config("smoke").unlock()


@pytest.fixture
def dit_config(vae_folder):
    """The DiT stage on latents of 2x2x2 of the folder's VAE."""
    config = base.get_config()
    config.num_steps, config.batch_size = 4, 8
    config.vae_checkpoint = str(vae_folder)
    config.data.update(width=32, height=32, frames=5)
    config.text.update(width=16, head_dim=8, mlp_dim=16, depth=1, num_heads=2)
    config.text_tokens = 24
    config.dit.update(patch_size=(1, 1, 1), depth=2, width=32, num_heads=2, ffn_dim=32)
    config.optim.update(warmup_steps=1)
    config.sample.update(steps=2, solver="euler")
    config.log_every, config.checkpoint_every, config.sample_every = 1, 2, 0
    return config
