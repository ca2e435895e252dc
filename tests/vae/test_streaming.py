"""Chunked encoding and decoding equal the whole clip's; the past never sees the future."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.vae.config import VAEConfig
from sora_jax.vae.streaming import decode_chunked, decode_stream, encode_chunked, encode_stream

PLAIN = VAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    latents_mean=(0.5, -0.5, 0.1, 0.0),
    latents_std=(1.5, 0.5, 2.0, 1.0),
)
RESIDUAL = dataclasses.replace(
    PLAIN, is_residual=True, patch_size=2, in_channels=12, out_channels=12
)
CONFIGS = {"plain": PLAIN, "residual": RESIDUAL}
both = pytest.mark.parametrize("kind", CONFIGS)


def random_video(config, *, frames, batch=1):
    side = 2 * config.scale_factor_spatial
    shape = (batch, frames, side, side + config.scale_factor_spatial, 3)
    return jax.random.uniform(jax.random.key(2), shape, minval=-1)


def random_latents(*, frames, batch=1):
    return jax.random.normal(jax.random.key(3), (batch, frames, 2, 3, 4))


@both
def test_chunked_encode_equals_whole(random_vae, kind):
    vae = random_vae(CONFIGS[kind])
    video = random_video(vae.config, frames=21, batch=2)  # 1, 2, 2 and 1 latent frames
    whole = jax.jit(lambda vae, x: vae.encode_moments(x))(vae, video)
    chunked = jax.jit(lambda vae, x: encode_chunked(vae, x, chunk=2))(vae, video)
    np.testing.assert_allclose(chunked.mean, whole.mean, atol=1e-5)
    np.testing.assert_allclose(chunked.logvar, whole.logvar, atol=1e-5)


@both
def test_chunked_decode_equals_whole(random_vae, kind):
    vae = random_vae(CONFIGS[kind])
    latents = random_latents(frames=6, batch=2)
    whole = jax.jit(lambda vae, z: vae.decode(z))(vae, latents)
    chunked = jax.jit(lambda vae, z: decode_chunked(vae, z, chunk=2))(vae, latents)
    assert float(jnp.std(whole)) > 0.1
    np.testing.assert_allclose(chunked, whole, atol=1e-5)


def test_memory_of_a_chunked_decode_does_not_grow_with_the_frames(random_vae):
    vae = random_vae(PLAIN)

    def beside_the_video(decode, frames):
        used = jax.jit(decode).lower(vae, random_latents(frames=frames)).compile().memory_analysis()
        return used.temp_size_in_bytes - used.output_size_in_bytes

    chunked, whole = decode_chunked, lambda vae, z: vae.decode(z)
    short, long = (beside_the_video(chunked, frames) for frames in (9, 33))
    assert long < 1.1 * short
    assert beside_the_video(whole, 33) > 3 * long  # which grows


def test_streams_equal_whole(random_vae):
    vae = random_vae(PLAIN)
    video = random_video(PLAIN, frames=13)
    parts = list(encode_stream(vae, [video[:, :5], video[:, 5:9], video[:, 9:]]))
    whole = jax.jit(lambda vae, x: vae.encode_moments(x))(vae, video)
    mean = jnp.concatenate([part.mean for part in parts], axis=1)
    np.testing.assert_allclose(mean, whole.mean, atol=1e-5)
    latents = vae.normalize(mean)
    video = jax.jit(lambda vae, z: vae.decode(z))(vae, latents)
    chunks = list(decode_stream(vae, latents, chunk=2))
    assert [chunk.shape[1] for chunk in chunks] == [1, 8, 4]
    np.testing.assert_allclose(jnp.concatenate(chunks, axis=1), video, atol=1e-5)


def test_streams_name_a_wrong_chunk(random_vae):
    vae = random_vae(PLAIN)
    video = random_video(PLAIN, frames=7)
    with pytest.raises(ValueError, match="5 or 9"):
        list(encode_stream(vae, [video]))
    with pytest.raises(ValueError, match="chunk 0"):
        list(decode_stream(vae, random_latents(frames=2), chunk=0))


@both
def test_latents_have_zero_gradient_from_later_frames(random_vae, kind):
    vae = random_vae(CONFIGS[kind])
    video = random_video(vae.config, frames=13)

    def early(video):
        moments = vae.encode_moments(video)
        return sum(jnp.sum(jnp.sin(m[:, :3])) for m in moments)

    gradient = np.abs(jax.jit(jax.grad(early))(video)).max(axis=(0, 2, 3, 4))
    assert (gradient[:9] > 0).all()
    assert (gradient[9:] == 0).all()


@both
def test_frames_have_zero_gradient_from_later_latents(random_vae, kind):
    vae = random_vae(CONFIGS[kind])

    def early(latents):
        return jnp.sum(jnp.sin(vae.decode_raw(latents)[:, :5]))

    gradient = np.abs(jax.jit(jax.grad(early))(random_latents(frames=4))).max(axis=(0, 2, 3, 4))
    assert (gradient[:2] > 0).all()
    assert (gradient[2:] == 0).all()
