"""Samples by integrating any velocity function over a table of times: scanned, or step by step.

The solvers themselves are in `solvers.py`; the tables come from `times.py`. Nothing here knows
of models, guidance or text: those are inside `velocity`.
"""

import difflib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.diffusion.solvers import EVALUATIONS, SOLVERS, Solver
from sora_jax.types import Velocity

Times = Float[np.ndarray, " s"] | Float[Array, " s"]
ModelTimes = Float[np.ndarray, " r"] | Float[Array, " r"]  # r = s, or s - 1


def num_evaluations(solver: str, num_steps: int) -> int:
    """How many times `solver` calls the velocity in `num_steps` steps."""
    _check_name(solver)
    return EVALUATIONS[solver] * num_steps


def make_solver(
    velocity: Velocity,
    times: Times,
    *,
    solver: str = "unipc",
    model_times: ModelTimes | None = None,
) -> Solver:
    """The named solver for this velocity and these times, as `init` and `step`.

    Args:
      velocity: (x, t) -> dx/dt of x's shape; t is a scalar array of x's dtype.
      times: strictly falling within [0, 1], at least two; concrete, not traced.
      solver: a name in `solvers.SOLVERS`.
      model_times: the t that `velocity` is given in place of `times`, entry by entry (the last,
        which only "heun" uses, may be left out otherwise). A model trained on integer timesteps
        needs it to repeat its reference (`times.truncate_times`).

    Raises:
      ValueError: unknown solver, or unusable times.
    """
    _check_name(solver)
    table = _check_times(times)
    model_table = table
    if model_times is not None:
        model_table = np.asarray(model_times, np.float64)
        needed = len(table) if solver == "heun" else len(table) - 1
        if model_table.ndim != 1 or not needed <= len(model_table) <= len(table):
            raise ValueError(
                f"model_times of shape {model_table.shape} does not match {len(table)} times; "
                f"give {needed} or {len(table)} entries."
            )
    return SOLVERS[solver](velocity, table, model_table)


def sample(
    velocity: Velocity,
    noise: Float[Array, "*x"],
    times: Times,
    *,
    solver: str = "unipc",
    model_times: ModelTimes | None = None,
    return_trajectory: bool = False,
) -> Float[Array, "*x"] | Float[Array, "s *x"]:
    """Integrates dx/dt = velocity(x, t) from x = noise at times[0] to times[-1], as one scan.

    Pure and jit-able, with `times` fixed at trace time. The state is kept in float32 (float64
    for float64 noise) whatever the model computes in.

    Args:
      velocity: (x, t) -> dx/dt of x's shape; t is a scalar.
      noise: x at times[0].
      times: as for `make_solver`, for instance `times.sampling_times(50, shift=3.0)`.
      solver: "euler", "ab2", "unipc" and "dpmpp_2m" evaluate the velocity once a step,
        "heun" twice.
      model_times: as for `make_solver`.
      return_trajectory: return x at every time, noise first, instead of the last alone.
    """
    made = make_solver(velocity, times, solver=solver, model_times=model_times)

    def body(state: Any, i: jax.Array) -> tuple[Any, jax.Array | None]:
        state = made.step(state, i)
        return state, state.x if return_trajectory else None

    x = _as_state(noise)
    state, trajectory = jax.lax.scan(body, made.init(x), jnp.arange(made.num_steps))
    return jnp.concatenate([x[None], trajectory]) if return_trajectory else state.x


def sample_steps(
    velocity: Velocity,
    noise: Float[Array, "*x"],
    times: Times,
    *,
    operands: tuple = (),
    solver: str = "unipc",
    model_times: ModelTimes | None = None,
) -> Iterator[Float[Array, "*x"]]:
    """As `sample`, but a Python loop that yields x after each step (for a progress bar).

    One step is jitted once a call and used for all; to reuse a program between calls, jit
    `make_solver(...).step` yourself.

    Args:
      operands: arrays that the velocity needs beside (weights, text): it is called as
        velocity(x, t, *operands). Passed here they are inputs of the program; closed over they
        would be constants inside it.
    """

    def bind(operands: tuple) -> Solver:
        return make_solver(
            lambda x, t: velocity(x, t, *operands), times, solver=solver, model_times=model_times
        )

    made = bind(operands)
    step = jax.jit(lambda state, i, operands: bind(operands).step(state, i))
    return _iterate(step, made.init(_as_state(noise)), made.num_steps, operands)


def _iterate(step: Any, state: Any, num_steps: int, operands: tuple) -> Iterator[jax.Array]:
    # Apart from `sample_steps`, so that bad arguments raise at the call, not at the first step.
    for i in range(num_steps):
        state = step(state, i, operands)
        yield state.x


def _as_state(noise: jax.Array) -> jax.Array:
    return noise.astype(jnp.promote_types(noise.dtype, jnp.float32))


def _check_name(solver: str) -> None:
    if solver in SOLVERS:
        return
    near = difflib.get_close_matches(solver.lower(), SOLVERS, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"solver {solver!r} is unknown; use one of {', '.join(SOLVERS)}.{hint}")


def _check_times(times: Times) -> np.ndarray:
    if isinstance(times, jax.core.Tracer):
        raise ValueError(
            "times is traced; close over it or mark it static, because the solvers' "
            "coefficients are worked out from it before tracing."
        )
    table = np.asarray(times, np.float64)
    if table.ndim != 1 or len(table) < 2:
        raise ValueError(f"times has shape {table.shape}; give at least two values in one axis.")
    if not (np.all(np.diff(table) < 0) and table[-1] >= 0 and table[0] <= 1):
        raise ValueError(
            f"times from {table[0]:g} to {table[-1]:g} must fall strictly from at most 1 (noise) "
            "to at least 0 (data); use times.sampling_times."
        )
    return table
