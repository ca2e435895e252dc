"""The straight path and its conversions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import path

SHAPE = (2, 3, 4, 5, 6)
T_SHAPES = [(), (2,), (2, 3), (2, 1, 4), (2, 3, 4, 5), (2, 3, 1, 1, 1)]


def _example(t_shape):
    x0_key, noise_key, t_key = jax.random.split(jax.random.key(0), 3)
    x0, noise = jax.random.normal(x0_key, SHAPE), jax.random.normal(noise_key, SHAPE)
    t = jax.random.uniform(t_key, t_shape, minval=0.2, maxval=0.8)
    return x0, noise, t, path.interpolate(x0, noise, t=t)


def test_path_ends_at_data_and_noise():
    x0, noise, _, _ = _example(())
    np.testing.assert_array_equal(path.interpolate(x0, noise, t=jnp.zeros(2)), x0)
    np.testing.assert_array_equal(path.interpolate(x0, noise, t=jnp.ones(2)), noise)


def test_velocity_is_the_time_derivative_of_the_path():
    x0, noise, t, _ = _example(())
    tangent = jax.jvp(lambda t: path.interpolate(x0, noise, t=t), (t,), (jnp.ones(()),))[1]
    np.testing.assert_allclose(path.velocity_target(x0, noise), tangent, atol=1e-6)


@pytest.mark.parametrize("t_shape", T_SHAPES)
def test_every_conversion_recovers_its_quantity(t_shape):
    x0, noise, t, x_t = _example(t_shape)
    velocity = path.velocity_target(x0, noise)
    pairs = [
        (path.x0_from_velocity(x_t, velocity, t=t), x0),
        (path.noise_from_velocity(x_t, velocity, t=t), noise),
        (path.velocity_from_x0(x_t, x0, t=t), velocity),
        (path.velocity_from_noise(x_t, noise, t=t), velocity),
        (path.x0_from_noise(x_t, noise, t=t), x0),
        (path.noise_from_x0(x_t, x0, t=t), noise),
    ]
    for got, wanted in pairs:
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_score_of_a_gaussian_is_its_closed_form():
    # x0 ~ N(0, v): E[velocity | x_t] = (t - (1 - t) v) / s x_t, score = -x_t / s.
    v, t = 0.3, jnp.asarray(0.7)
    x_t = jnp.linspace(-2.0, 2.0, 9)
    s = (1 - t) ** 2 * v + t**2
    velocity = (t - (1 - t) * v) / s * x_t
    np.testing.assert_allclose(path.score_from_velocity(x_t, velocity, t=t), -x_t / s, atol=1e-5)


def test_time_that_fits_no_axis_says_what_would():
    with pytest.raises(ValueError, match=r"t of shape \(3,\).*give t of shape \(\), \(2,\)"):
        path.expand_t(jnp.zeros(3), jnp.zeros(SHAPE))
