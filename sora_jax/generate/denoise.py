"""From noise to latents: the loop over steps, each one program that all videos of a kind share."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from sora_jax.diffusion import feature_cache, path, sampler, times
from sora_jax.diffusion import guidance as guidances
from sora_jax.diffusion.feature_cache import ChangeCurve
from sora_jax.dit.kv_cache import KV
from sora_jax.generate import conditions, given_kv
from sora_jax.generate.conditions import Conditions, Text, Tiles
from sora_jax.generate.experts import Experts
from sora_jax.generate.given_kv import GivenKV, Taken
from sora_jax.generate.request import Request
from sora_jax.generate.residual import Residual


class Moment(NamedTuple):
    """A video on its way: latents after a step, and before it."""

    x: Float[Array, "b f h w c"]
    before: Float[Array, "b f h w c"]
    times: tuple[float, float] | tuple[jax.Array, jax.Array]  # of both; of each frame (1 f 1 1 1)
    given: Conditions

    def guess(self, patch_size: Sequence[int]) -> Float[Array, "b f h w c"]:
        """The clean latents that the step headed for, given tokens as they were given."""
        t, t_before = self.times
        x0 = self.x - t / (t - t_before) * (self.x - self.before)
        if self.given.clean is None:
            return x0
        clean, keep = self.given.clean, self.given.keep
        return conditions.keep_clean(x0, clean, keep, patch_size=tuple(patch_size))


# Called after every step with the number of those so far that ran the transformer's blocks, and
# with how many will: all of them but for a cache, whose steps take no time to speak of.
OnStep = Callable[[int, int, Moment], None]
# Called with the time, and what the blocks added to the tokens, of every step that ran them.
OnResidual = Callable[[float, jax.Array], None]


def check_strength(strength: float | int) -> None:
    """Raises ValueError for a strength that keeps or changes nothing that can be."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength:g} is out of range; use more than 0, at most 1.")


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
    blocks: str  # "run"; "store": also give their residual; "reuse": take one in their place


