import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.dit import rope


def test_head_dim_128_splits_as_in_wan():
    assert rope.split(128) == (44, 42, 42)
    assert rope.split(12) == (4, 4, 4)


@pytest.mark.parametrize("compiled", [False, True])
def test_angles_are_accurate_up_to_the_largest_position(compiled):
    positions = np.stack([np.arange(4097), 4096 - np.arange(4097), np.arange(4097) // 3], -1)
    angles = positions[:, np.repeat([0, 1, 2], [22, 21, 21])] * rope.frequencies(128)
    rotation = jax.jit(rope.rotation, static_argnums=1) if compiled else rope.rotation
    cos, sin = rotation(jnp.asarray(positions, jnp.int32), 128)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1.5e-6, rtol=0)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1.5e-6, rtol=0)


def test_products_depend_on_relative_position_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 24))

    def product(q_position, k_position):
        turned = [
            rope.apply(x, *rope.rotation(jnp.asarray([[p]], jnp.int32), 24))
            for x, p in ((q, q_position), (k, k_position))
        ]
        return jnp.sum(turned[0] * turned[1])

    near, far = product((3, 2, 7), (1, 5, 5)), product((103, 42, 8), (101, 45, 6))
    np.testing.assert_allclose(near, far, atol=1e-5)
    assert abs(near - product((3, 2, 7), (1, 5, 6))) > 1e-2
