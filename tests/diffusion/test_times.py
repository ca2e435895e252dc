"""Training distributions of t and sampling schedules."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import times
from sora_jax.diffusion.times import TimeConfig, TokenShift

GOLDENS = Path(__file__).parent.parent / "goldens" / "diffusion.npz"
UNIFORM = TimeConfig(kind="uniform", stratified=False)


def _sigmoid_cdf(t, mean, std):
    logit = np.log(t) - np.log1p(-t)
    return np.asarray(jax.scipy.stats.norm.cdf((logit - mean) / std))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_time_has_its_stated_distribution(kind, shift, stratified):
    config = TimeConfig(kind=kind, mean=0.4, std=1.2, stratified=stratified)
    n = 20_000
    t = np.sort(times.sample_t(jax.random.key(0), (n,), config=config, shift=shift))
    u = times.unshift_time(t, shift)
    cdf = u if kind == "uniform" else _sigmoid_cdf(u, 0.4, 1.2)
    distance = np.max(np.abs(cdf - (np.arange(n) + 0.5) / n))
    # Kolmogorov-Smirnov, p = .001; a stratified sample is at most one stratum away.
    assert distance < (1.0 / n + 1e-5 if stratified else 1.95 / np.sqrt(n))


def test_stratified_time_puts_one_example_in_each_stratum_at_every_position():
    config = TimeConfig(kind="uniform", stratified=True)
    t = np.asarray(times.sample_t(jax.random.key(1), (16, 3), config=config))
    np.testing.assert_array_equal(np.sort(np.floor(t * 16), axis=0)[:, 0], np.arange(16))
    np.testing.assert_array_equal(np.sort(np.floor(t * 16), axis=0)[:, 2], np.arange(16))
    # Each position has an order of its own, or frames of one example would share their t.
    assert np.any(np.floor(t[:, 0] * 16) != np.floor(t[:, 1] * 16))


def test_stratified_mean_varies_far_less_than_independent():
    def spread(stratified):
        config = TimeConfig(kind="uniform", stratified=stratified)
        keys = jax.random.split(jax.random.key(2), 256)
        return jnp.std(jax.vmap(lambda k: times.sample_t(k, (32,), config=config).mean())(keys))

    assert spread(True) < 0.1 * spread(False)


def test_shift_keeps_the_ends_and_has_its_inverse():
    t = np.linspace(0.0, 1.0, 11)
    shifted = times.shift_time(t, 5.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and np.all(shifted[1:-1] > t[1:-1])
    np.testing.assert_allclose(times.unshift_time(shifted, 5.0), t, atol=1e-15)


def test_shift_per_example_is_the_shift_of_each():
    key, shifts = jax.random.key(3), jnp.asarray([1.0, 2.0, 5.0])
    t = times.sample_t(key, (3,), config=UNIFORM, shift=shifts)
    for i, shift in enumerate((1.0, 2.0, 5.0)):
        alone = times.sample_t(key, (3,), config=UNIFORM, shift=shift)
        np.testing.assert_allclose(t[i], alone[i], rtol=1e-6)


def test_token_shift_is_sd3_square_root_law_between_its_anchors():
    config = TokenShift(tokens_lo=256, shift_lo=1.0, tokens_hi=4096, shift_hi=4.0)
    for tokens in (256, 576, 1024, 4096, 16384):
        shift = times.shift_for_tokens(tokens, config)
        np.testing.assert_allclose(shift, np.sqrt(tokens / 256))
    assert times.shift_for_tokens(16, config) == 1.0


def test_sampling_times_run_from_one_to_zero_exactly():
    t = times.sampling_times(7, shift=3.0)
    assert len(t) == 8 and t[0] == 1 and t[-1] == 0 and np.all(np.diff(t) < 0)
    np.testing.assert_allclose(np.diff(times.unshift_time(t, 3.0)), -1 / 7)


@pytest.mark.parametrize("num_steps", [4, 10])
def test_wan_times_equal_diffusers_unipc(num_steps):
    golden = np.load(GOLDENS)
    t = times.wan_times(num_steps, shift=3.0)
    np.testing.assert_array_equal(t.astype(np.float32), golden[f"unipc_{num_steps}/sigmas"])
    shown = np.round(times.truncate_times(t)[:-1] * 1000)
    np.testing.assert_array_equal(shown, golden[f"unipc_{num_steps}/timesteps"])


def test_flow_match_euler_times_equal_diffusers():
    t = times.flow_match_euler_times(10, shift=3.0)
    np.testing.assert_allclose(t, np.load(GOLDENS)["euler_10/sigmas"], rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: times.sampling_times(0), "num_steps 0 must be at least 1"),
        (lambda: times.wan_times(4, shift=0.0), "shift 0.0 is out of range; use 0.01 to 500"),
        (lambda: times.sampling_times(4, shift=float("inf")), "shift inf is out of range"),
        (lambda: times.sampling_times(4, shift=float("nan")), "shift nan is out of range"),
        (lambda: times.wan_official_times(4, shift=1e308), r"shift 1e\+308 is out of range"),
        (lambda: times.flow_match_euler_times(4, shift=1e-300), "shift 1e-300 is out of range"),
        (lambda: times.shift_for_tokens(0), "num_tokens 0 must be at least 1"),
        (lambda: TimeConfig(std=0.0), "time std 0.0 must be positive"),
        (lambda: TokenShift(tokens_lo=9, tokens_hi=9), "0 < tokens_lo < tokens_hi"),
        (lambda: TokenShift(shift_lo=2.0, shift_hi=1.0), "0 < shift_lo <= shift_hi"),
    ],
)
def test_bad_settings_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shift", [times.MIN_SHIFT, times.MAX_SHIFT])
@pytest.mark.parametrize("name", times.SCHEDULES)
def test_every_shift_that_is_taken_keeps_times_apart(name, shift):
    for steps in (1, 50, 1000):
        assert (np.diff(times.schedule(name, steps, shift=shift)[0]) < 0).all()


def test_schedules_by_name_are_those_of_the_functions():
    linear, told = times.schedule("linear", 5, shift=2.0)
    np.testing.assert_array_equal(linear, times.sampling_times(5, shift=2.0))
    np.testing.assert_array_equal(told, linear)
    wan, told = times.schedule("wan", 4, shift=3.0)
    # diffusers 0.42.1: timesteps 999, 900, 750, 500 of 1000.
    np.testing.assert_allclose(told, [0.999, 0.9, 0.75, 0.5, 0])
    np.testing.assert_allclose(wan, [1 - 1e-6, 0.9001, 0.7504, 0.501, 0], atol=1e-4)
    euler, told = times.schedule("flow_match_euler", 4, shift=3.0)
    np.testing.assert_array_equal(euler, times.flow_match_euler_times(4, shift=3.0))
    np.testing.assert_array_equal(told, euler)
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        times.schedule("liner", 4, shift=1.0)
