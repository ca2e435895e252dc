"""The gradients of 2-D convolution over frames against those that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import sharding
from sora_jax.vae.plane_conv import _conv, plane_conv


def arguments(batch=2, frames=3, h=6, w=5, inputs=3, outputs=4, size=(3, 3)):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (batch, frames, h, w, inputs))
    return x, jax.random.normal(keys[1], (*size, inputs, outputs))


def gradients(conv, x, kernel, *settings):
    def loss(x, kernel):
        return jnp.sum(jnp.sin(conv(x, kernel, *settings)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)


@pytest.mark.parametrize(
    "settings, sizes",
    [
        (((1, 1), ((1, 1), (1, 1))), {}),
        (((1, 1), ((1, 1), (1, 1))), {"h": 16, "w": 16}),  # eight parts
        (((1, 1), ((0, 2), (1, 0))), {"size": (2, 3)}),
        (((2, 2), ((0, 1), (0, 1))), {}),  # XLA's own
        (((1, 1), ((1, 1), (1, 1))), {"inputs": 64, "outputs": 64}),  # too
    ],
)
def test_gradients_are_those_of_the_convolution(settings, sizes):
    x, kernel = arguments(**sizes)
    for got, expected in zip(
        gradients(plane_conv, x, kernel, *settings),
        gradients(_conv, x, kernel, *settings),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_examples_on_a_mesh_give_the_same_gradient():
    x, kernel = arguments(batch=8)
    settings = (1, 1), ((1, 1), (1, 1))
    expected = gradients(plane_conv, x, kernel, *settings)[1]
    with sharding.use_mesh(sharding.make_mesh(data=4, fsdp=2)) as mesh:
        placed = jax.device_put(x, sharding.named(sharding.current_mesh(), "batch"))
        got = gradients(plane_conv, placed, kernel, *settings)[1]
    del mesh
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
