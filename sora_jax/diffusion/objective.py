"""The training loss, per example, and the least value it can have on Gaussian data."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sora_jax.diffusion import path
from sora_jax.types import Velocity


def flow_matching_loss(
    velocity: Velocity,
    x0: Float[Array, "b *x"],
    *,
    noise: Float[Array, "b *x"],
    t: Float[Array, "b *t"],
    weights: Float[Array, "b *w"] | None = None,
    mask: Float[Array, "b *m"] | Bool[Array, "b *m"] | None = None,
) -> Float[Array, " b"]:
    """Per-example rectified-flow loss (Liu et al. 2022, arXiv:2209.03003, Eq. 1, time reversed).

    The mean over latent positions and channels of weights |velocity - (noise - x0)|^2. `noise`
    and `t` are arguments so the function is deterministic; the batch is not averaged, so callers
    can weight it or bucket it by `t`.

    Args:
      velocity: predicts dx_t/dt from (x_t, t); receives `t` as it was given.
      x0: clean latents, normalised to unit variance, `b f h w c`.
      t: flow time in [0, 1], `b`, `b f`, `b f h w` or anything that broadcasts against x0 from
        the left: a t per latent position, for instance 0 on frames that are given.
      weights: multiplies the squared error; shaped like `t`. The mean is not divided by it.
      mask: the positions that count; shaped like `t`. The mean is over these alone, and 0 for an
        example that has none. A position at t = 0 says nothing about its noise: mask it out.
    """
    x_t = path.interpolate(x0, noise, t=t)
    error = velocity(x_t, t).astype(jnp.float32) - path.velocity_target(x0, noise)
    square = error.astype(jnp.float32) ** 2
    if weights is not None:
        square = path.expand_t(weights, square) * square
    axes = tuple(range(1, square.ndim))
    if mask is None:
        return jnp.mean(square, axis=axes)
    keep = jnp.broadcast_to(path.expand_t(mask.astype(jnp.float32), square), square.shape)
    # `where` and not a product: a masked position may hold inf without making the loss nan.
    total = jnp.sum(jnp.where(keep > 0, keep * square, 0.0), axis=axes)
    count = jnp.sum(keep, axis=axes)
    return total / jnp.where(count > 0, count, 1.0)


def bayes_velocity_mse(
    eigenvalues: Float[np.ndarray, " n"] | Float[Array, " n"],
    t: Float[np.ndarray, "*t"] | Float[Array, "*t"] | float,
) -> Float[np.ndarray, "*t"]:
    """Least velocity MSE per dimension at t, for Gaussian data with these covariance eigenvalues.

    Along an eigenvector of variance v, x_t has variance s = (1-t)^2 v + t^2, the target
    noise - x0 has variance 1 + v, and their covariance is t - (1-t) v; so the residual is
    1 + v - (t - (1-t) v)^2 / s = v / s, averaged here over the eigenvectors.

    Args:
      eigenvalues: of the covariance of x0, in any order, non-negative.
      t: flow time in [0, 1].
    """
    t_ = np.asarray(t, np.float64)[..., None]
    v = np.asarray(eigenvalues, np.float64).reshape((1,) * (t_.ndim - 1) + (-1,))
    return np.asarray(np.mean(v / ((1 - t_) ** 2 * v + t_**2), axis=-1))


def mean_bayes_velocity_mse(
    eigenvalues: Float[np.ndarray, " n"] | Float[Array, " n"],
) -> float:
    """`bayes_velocity_mse` averaged over uniform t: (pi / 2) mean(sqrt(v)).

    Since the integral over [0, 1] of v / ((1-t)^2 v + t^2) is sqrt(v) pi / 2 for every v > 0.
    """
    return float(np.pi / 2 * np.mean(np.sqrt(np.asarray(eigenvalues, np.float64))))
