"""Shapes, settings and options of the VAE."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.convert.vae import abstract_vae, load_vae_tensors
from sora_jax.sharding import RULES
from sora_jax.vae.config import VAEConfig
from sora_jax.vae.model import check_video_shape, patchify, unpatchify

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
TINY = VAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
    patch_size=2,
    in_channels=12,
    out_channels=12,
)


def tiny_video():
    return jax.random.uniform(jax.random.key(0), (1, 5, 8, 12, 3), minval=-1)


def test_every_parameter_has_known_axes():
    for path, leaf in nnx.to_flat_state(nnx.state(abstract_vae(TINY), nnx.Param)):
        axes = leaf.get_metadata()["axes"]
        assert len(axes) == len(leaf.shape), path
        assert all(axis is None or axis in RULES for axis in axes), path


def test_a_file_of_another_size_is_refused_by_tensor_name():
    tensors = {"encoder.conv_in.weight": np.zeros((4, 3, 3, 3, 3), np.float32)}
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight") as error:
        load_vae_tensors(TINY, tensors, source="vae.safetensors")
    assert "missing" in str(error.value) and "\n" not in str(error.value)


def test_patches_are_ordered_channel_then_x_then_y():
    video = jnp.arange(2 * 2 * 3, dtype=jnp.float32).reshape(1, 1, 2, 2, 3)
    expected = [video[0, 0, y, x, c] for c in range(3) for x in range(2) for y in range(2)]
    np.testing.assert_array_equal(patchify(video, 2).ravel(), jnp.stack(expected))
    wide = tiny_video()
    np.testing.assert_array_equal(unpatchify(patchify(wide, 2), 2), wide)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((16, 64, 64), "16 frames .* nearest are 13 or 17"),
        ((0, 64, 64), "nearest are 1"),
        ((17, 60, 64), "size 64x60 .* multiples of 8; the nearest is 64x64"),
        ((17, 64, 3), "nearest is 8x64"),
    ],
)
def test_wrong_video_shapes_name_the_nearest_allowed(shape, message):
    with pytest.raises(ValueError, match=message):
        check_video_shape(VAEConfig(), *shape)


def test_wrong_frame_count_is_refused_before_any_work(random_vae):
    with pytest.raises(ValueError, match="3 or 5"):
        random_vae(TINY).encode(jnp.zeros((1, 4, 8, 8, 3)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"in_channels": 3}, "3 \\* patch_size\\*\\*2 = 12"),
        ({"temporal_downsample": (True, True)}, "one per stage but the last"),
        ({"is_residual": True}, "stage 1 .* is_residual=False"),
        ({"latents_mean": (0.0,)}, "give 4"),
        ({"latents_std": (1.0, 1.0, 0.0, 1.0)}, "above 0"),
        ({"attn_scales": (0.5,)}, "set it to \\(\\)"),
        ({"dtype": "float8"}, "bfloat16"),
        ({"base_dim": 0}, "base_dim 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_config_file_errors_name_the_key():
    with pytest.raises(ValueError, match="did you mean 'num_res_blocks'"):
        VAEConfig.from_dict({"num_res_block": 2})
    with pytest.raises(ValueError, match="scale_factor_spatial 16, but its stages make 8"):
        VAEConfig.from_dict({"scale_factor_spatial": 16})


def test_empty_config_file_is_wan21():
    config = VAEConfig.from_dict({})
    assert (config.scale_factor_temporal, config.scale_factor_spatial) == (4, 8)
    assert config.latents_mean[0] == -0.7571 and config.latents_std[-1] == 1.916


def test_latents_are_moments_normalised_per_channel(random_vae):
    config = dataclasses.replace(
        TINY, latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(0.5, 1.0, 2.0, 4.0)
    )
    vae = random_vae(config)
    moments = jax.jit(lambda vae, x: vae.encode_moments(x))(vae, tiny_video())
    latents = jax.jit(lambda vae, x: vae.encode(x))(vae, tiny_video())
    for i in range(4):
        expected = (moments.mean[..., i] - config.latents_mean[i]) / config.latents_std[i]
        np.testing.assert_allclose(latents[..., i], expected, atol=1e-5)
    np.testing.assert_allclose(vae.denormalize(latents), moments.mean, atol=1e-5)


def test_samples_have_the_predicted_spread(random_vae):
    vae = random_vae(TINY)
    moments = jax.jit(lambda vae, x: vae.encode_moments(x))(vae, tiny_video())
    keys = jax.random.split(jax.random.key(0), 2000)
    samples = jax.vmap(lambda key: vae.sample_latents(moments, key))(keys)
    np.testing.assert_allclose(samples.mean(0), moments.mean, atol=0.15)
    np.testing.assert_allclose(samples.std(0), jnp.exp(0.5 * moments.logvar), rtol=0.15)


def loss(vae, video):
    return jnp.mean(jnp.square(vae.decode_raw(vae.encode(video)) - video))


def loss_and_gradient(vae):
    graph, params = nnx.split(vae, nnx.Param)
    step = jax.jit(jax.value_and_grad(lambda p, x: loss(nnx.merge(graph, p), x)))
    return step(params, tiny_video())


def test_remat_changes_no_gradient(random_vae):
    expected = loss_and_gradient(random_vae(TINY))
    ours = loss_and_gradient(random_vae(dataclasses.replace(TINY, remat=True)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, expected
    )


def test_bfloat16_stays_near_float32(random_vae):
    expected, expected_gradient = loss_and_gradient(random_vae(TINY))
    value, gradient = loss_and_gradient(random_vae(dataclasses.replace(TINY, dtype="bfloat16")))
    np.testing.assert_allclose(value, expected, rtol=0.03)
    assert value != expected
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))  # noqa: E731
    difference = jax.tree.map(jnp.subtract, gradient, expected_gradient)
    assert norm(difference) < 0.1 * norm(expected_gradient)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradient))


def test_a_black_video_has_finite_gradients(random_vae):
    """RMS norm divides by the length of a vector that is 0 where the bias is."""
    graph, params = nnx.split(random_vae(TINY), nnx.Param)
    params = jax.tree.map(jnp.zeros_like, params)
    gradient = jax.jit(jax.grad(lambda p, x: loss(nnx.merge(graph, p), x)))(
        params, jnp.zeros((1, 3, 8, 8, 3))
    )
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
