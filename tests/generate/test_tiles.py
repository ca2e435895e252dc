"""Tiles cover everything, and what is the same on every tile is the same on the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.generate import tiles

SIZE, TILE, OVERLAP = (5, 7, 6), (3, 4, 6), (1, 2, 3)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (2, *SIZE, 3))


@pytest.fixture
def t(x):
    return jax.random.uniform(jax.random.key(1), x.shape[:-1])


def test_a_pointwise_velocity_is_that_of_the_whole(x, t):
    def velocity(x, t):
        return jnp.sin(x) * t[..., None]

    made = tiles.blended(velocity, x, t, tile=TILE, overlap=OVERLAP)
    np.testing.assert_allclose(made, velocity(x, t), rtol=1e-5, atol=1e-6)


def test_one_tile_is_the_whole(x, t):
    def velocity(x, t):
        return x - jnp.mean(x, axis=(1, 2, 3), keepdims=True)

    made = tiles.blended(velocity, x, t, tile=(9, 9, 9), overlap=(2, 2, 2))
    np.testing.assert_allclose(made, velocity(x, t), rtol=1e-5, atol=1e-6)


def test_each_place_is_the_mean_of_its_tiles_by_their_ramps(x, t):
    seen = []

    def velocity(part, _):
        return jnp.broadcast_to(jnp.sum(part, axis=(1, 2, 3), keepdims=True), part.shape)

    made = np.asarray(tiles.blended(velocity, x, t, tile=(3, 7, 6), overlap=(1, 2, 3)))
    for begin in tiles.begins(SIZE[0], 3, 1):
        seen.append((begin, np.asarray(x[:, begin : begin + 3].sum(axis=(1, 2, 3)))))
    assert [begin for begin, _ in seen] == [0, 2]
    # Frame 2 is the last of one tile and the first of the next, of equal weight at both ends.
    np.testing.assert_allclose(made[:, 2, 0, 0], (seen[0][1] + seen[1][1]) / 2, rtol=1e-4)
    np.testing.assert_allclose(made[:, 1, 3, 3], seen[0][1], rtol=1e-4)


@pytest.mark.parametrize(
    ("extent", "tile", "overlap", "expected"),
    [(5, 9, 2, [0]), (9, 9, 2, [0]), (10, 4, 2, [0, 2, 4, 6]), (11, 4, 2, [0, 2, 4, 6, 7])],
)
def test_tiles_cover_the_extent(extent, tile, overlap, expected):
    begins = tiles.begins(extent, tile, overlap)
    assert begins == expected
    covered = {i for begin in begins for i in range(begin, min(begin + tile, extent))}
    assert covered == set(range(extent))
