"""The flow-matching loss and the Bayes loss of Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import objective, path

SHAPE = (3, 2, 4, 5, 6)


def _pair(shape=SHAPE):
    x0_key, noise_key = jax.random.split(jax.random.key(0))
    return jax.random.normal(x0_key, shape), jax.random.normal(noise_key, shape)


def test_exact_velocity_gives_zero_loss():
    x0, noise = _pair()
    t = jnp.asarray([0.0, 0.4, 1.0])
    loss = objective.flow_matching_loss(lambda x, t: noise - x0, x0, noise=noise, t=t)
    np.testing.assert_array_equal(loss, np.zeros(3))


def test_loss_is_each_examples_mean_square_error_at_its_own_x_t():
    x0, noise = _pair()
    t = jnp.asarray([0.1, 0.5, 0.9])
    loss = objective.flow_matching_loss(lambda x, t: 2 * x, x0, noise=noise, t=t)
    for i in range(3):
        x_t = (1 - t[i]) * x0[i] + t[i] * noise[i]
        np.testing.assert_allclose(loss[i], np.mean((2 * x_t - (noise - x0)[i]) ** 2), rtol=1e-5)


def test_loss_is_float32_for_a_bfloat16_model():
    x0, noise = _pair()
    t = jnp.full(3, 0.5)
    model = lambda x, t: x.astype(jnp.bfloat16)  # noqa: E731
    assert objective.flow_matching_loss(model, x0, noise=noise, t=t).dtype == jnp.float32


@pytest.mark.parametrize("t_shape", [(3, 2), (3, 2, 4, 5), (3, 1, 4)])
def test_time_per_position_reaches_the_model_as_given(t_shape):
    x0, noise = _pair()
    t = jax.random.uniform(jax.random.key(1), t_shape)
    seen = []

    def velocity(x, t):
        seen.append(t.shape)
        return path.noise_from_velocity(x, noise - x0, t=t) - x0

    loss = objective.flow_matching_loss(velocity, x0, noise=noise, t=t)
    assert seen == [t_shape]
    np.testing.assert_allclose(loss, np.zeros(3), atol=1e-10)


def test_masked_positions_do_not_reach_loss_or_gradient():
    x0, noise = _pair()
    t = jnp.full((3, 2), 0.5)
    mask = jnp.asarray([[True, False], [True, True], [False, False]])

    def loss(scale):
        return objective.flow_matching_loss(lambda x, t: x * scale, x0, noise=noise, t=t, mask=mask)

    square = np.asarray((0.5 * (x0 + noise) - (noise - x0)) ** 2)
    wanted = [square[0, 0].mean(), square[1].mean(), 0.0]
    np.testing.assert_allclose(loss(jnp.ones(SHAPE)), wanted, rtol=1e-5)
    gradient = jax.grad(lambda s: loss(s).sum())(jnp.ones(SHAPE))
    np.testing.assert_array_equal(gradient[0, 1], 0)
    np.testing.assert_array_equal(gradient[2], 0)
    assert np.all(np.asarray(gradient[0, 0]) != 0)


def test_inf_at_a_masked_position_leaves_the_loss_finite():
    x0, noise = _pair()
    mask = jnp.asarray([[1.0, 0.0]] * 3)
    model = lambda x, t: x.at[:, 1].set(jnp.inf)  # noqa: E731
    loss = objective.flow_matching_loss(model, x0, noise=noise, t=jnp.full(3, 0.5), mask=mask)
    assert np.all(np.isfinite(loss))


def test_weights_multiply_the_loss():
    x0, noise = _pair()
    t, weights = jnp.asarray([0.1, 0.5, 0.9]), jnp.asarray([0.0, 1.0, 3.0])
    model = lambda x, t: x  # noqa: E731
    plain = objective.flow_matching_loss(model, x0, noise=noise, t=t)
    weighted = objective.flow_matching_loss(model, x0, noise=noise, t=t, weights=weights)
    np.testing.assert_allclose(weighted, weights * plain, rtol=1e-6)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_bayes_loss_is_reached_by_the_exact_velocity_and_by_no_other_slope(t):
    # Diagonal Gaussian data, one eigenvalue a channel; 20 000 examples put the standard
    # error of the mean at .6 %.
    eigenvalues = np.asarray([0.05, 0.6, 2.5])
    n = 20_000
    x0, noise = _pair((n, 3))
    v = jnp.asarray(eigenvalues, jnp.float32)[None]
    x0 = x0 * jnp.sqrt(v)
    slope = (t - (1 - t) * v) / ((1 - t) ** 2 * v + t**2)
    loss = lambda slope: objective.flow_matching_loss(  # noqa: E731
        lambda x, t: slope * x, x0, noise=noise, t=jnp.full(n, t)
    ).mean()
    bayes = objective.bayes_velocity_mse(eigenvalues, t)
    np.testing.assert_allclose(loss(slope), bayes, rtol=0.02)
    assert loss(slope + 0.3) > 1.01 * bayes and loss(slope - 0.3) > 1.01 * bayes


def test_mean_bayes_loss_is_the_integral_over_uniform_t():
    eigenvalues = np.asarray([0.01, 0.3, 1.0, 7.0])
    t = (np.arange(20_000) + 0.5) / 20_000
    integral = objective.bayes_velocity_mse(eigenvalues, t).mean()
    np.testing.assert_allclose(objective.mean_bayes_velocity_mse(eigenvalues), integral, rtol=1e-6)
