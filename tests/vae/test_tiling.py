"""Tiled encoding and decoding approach the whole result."""

import jax
import numpy as np
import pytest

from sora_jax.vae.config import VAEConfig
from sora_jax.vae.tiling import decode_tiled, encode_tiled

CONFIG = VAEConfig(
    base_dim=4, z_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,)
)


@pytest.fixture
def case(random_vae):
    """The VAE, latents, and their whole decoding, with its whole encoding."""
    vae = random_vae(CONFIG)
    latents = jax.random.normal(jax.random.key(0), (1, 2, 6, 32, 4))
    video = jax.jit(lambda vae, z: vae.decode(z))(vae, latents)
    return vae, latents, video, jax.jit(lambda vae, x: vae.encode_moments(x))(vae, video)


def distance(a, b):
    """Mean absolute difference, in standard deviations of `b`."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).mean() / np.asarray(b).std())


def test_one_tile_is_the_whole(case):
    vae, latents, video, moments = case
    tiled = decode_tiled(vae, latents, tile=(6, 99), overlap=(2, 8))
    np.testing.assert_allclose(tiled, video, atol=1e-5)
    tiled = encode_tiled(vae, video, tile=(6, 32), overlap=(0, 0))
    np.testing.assert_allclose(tiled.mean, moments.mean, atol=1e-5)
    np.testing.assert_allclose(tiled.logvar, moments.logvar, atol=1e-5)


def test_larger_tiles_and_overlaps_come_nearer_to_the_whole(case):
    vae, latents, video, moments = case
    errors = {"decode": [], "encode": []}
    for tile, overlap in ((8, 0), (16, 8), (24, 16)):
        settings = {"tile": (6, tile), "overlap": (0, overlap)}
        errors["decode"].append(distance(decode_tiled(vae, latents, **settings), video))
        errors["encode"].append(distance(encode_tiled(vae, video, **settings).mean, moments.mean))
    for name, values in errors.items():
        assert values == sorted(values, reverse=True), (name, values)
        assert values[-1] < 0.2 * values[0], (name, values)


def test_blending_in_both_directions_beats_cutting(case):
    vae, latents, video, _ = case
    cut = decode_tiled(vae, latents, tile=(3, 8), overlap=(0, 0))
    blended = decode_tiled(vae, latents, tile=(4, 16), overlap=(2, 8))
    assert cut.shape == blended.shape == video.shape
    assert distance(blended, video) < distance(cut, video)


def test_overlap_of_a_whole_tile_is_refused(case):
    vae, latents, *_ = case
    with pytest.raises(ValueError, match="overlap from 0 to 3"):
        decode_tiled(vae, latents, tile=(4, 4), overlap=(4, 0))
