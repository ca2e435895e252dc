"""Classifier-free guidance, its interval and its rescale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import guidance
from sora_jax.diffusion.guidance import GuidanceConfig

SHAPE = (2, 3, 4)


def _pair():
    cond_key, uncond_key = jax.random.split(jax.random.key(0))
    return jax.random.normal(cond_key, SHAPE), 1 + 2 * jax.random.normal(uncond_key, SHAPE)


def test_scale_one_is_conditional_and_zero_unconditional():
    cond, uncond = _pair()
    np.testing.assert_allclose(guidance.combine(cond, uncond, scale=1.0), cond, atol=1e-6)
    np.testing.assert_array_equal(guidance.combine(cond, uncond, scale=0.0), uncond)


def test_scale_extrapolates_from_unconditional_through_conditional():
    cond, uncond = _pair()
    guided = guidance.combine(cond, uncond, scale=5.0)
    np.testing.assert_allclose(guided - cond, 4 * (cond - uncond), atol=1e-5)


def test_full_rescale_has_the_conditional_standard_deviation_per_example():
    cond, uncond = _pair()
    guided = guidance.combine(cond, uncond, scale=5.0)
    rescaled = guidance.rescale_to(guided, cond, amount=1.0)
    np.testing.assert_allclose(np.std(rescaled, axis=(1, 2)), np.std(cond, axis=(1, 2)), rtol=1e-5)
    half = guidance.rescale_to(guided, cond, amount=0.5)
    np.testing.assert_allclose(half, 0.5 * (rescaled + guided), atol=1e-5)


def test_rescale_of_a_constant_is_that_constant():
    flat = jnp.full(SHAPE, 3.0)
    np.testing.assert_array_equal(guidance.rescale_to(flat, flat, amount=1.0), flat)


@pytest.mark.parametrize(("t", "inside"), [(0.1, False), (0.2, True), (0.7, True), (0.8, False)])
def test_guidance_holds_inside_its_interval_alone(t, inside):
    cond, uncond = _pair()
    config = GuidanceConfig(scale=4.0, interval=(0.15, 0.75))
    got = jax.jit(lambda t: guidance.guide(cond, uncond, t=t, config=config))(t)
    wanted = guidance.combine(cond, uncond, scale=4.0) if inside else cond
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_guided_velocity_takes_the_first_half_of_the_batch_as_conditional():
    x = jax.random.normal(jax.random.key(1), SHAPE)

    def velocity(x2, t):
        factor = jnp.repeat(jnp.asarray([3.0, 1.0]), 2)[:, None, None]
        return factor * x2

    guided = guidance.guided_velocity(velocity, config=GuidanceConfig(scale=2.0))
    np.testing.assert_allclose(guided(x, jnp.asarray(0.5)), 5.0 * x, rtol=1e-6)


@pytest.mark.parametrize("config", [{"scale": 1.0}, {"interval": (0.5, 0.5)}])
def test_guidance_that_changes_nothing_runs_the_model_on_one_batch(config):
    config = GuidanceConfig(**config)
    sizes = []

    def velocity(x, t):
        sizes.append(len(x))
        return x

    guidance.guided_velocity(velocity, config=config)(jnp.ones(SHAPE), jnp.asarray(0.5))
    assert sizes == [2] and not config.needs_uncond
    assert dataclasses.replace(config, blocks=(1,)).apart == ()
    assert GuidanceConfig(blocks=(1,)).apart == (1,)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"interval": (0.8, 0.2)}, "0 <= lo <= hi <= 1"),
        ({"interval": (0.0, 1.5)}, "0 <= lo <= hi <= 1"),
        ({"rescale": 1.2}, "must lie in"),
        ({"blocks_interval": (0.8, 0.2)}, "blocks' interval"),
        ({"blocks": (-1,)}, "different numbers from 0"),
        ({"blocks": (2, 2)}, "different numbers from 0"),
    ],
)
def test_bad_settings_say_what_is_allowed(setting, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**setting)


def test_frames_are_apart_without_the_prompt_and_within_the_interval():
    config = GuidanceConfig(blocks=(1, 3), blocks_interval=(0.2, 0.5))
    for t, inside in ((0.1, False), (0.2, True), (0.5, True), (0.6, False)):
        blocks, alone = guidance.frames_apart(config, jnp.float32(t), rows=4)
        assert blocks == (1, 3)
        np.testing.assert_array_equal(alone, [[False], [False], [inside], [inside]])
    _, alone = guidance.frames_apart(config, jnp.array([0.1, 0.3, 0.9]), rows=2)
    np.testing.assert_array_equal(alone, [[False] * 3, [False, True, False]])
    off = dataclasses.replace(config, scale=1.0)
    assert guidance.frames_apart(off, jnp.float32(0.3), rows=2) is None


def test_blocks_of_a_step_are_those_of_its_times():
    config = GuidanceConfig(blocks=(1,), blocks_interval=(0.2, 0.5), interval=(0.0, 0.8))

    def of(*times):
        made = guidance.at_times(config, np.array(times))
        return made.apart, made.blocks_interval

    assert of(0.3) == of(0.3, 0.4) == ((1,), (0.0, 1.0))
    assert of(0.6) == of(0.9) == ((), (0.0, 1.0))
    assert of(0.4, 0.6) == ((1,), (0.2, 0.5)), "within the program"
    assert guidance.at_times(config, np.array([0.9])).scale == 1.0