class Denoiser:
    """Denoises latents with the transformers of a pipeline.

    Args:
      jit: compiles a function for the pipeline's mesh.
      curve: of the checkpoint, for requests with a `cache_threshold`.
      shards: that the mesh cuts tokens into.
    """

    def __init__(
        self,
        experts: Experts,
        jit: Callable[..., Callable],
        *,
        curve: ChangeCurve | None = None,
        shards: int = 1,
    ):
        self.experts, self.curve, self._jit = experts, curve, jit
        self._shards = shards
        self._step = functools.lru_cache(maxsize=16)(self._make_step)
        self._step_by_frame = functools.lru_cache(maxsize=4)(self._make_step_by_frame)

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
        on_residual: OnResidual | None = None,
    ) -> Float[Array, "b f h w c"]:
        """Latents of `request`, given tokens among them as they were given.

        Raises:
          ValueError: a strength out of range, or a `kv_cache` over tiles.
        """
        given_kv.check(request, tiles=tiles is not None)
        table, told = times.schedule(request.schedule, request.steps, shift=request.shift)
        first, x = 0, noise
        if start is not None:
            check_strength(start.strength)
            first = first_step(table, start.strength)
            x = path.interpolate(start.latents, noise, t=jnp.float32(table[first]))
        state = sampler.make_solver(lambda x, t: x, table[first:], solver=request.solver).init(x)
        computed, residual = self.computed(request, first=first), None
        # Where no step reuses, the program is the one without a cache, to the bit.
        run = "run" if computed.all() and on_residual is None else "store"
        regimes, kv = self._regimes(request, told, first), self.given_kv(request)
        kv.begin(given.keep)
        for i, runs in enumerate(computed, first):
            expert = self.experts.at(told[i])
            kind = _Kind(
                request.steps,
                request.shift,
                request.solver,
                request.schedule,
                first,
                self._guide(request, told, i),
                tiles,
                run if runs else "reuse",
            )
            if not self.experts.placed(expert):
                jax.block_until_ready(state.x)  # steps under way hold the other's memory
            of_given = kv.next(fresh=bool(regimes[i - first]), runs=bool(runs))
            step, before = self._step(kind), state.x
            params, taken = self.experts.params(expert), None if runs else residual
            state, (stored, own) = step(state, i - first, params, text, given, taken, of_given)
            residual = stored if runs else residual
            kv.store(own)
            del own  # or it would lie beside what the next step stores
            if on_residual is not None and runs:
                on_residual(float(told[i]), residual)
            if on_step is not None:
                jax.block_until_ready(state.x)
                moment = Moment(state.x, before, (float(table[i + 1]), float(table[i])), given)
                on_step(int(computed[: i - first + 1].sum()), int(computed.sum()), moment)
        if given.clean is None:
            return state.x
        patch = self.experts.parts[0].config.patch_size
        return conditions.keep_clean(state.x, given.clean, given.keep, patch_size=patch)

    def begin_by_frame(self, noise: Float[Array, "b f h w c"], request: Request) -> Any:
        """The solver's state, a tree of arrays shaped as `noise`, of frames that have not begun."""
        table, _ = times.schedule(request.schedule, request.steps, shift=request.shift)
        return sampler.make_solver(lambda x, t: x, table, solver=request.solver).init(noise)

    def step_by_frame(
        self,
        state: Any,
        progress: Int[np.ndarray, " f"],
        request: Request,
        text: Text,
        given: Conditions,
        *,
        of_given: Taken | None = None,
    ) -> tuple[Any, KV | None]:
        """One step in which every latent frame is at a step of its own.

        Args:
          state: of `begin_by_frame`; `state.x` are the latents.
          progress: the step that each frame is at. Below 0 it has not begun, from `request.steps`
            on it is finished: both stay as they are.
          given: beside the first transformer's other conditions, the frames that are finished.
          of_given: of a `given_kv`, which is told what is given back beside the state.
        """
        guide = request.guide(0)
        kind = _Kind(
            request.steps, request.shift, request.solver, request.schedule, 0, guide, None, "run"
        )
        step = self._step_by_frame(kind)
        return step(state, jnp.asarray(progress), self.experts.params(0), text, given, of_given)

    def given_kv(self, request: Request) -> GivenKV:
        """Of a video that has not begun."""
        return GivenKV(request.kv_cache, shards=self._shards)

    def times_by_frame(
        self, progress: Int[np.ndarray, " f"], request: Request
    ) -> tuple[Float[Array, "1 f 1 1 1"], Float[Array, "1 f 1 1 1"]]:
        """Times of frames after a step from `progress`, and before; (0, 1) where none was made."""
        table, _ = times.schedule(request.schedule, request.steps, shift=request.shift)
        at = np.clip(progress, 0, request.steps - 1)
        made = progress == at
        after, before = np.where(made, table[at + 1], 0.0), np.where(made, table[at], 1.0)
        return _by_frame(jnp.asarray(after)), _by_frame(jnp.asarray(before))

    def computed(self, request: Request, *, first: int = 0) -> Bool[np.ndarray, " s"]:
        """Which steps from `first` on run the blocks; the others reuse what the last one stored."""
        if not request.cache_threshold:
            return np.ones(request.steps - first, bool)
        _, told = times.schedule(request.schedule, request.steps, shift=request.shift)
        return feature_cache.computed_steps(
            self.curve,
            told[first : request.steps],
            threshold=request.cache_threshold,
            fresh=self._regimes(request, told, first),
        )

    def _regimes(self, request: Request, told: np.ndarray, first: int) -> Bool[np.ndarray, " s"]:
        """True at the steps from `first` on for which what one before stored is of no use.

        Another transformer stored it, or it is of other rows.
        """
        of = [
            (self.experts.at(told[i]), self._guide(request, told, i).needs_uncond)
            for i in range(first, request.steps)
        ]
        return np.array([True, *(a != b for a, b in itertools.pairwise(of))])

    def forwards(self, request: Request) -> int:
        """Forward passes of a transformer in a request's steps, where no step reuses another's."""
        _, told = times.schedule(request.schedule, request.steps, shift=request.shift)
        branches = [1 + self._guide(request, told, i).needs_uncond for i in range(request.steps)]
        return sum(branches) * sampler.num_evaluations(request.solver, 1)

    def _guide(self, request: Request, told: np.ndarray, i: int) -> guidances.GuidanceConfig:
        """Guidance of step i, at the times that it evaluates."""
        seen = told[i : i + sampler.num_evaluations(request.solver, 1)]
        return guidances.at_times(request.guide(self.experts.at(told[i])), seen)

    def _make_step(self, kind: _Kind):
        """The jitted step of the solver; kept, so that a second video compiles nothing."""
        table, told = times.schedule(kind.schedule, kind.steps, shift=kind.shift)
        table, told = table[kind.first :], told[kind.first :]

        @functools.partial(self._jit, stays=True)
        def step(state, i, params, text, given, taken, of_given):
            dit = self.experts.parts[0].module(params)
            residual = None if kind.blocks == "run" else Residual(taken)
            cache = None if of_given is None else of_given.cache()
            velocity = conditions.conditioned(
                dit,
                text,
                given,
                tiles=kind.tiles,
                residual=residual,
                guide=kind.guide,
                cache=cache,
            )
            guided = guidances.guided_velocity(velocity, config=kind.guide)
            solver = sampler.make_solver(guided, table, solver=kind.solver, model_times=told)
            state = solver.step(state, i)
            stored = None if residual is None else residual.stored
            if stored is not None and cache is not None:
                stored = cache.cut(stored)  # of the tokens that steps to come work on
            return state, (stored, None if cache is None else cache.stored)

        return step

    def _make_step_by_frame(self, kind: _Kind):
        table, told = times.schedule(kind.schedule, kind.steps, shift=kind.shift)

        @functools.partial(self._jit, stays=True)
        def step(state, progress, params, text, given, of_given):
            dit = self.experts.parts[0].module(params)
            cache = None if of_given is None else of_given.cache()
            velocity = conditions.conditioned(dit, text, given, guide=kind.guide, cache=cache)
            guided = guidances.guided_velocity(velocity, config=kind.guide)
            solver = sampler.make_solver(guided, table, solver=kind.solver, model_times=told)
            at = jnp.clip(progress, 0, kind.steps - 1)
            moved, under_way = solver.step(state, _by_frame(at)), _by_frame(progress == at)
            state = jax.tree.map(lambda new, old: jnp.where(under_way, new, old), moved, state)
            return state, None if cache is None else cache.stored

        return step


def _by_frame(values: Shaped[Array, " f"]) -> Shaped[Array, "1 f 1 1 1"]:
    """Values of frames, to go with latents (b, f, h, w, c)."""
    return values[None, :, None, None, None]


def first_step(table: Float[np.ndarray, " s"], strength: float) -> int:
    """The first step whose time is at most `strength`; the last step, where none is."""
    return min(int(np.argmax(table <= strength)), len(table) - 2)
