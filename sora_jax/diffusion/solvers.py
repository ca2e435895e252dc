"""ODE solvers for dx/dt = velocity(x, t) from t = 1 (noise) to t = 0 (data), step by step.

Each solver is a pair of pure functions, `init(x) -> state` and `step(state, i) -> state`, made
for one table of times. Every coefficient is worked out on the host in float64 before anything
is traced; a step reads row i, so one program serves all steps, under scan or in a Python loop.
`i` may also be an array that broadcasts against x: then parts of x are at steps of their own, and
the velocity is told times of the same shape.

`dpmpp_2m` and `unipc` are exponential integrators in the log signal-to-noise ratio
lambda = log((1 - t) / t), in which a step from time c to n < c with x0-prediction D held is

    x_n = (n / c) x_c + (1 - n / c) D

(Lu et al. 2022, arXiv:2211.01095, Eq. 9 with alpha = 1 - t, sigma = t): finite, although lambda
is -inf at t = 1 and +inf at t = 0. The second-order terms hold ratios of lambda's steps. After a
step from t = 1 that ratio is 0, and would throw the slope of D away; D is taken as linear in t
there and integrated exactly. Into t = 0 the ratio is infinite, and the step is first order. So
nothing is clipped and no nan arises.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.types import Velocity

Table = np.ndarray  # float64, one row a step (or a time)


class Solver(NamedTuple):
    """A solver made for one velocity and one table of times; `state.x` is always x at step i."""

    init: Callable[[jax.Array], Any]
    step: Callable[[Any, jax.Array | int], Any]
    num_steps: int


class OneStepState(NamedTuple):
    x: jax.Array


class MultistepState(NamedTuple):
    x: jax.Array
    previous: jax.Array  # the last step's velocity (ab2) or x0-prediction (dpmpp_2m)


class UniPCState(NamedTuple):
    x: jax.Array
    x_last: jax.Array  # corrected x that the last step started from
    x0_last: jax.Array  # x0-prediction of the last step
    x0_before: jax.Array  # and of the one before


def _at(table: Table, i: jax.Array | int, x: jax.Array) -> jax.Array:
    return jnp.asarray(table, x.dtype)[i]


def _evaluate(velocity: Velocity, x: jax.Array, t: jax.Array) -> jax.Array:
    # The state's precision is the solver's own: a bfloat16 model must not round the trajectory.
    return velocity(x, t).astype(x.dtype)


def _step_ratios(h: Table) -> Table:
    """h_i / h_{i-1}, with 0 (no second-order term) at i = 0."""
    ratios = np.zeros_like(h)
    ratios[1:] = h[1:] / h[:-1]
    return ratios


def euler(velocity: Velocity, times: Table, model_times: Table) -> Solver:
    """Euler's method: order 1, one velocity evaluation a step."""
    h = np.diff(times)

    def step(state: OneStepState, i: jax.Array | int) -> OneStepState:
        x = state.x
        return OneStepState(x + _at(h, i, x) * _evaluate(velocity, x, _at(model_times, i, x)))

    return Solver(OneStepState, step, len(h))


