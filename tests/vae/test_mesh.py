"""The VAE cut over height and width of its frames, with halos exchanged between neighbours."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import sharding
from sora_jax.vae.model import VAEConfig, VideoVAE

CONFIG = VAEConfig(
    base_dim=8,
    z_dim=4,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
    in_channels=3,
    out_channels=3,
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)


@pytest.mark.parametrize(
    "part, sizes",
    [
        ("encode", {"fsdp": 1, "context": 4, "tensor": 2}),
        ("decode", {"fsdp": 1, "context": 4, "tensor": 2}),
        ("decode", {"fsdp": 2, "context": 2, "tensor": 2}),
    ],
)
def test_space_over_eight_devices_equals_one(part, sizes):
    graph, params = nnx.split(VideoVAE(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)
    shape = (1, 5, 64, 32, 3) if part == "encode" else (1, 3, 32, 16, 4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))

    def run(params, x):
        return getattr(nnx.merge(graph, params), part)(x)

    alone = jax.jit(run).lower(params, x).compile()
    mesh = sharding.make_mesh(**sizes)
    with sharding.use_mesh(mesh):
        # Kernels cut over channels, which once gave wrong values: they must be gathered.
        kernels = jax.device_put(params, sharding.tree_shardings(params, mesh))
        arguments = kernels, sharding.replicate(x, mesh)
        cut = jax.jit(run).lower(*arguments).compile()
    np.testing.assert_allclose(cut(*arguments), alone(params, x), atol=1e-5)
    text = cut.as_text()
    # Neighbours' rows and columns at every convolution; kernels, and frames for the one attention.
    assert len(re.findall(r" collective-permute\(", text)) > 20
    kernels = len(jax.tree.leaves(params))
    assert len(re.findall(r" all-gather\(", text)) <= kernels + 4
    if sizes["fsdp"] == 1:
        memory = [c.memory_analysis().temp_size_in_bytes for c in (alone, cut)]
        assert memory[1] < 0.5 * memory[0]
