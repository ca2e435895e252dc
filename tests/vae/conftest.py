"""VAEs whose every parameter is random: none of the identities of initialisation."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.convert.vae import abstract_vae


@functools.cache
def _random_vae(config):
    rng = np.random.default_rng(0)
    graph, params = nnx.split(abstract_vae(config), nnx.Param)
    leaves = []
    for path, leaf in nnx.to_flat_state(params):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1] == "kernel":
            value = noise / np.prod(leaf.shape[:-1]) ** 0.5
        else:
            value = (1.0 if path[-1] == "scale" else 0.0) + 0.1 * noise
        leaves.append((path, leaf.replace(jnp.asarray(value))))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


@pytest.fixture(scope="session")
def random_vae():
    return _random_vae
