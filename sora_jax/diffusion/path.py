"""The straight path between data and noise, and every conversion along it.

Rectified flow (Liu et al. 2022, arXiv:2209.03003) and flow matching with the
optimal-transport path (Lipman et al. 2022, arXiv:2210.02747, Eq. 20-23 with sigma_min = 0),
time reversed: t = 0 is data, t = 1 is noise, and

    x_t = (1 - t) x0 + t noise        velocity = dx_t/dt = noise - x0

Any two of (x_t, x0, noise, velocity) give the others. Each function takes a `t` of fewer (or
as many) axes than x_t, aligned at the left: `()`, `b`, `b f`, `b f h w`, or `b f h w c`.
A division by t (or 1 - t) is not guarded: at the end where the quantity is not determined by
x_t, the result is inf or nan.
"""

from jaxtyping import Array, Float


def expand_t(t: Float[Array, "*t"], x: Float[Array, "*x"]) -> Float[Array, "*t_"]:
    """`t` with axes of length 1 added at the right until it has as many as `x`.

    Raises:
      ValueError: `t` does not broadcast against `x` axis by axis from the left.
    """
    fits = t.ndim <= x.ndim and all(
        n in (1, m) for n, m in zip(t.shape, x.shape[: t.ndim], strict=True)
    )
    if not fits:
        raise ValueError(
            f"t of shape {t.shape} does not broadcast against x of shape {x.shape} from the left; "
            f"give t of shape (), {x.shape[:1]} or {x.shape[:-1]}."
        )
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def interpolate(
    x0: Float[Array, "*x"], noise: Float[Array, "*x"], *, t: Float[Array, "*t"]
) -> Float[Array, "*x"]:
    """x_t = (1 - t) x0 + t noise (arXiv:2209.03003, Sec. 2.1, time reversed)."""
    t_ = expand_t(t, x0)
    return (1 - t_) * x0 + t_ * noise


def velocity_target(x0: Float[Array, "*x"], noise: Float[Array, "*x"]) -> Float[Array, "*x"]:
    """dx_t/dt = noise - x0, the same at every t."""
    return noise - x0


def x0_from_velocity(
    x_t: Float[Array, "*x"], velocity: Float[Array, "*x"], *, t: Float[Array, "*t"]
) -> Float[Array, "*x"]:
    """x0 = x_t - t velocity."""
    return x_t - expand_t(t, x_t) * velocity


def noise_from_velocity(
    x_t: Float[Array, "*x"], velocity: Float[Array, "*x"], *, t: Float[Array, "*t"]
) -> Float[Array, "*x"]:
    """noise = x_t + (1 - t) velocity."""
    return x_t + (1 - expand_t(t, x_t)) * velocity


def velocity_from_x0(
    x_t: Float[Array, "*x"], x0: Float[Array, "*x"], *, t: Float[Array, "*t"]
) -> Float[Array, "*x"]:
    """velocity = (x_t - x0) / t; not determined at t = 0."""
    return (x_t - x0) / expand_t(t, x_t)


def velocity_from_noise(
    x_t: Float[Array, "*x"], noise: Float[Array, "*x"], *, t: Float[Array, "*t"]
) -> Float[Array, "*x"]:
    """velocity = (noise - x_t) / (1 - t); not determined at t = 1."""
    return (noise - x_t) / (1 - expand_t(t, x_t))


def x0_from_noise(
    x_t: Float[Array, "*x"], noise: Float[Array, "*x"], *, t: Float[Array, "*t"]
) -> Float[Array, "*x"]:
    """x0 = (x_t - t noise) / (1 - t); not determined at t = 1."""
    t_ = expand_t(t, x_t)
    return (x_t - t_ * noise) / (1 - t_)


def noise_from_x0(
    x_t: Float[Array, "*x"], x0: Float[Array, "*x"], *, t: Float[Array, "*t"]
) -> Float[Array, "*x"]:
    """noise = (x_t - (1 - t) x0) / t; not determined at t = 0."""
    t_ = expand_t(t, x_t)
    return (x_t - (1 - t_) * x0) / t_


def score_from_velocity(
    x_t: Float[Array, "*x"], velocity: Float[Array, "*x"], *, t: Float[Array, "*t"]
) -> Float[Array, "*x"]:
    """grad log p_t(x_t) = -E[noise | x_t] / t = -(x_t + (1 - t) velocity) / t, t > 0."""
    return -noise_from_velocity(x_t, velocity, t=t) / expand_t(t, x_t)
