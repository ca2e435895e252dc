"""From noise to latents: the loop over steps, each one program that all videos of a kind share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.diffusion import guidance as guidances
from sora_jax.diffusion import path, sampler, times
from sora_jax.generate import conditions
from sora_jax.generate.conditions import Conditions, Text, Tiles
from sora_jax.generate.experts import Experts
from sora_jax.generate.request import Request

# Called with the number of denoising steps done, their total, and the noisy latents.
OnStep = Callable[[int, int, jax.Array], None]


class Start(NamedTuple):
    """Latents to begin from instead of noise alone (SDEdit, Meng et al. 2022, arXiv:2108.01073).

    `strength` in (0, 1] is the time up to which they are noised: 1 keeps nothing of them.
    """

    latents: Float[Array, "b f h w c"]
    strength: float


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What one compiled step depends on, shapes apart."""

    steps: int
    shift: float
    solver: str
    schedule: str
    first: int  # the step that denoising begins with
    guide: guidances.GuidanceConfig
    tiles: Tiles | None


class Denoiser:
    """Denoises latents with the transformers of a pipeline.

    Args:
      jit: compiles a function for the pipeline's mesh.
    """

    def __init__(self, experts: Experts, jit: Callable[[Callable], Callable]):
        self.experts, self._jit = experts, jit
        self._step = functools.lru_cache(maxsize=16)(self._make_step)

    def __call__(
        self,
        noise: Float[Array, "b f h w c"],
        request: Request,
        text: Text,
        given: Conditions,
        *,
        start: Start | None = None,
        tiles: Tiles | None = None,
        on_step: OnStep | None = None,
    ) -> Float[Array, "b f h w c"]:
        """Latents of `request`, given tokens among them as they were given."""
        table, told = times.schedule(request.schedule, request.steps, shift=request.shift)
        first, x = 0, noise
        if start is not None:
            first = first_step(table, start.strength)
            x = path.interpolate(start.latents, noise, t=jnp.float32(table[first]))
        state = sampler.make_solver(lambda x, t: x, table[first:], solver=request.solver).init(x)
        for i in range(first, request.steps):
            expert = self.experts.at(told[i])
            seen = told[i : i + (2 if request.solver == "heun" else 1)]
            kind = _Kind(
                request.steps,
                request.shift,
                request.solver,
                request.schedule,
                first,
                guidances.at_times(request.guide(expert), seen),
                tiles,
            )
            if not self.experts.placed(expert):
                jax.block_until_ready(state.x)  # steps under way hold the other's memory
            step = self._step(kind)
            state = step(state, i - first, self.experts.params(expert), text, given)
            if on_step is not None:
                jax.block_until_ready(state.x)
                on_step(i - first + 1, request.steps - first, state.x)
        if given.clean is None:
            return state.x
        patch = self.experts.parts[0].config.patch_size
        return conditions.keep_clean(state.x, given.clean, given.keep, patch_size=patch)

    def _make_step(self, kind: _Kind):
        """The jitted step of the solver; kept, so that a second video compiles nothing."""
        table, told = times.schedule(kind.schedule, kind.steps, shift=kind.shift)
        table, told = table[kind.first :], told[kind.first :]

        @self._jit
        def step(state, i, params, text, given):
            dit = self.experts.parts[0].module(params)
            velocity = conditions.conditioned(dit, text, given, tiles=kind.tiles)
            guided = guidances.guided_velocity(velocity, config=kind.guide)
            return sampler.make_solver(guided, table, solver=kind.solver, model_times=told).step(
                state, i
            )

        return step


def first_step(table: Float[np.ndarray, " s"], strength: float) -> int:
    """The first step whose time is at most `strength`; the last step, where none is."""
    return min(int(np.argmax(table <= strength)), len(table) - 2)
