"""Widened parts compute what the narrow ones did, and load in their new sizes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.convert import folder, rewrite
from sora_jax.dit.model import DiT, DiTConfig
from sora_jax.vae.model import VAEConfig, VideoVAE

DIT = DiTConfig(
    depth=2, width=48, num_heads=2, ffn_dim=32, in_channels=3, out_channels=3, text_dim=8
)
VAE = VAEConfig(
    base_dim=4,
    decoder_base_dim=6,
    z_dim=4,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
)


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("widen")


def drawn(model):
    """Random parameters: those of a new model are partly 0 and would hide a mistake."""
    params = nnx.split(model, nnx.Param)[1]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, draw)


def written(parts, name: str, path: Path):
    rewrite.write_diffusers(path, parts, dtype="float32")
    config, graphdef, params = folder.load_component(path, name)
    return config, nnx.merge(graphdef, params)


def test_a_doubled_vae_encodes_and_decodes_the_same(tool, tmp_path):
    narrow = VideoVAE(VAE, rngs=nnx.Rngs(0))
    params = drawn(narrow)
    nnx.update(narrow, params)
    part = rewrite.from_params("vae", VAE, params)
    wide_part = tool.double_vae(part, np.random.default_rng(0))
    config, wide = written({"vae": wide_part}, "vae", tmp_path)
    assert (config.base_dim, config.decoder_base_dim) == (8, 12)
    video = jax.random.uniform(jax.random.key(2), (1, 5, 16, 16, 3), minval=-1, maxval=1)
    for old, new in zip(narrow.encode_moments(video), wide.encode_moments(video), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-4 * float(jnp.abs(old).max()))
    latents = jax.random.normal(jax.random.key(3), (1, 3, 8, 8, 4))
    old, new = narrow.decode_raw(latents), wide.decode_raw(latents)
    assert float(old.std()) > 0.1
    np.testing.assert_allclose(new, old, atol=1e-4 * float(jnp.abs(old).max()))
    # Copies that weigh alike would get the same gradient for ever.
    kernel = wide_part.read("decoder.mid_block.resnets.0.conv1.weight")
    assert np.abs(kernel[:, :12] - kernel[:, 12:]).max() > 0.01


def test_wider_mlps_answer_the_same(tool, tmp_path):
    params = drawn(DiT(DIT, rngs=nnx.Rngs(0)))
    old = rewrite.from_params("dit", DIT, params)
    new = tool.widen_mlps(old, 80, np.random.default_rng(0))
    config, _ = written({"dit": new}, "dit", tmp_path)
    assert config.ffn_dim == 80
    x = np.random.default_rng(1).standard_normal((5, 48))

    def mlp(part):
        key = "blocks.1.ffn.net."
        up = x @ part.read(f"{key}0.proj.weight").T + part.read(f"{key}0.proj.bias")
        return np.asarray(jax.nn.gelu(up)) @ part.read(f"{key}2.weight").T

    np.testing.assert_allclose(mlp(new), mlp(old), rtol=1e-4, atol=1e-4)
    assert np.abs(new.read("blocks.1.ffn.net.0.proj.weight")[32:]).min() > 0
    with pytest.raises(ValueError, match="the MLPs have 80; give more"):
        tool.widen_mlps(new, 80, np.random.default_rng(0))