def heun(velocity: Velocity, times: Table, model_times: Table) -> Solver:
    """Heun's method (explicit trapezoid; Karras et al. 2022, arXiv:2206.00364, Alg. 1): order 2,
    two velocity evaluations a step, the last of them at t = 0.
    """
    h = np.diff(times)

    def step(state: OneStepState, i: jax.Array | int) -> OneStepState:
        x, h_i = state.x, _at(h, i, state.x)

        def stage(slope: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
            slope = _evaluate(velocity, x + j * h_i * slope, _at(model_times, i + j, x))
            return slope, slope

        # Scanned, so that the model is compiled once and not twice.
        _, slopes = jax.lax.scan(stage, jnp.zeros_like(x), jnp.arange(2))
        return OneStepState(x + h_i * jnp.mean(slopes, axis=0))

    return Solver(OneStepState, step, len(h))


def ab2(velocity: Velocity, times: Table, model_times: Table) -> Solver:
    """Adams-Bashforth of second order for unequal steps: order 2, one evaluation a step.

    x += h (v + h / (2 h_prev) (v - v_prev)); the first step is Euler's, whose local error is
    second order once, which keeps the global order (Hairer, Norsett & Wanner 1993, III.5).
    """
    h = np.diff(times)
    weight = _step_ratios(h) / 2

    def init(x: jax.Array) -> MultistepState:
        return MultistepState(x, jnp.zeros_like(x))

    def step(state: MultistepState, i: jax.Array | int) -> MultistepState:
        x, previous = state
        v = _evaluate(velocity, x, _at(model_times, i, x))
        slope = v + _at(weight, i, x) * (v - previous)
        return MultistepState(x + _at(h, i, x) * slope, v)

    return Solver(init, step, len(h))


def _log_snr_steps(times: Table) -> Table:
    """Steps of lambda = log((1 - t) / t); infinite from t = 1 and into t = 0."""
    with np.errstate(divide="ignore"):
        log_snr = np.log1p(-times) - np.log(times)
    return np.diff(log_snr)


def _inner_ratios(times: Table) -> Table:
    """h_i / h_{i-1} in lambda, 0 at the first step and, where its limit is infinite, the last."""
    h = _log_snr_steps(times)
    ratios = np.zeros_like(h)
    ratios[1:-1] = h[1:-1] / h[:-2]  # 0 after a step from t = 1, whose h is infinite
    return ratios


def _extrapolation_weights(times: Table) -> Table:
    """Weight of (D_i - D_{i-1}) in the prediction from times[i]: h_i / (2 h_{i-1}).

    Where h_{i-1} is infinite (times[i-1] = 1), D is linear in t instead of lambda. Since
    d(x / t) = -D dt / t^2, a step from c to n adds n times the integral of (t - c) / t^2 over
    [n, c], which is n log(c / n) - (c - n), times D's slope (D_i - D_{i-1}) / (c - 1).
    """
    weights = _inner_ratios(times) / 2
    if times[0] == 1 and len(times) > 3:
        c, n = times[1], times[2]
        weights[1] = (n * np.log(c / n) - (c - n)) / ((1 - n / c) * (c - 1))
    return weights


def dpmpp_2m(velocity: Velocity, times: Table, model_times: Table) -> Solver:
    """DPM-Solver++(2M) (arXiv:2211.01095, Alg. 2) in flow form: order 2, one evaluation a step.

    First order at the first and the last step. On times spaced evenly up to t = 1 and t = 0,
    lambda's steps near the ends do not shrink with their number, and the error falls as
    log(n) / n^2: a measured order of 1.8 to 1.9.
    """
    keep = times[1:] / times[:-1]
    weight = _extrapolation_weights(times)

    def init(x: jax.Array) -> MultistepState:
        return MultistepState(x, jnp.zeros_like(x))

    def step(state: MultistepState, i: jax.Array | int) -> MultistepState:
        x, previous = state
        x0 = x - _at(times, i, x) * _evaluate(velocity, x, _at(model_times, i, x))
        guess = x0 + _at(weight, i, x) * (x0 - previous)
        return MultistepState(_at(keep, i, x) * x + _at(1 - keep, i, x) * guess, x0)

    return Solver(init, step, len(keep))


def _corrector_weights(times: Table) -> tuple[Table, Table]:
    """UniC's weights of (D_{i-1} - D_{i-2}) and (D_i - D_{i-1}) for the step into times[i].

    arXiv:2302.04867, Eq. 5 and 9 with B(h) = expm1(-h) ("bh2"): with z = -h and r = -h_prev / h,
    rho solves rho_1 + rho_2 = b_1 and r rho_1 + rho_2 = b_2, and the weights are rho_1 / -r and
    rho_2. Order 1 (one half of the last difference) at i = 1; unused at i = 0.
    """
    h, ratio = _log_snr_steps(times)[1:-1], _inner_ratios(times)[1:-1]
    older, newer = np.zeros(len(times) - 1), np.full(len(times) - 1, 0.5)
    # Cancellation for small z costs float64 about 1e-16 / z^2, out of sight above z = 1e-5.
    z = -h
    phi_2 = np.expm1(z) / z - 1
    b_1 = phi_2 / np.expm1(z)
    b_2 = 2 * (phi_2 / z - 0.5) / np.expm1(z)
    rho_1 = (b_1 - b_2) * ratio / (1 + ratio)
    older[2:], newer[2:] = rho_1 * ratio, b_1 - rho_1
    return older, newer


def unipc(velocity: Velocity, times: Table, model_times: Table) -> Solver:
    """UniPC-2 with B(h) = expm1(-h) on x0-predictions (Zhao et al. 2023, arXiv:2302.04867).

    One evaluation a step: what step i evaluates at the predicted x first corrects that x (the
    corrector, UniC-2), then predicts the next one (UniP-2, which is DPM-Solver++(2M)). Order 3
    where the steps in lambda shrink towards both ends; order 2 on evenly spaced times, where
    the first-order steps from t = 1 and into t = 0 set the error.
    """
    keep = times[1:] / times[:-1]
    weight = _extrapolation_weights(times)
    keep_last = np.append(1.0, keep[:-1])  # row 0 leaves x as it is: nothing to correct yet
    older, newer = _corrector_weights(times)

    def init(x: jax.Array) -> UniPCState:
        return UniPCState(x, x, jnp.zeros_like(x), jnp.zeros_like(x))

    def step(state: UniPCState, i: jax.Array | int) -> UniPCState:
        x, x_last, x0_last, x0_before = state
        x0 = x - _at(times, i, x) * _evaluate(velocity, x, _at(model_times, i, x))
        guess = x0_last + _at(older, i, x) * (x0_last - x0_before)
        guess = guess + _at(newer, i, x) * (x0 - x0_last)
        x_now = _at(keep_last, i, x) * x_last + _at(1 - keep_last, i, x) * guess
        guess = x0 + _at(weight, i, x) * (x0 - x0_last)
        x_next = _at(keep, i, x) * x_now + _at(1 - keep, i, x) * guess
        return UniPCState(x_next, x_now, x0, x0_last)

    return Solver(init, step, len(keep))


SOLVERS: dict[str, Callable[[Velocity, Table, Table], Solver]] = {
    "euler": euler,
    "heun": heun,
    "ab2": ab2,
    "unipc": unipc,
    "dpmpp_2m": dpmpp_2m,
}

# Velocity evaluations a step, for comparing solvers at equal cost.
EVALUATIONS = {"euler": 1, "heun": 2, "ab2": 1, "unipc": 1, "dpmpp_2m": 1}
