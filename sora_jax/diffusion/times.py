"""Where t is drawn in training and which t a sampler visits.

Every distribution and schedule ends in the same map, `shift_time`, which spends more of [0, 1]
on noise the more tokens an example has (Esser et al. 2024, arXiv:2403.03206, Eq. 23).
"""

import dataclasses
import difflib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

# Of a schedule; beyond them its times are no longer apart, the more steps the sooner.
MIN_SHIFT, MAX_SHIFT = 0.01, 500.0


@dataclasses.dataclass(frozen=True)
class TimeConfig:
    """Training distribution of t before the shift.

    Attributes:
      kind: "uniform" on [0, 1], or "logit_normal": t = sigmoid(mean + std N(0, 1))
        (arXiv:2403.03206, Eq. 19).
      mean: of the logit; positive favours noise.
      std: of the logit; positive.
      stratified: give each example of the batch its own 1/b of the distribution's mass. Each t
        keeps its distribution, and the batch covers it evenly, which lowers the variance of the
        loss over t (the aim of Kingma et al. 2021, arXiv:2107.00630, App. I.1; here by jittered
        strata in random order, so any part of the batch is a fair sample as well).
    """

    kind: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    stratified: bool = True

    def __post_init__(self):
        if self.kind not in ("uniform", "logit_normal"):
            raise ValueError(
                f"time kind {self.kind!r} is unknown; use 'uniform' or 'logit_normal'."
            )
        if not self.std > 0:
            raise ValueError(f"time std {self.std} must be positive; SD3's value is 1.0.")


@dataclasses.dataclass(frozen=True)
class TokenShift:
    """Shift as a function of the number of video tokens: a line in sqrt(tokens).

        shift(n) = shift_lo + (shift_hi - shift_lo) (sqrt n - sqrt lo) / (sqrt hi - sqrt lo)

    held at shift_lo below `tokens_lo` (a line continued towards 0 tokens could turn negative) and
    continued above `tokens_hi`. With shift_lo = 1 and shift_hi = sqrt(hi / lo) this is exactly
    the sqrt(m / n) of SD3 (arXiv:2403.03206, Eq. 23). Equal shifts give a constant.
    """

    tokens_lo: int = 256
    shift_lo: float = 1.0
    tokens_hi: int = 4096
    shift_hi: float = 4.0

    def __post_init__(self):
        if not 0 < self.tokens_lo < self.tokens_hi:
            raise ValueError(
                f"tokens_lo {self.tokens_lo} and tokens_hi {self.tokens_hi} must satisfy "
                "0 < tokens_lo < tokens_hi; change one of them."
            )
        if not 0 < self.shift_lo <= self.shift_hi:
            raise ValueError(
                f"shift_lo {self.shift_lo} and shift_hi {self.shift_hi} must satisfy "
                "0 < shift_lo <= shift_hi; more tokens need at least as much shift."
            )

    @classmethod
    def constant(cls, shift: float) -> "TokenShift":
        """The same shift for any number of tokens."""
        return cls(shift_lo=shift, shift_hi=shift)


NO_SHIFT = TokenShift.constant(1.0)


def shift_time(t, shift):
    """t -> shift t / (1 + (shift - 1) t): maps [0, 1] onto itself, 1 changes nothing.

    Args:
      t: flow time, any array or float.
      shift: positive; above 1 moves mass towards noise. Broadcasts against t.
    """
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t, shift):
    """Inverse of `shift_time`."""
    return shift_time(t, 1 / shift)


def shift_for_tokens(
    num_tokens: int | Int[Array, "*s"], config: TokenShift = TokenShift()
) -> float | Float[Array, "*s"]:
    """The shift of `TokenShift`'s line for examples of `num_tokens` video tokens, at least 1.

    Raises:
      ValueError: for a number below 1; an array is not checked.
    """
    xp = jnp if isinstance(num_tokens, jax.Array) else np
    if xp is np and num_tokens < 1:
        raise ValueError(f"num_tokens {num_tokens} must be at least 1.")
    lo, hi = np.sqrt(config.tokens_lo), np.sqrt(config.tokens_hi)
    fraction = xp.maximum(0.0, (xp.sqrt(num_tokens) - lo) / (hi - lo))
    shift = config.shift_lo + fraction * (config.shift_hi - config.shift_lo)
    return float(shift) if xp is np else shift


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...], stratified: bool) -> Array:
    if not stratified:
        return jax.random.uniform(key, shape)
    order_key, jitter_key = jax.random.split(key)
    ranks = jnp.arange(shape[0], dtype=jnp.float32).reshape((-1,) + (1,) * (len(shape) - 1))
    # Strata run along the batch alone, in an order of its own for each trailing position.
    ranks = jax.random.permutation(
        order_key, jnp.broadcast_to(ranks, shape), axis=0, independent=True
    )
    return (ranks + jax.random.uniform(jitter_key, shape)) / shape[0]


def sample_t(
    key: PRNGKeyArray | jax.Array,
    shape: tuple[int, ...],
    *,
    config: TimeConfig = TimeConfig(),
    shift: float | Float[Array, "*s"] = 1.0,
) -> Float[Array, "*t"]:
    """Flow times in [0, 1] for training, float32.

    Args:
      key: consumed.
      shape: `(b,)`, or `(b, f)` and so on for a t per latent position; the batch comes first.
      shift: from `shift_for_tokens`; an array must have as many axes as `shape`.
    """
    return from_uniform(_uniform(key, shape, config.stratified), config=config, shift=shift)


def from_uniform(
    u: Float[Array, "*t"],
    *,
    config: TimeConfig = TimeConfig(),
    shift: float | Float[Array, "*s"] = 1.0,
) -> Float[Array, "*t"]:
    """Flow times at the quantiles `u`, in (0, 1), of what `sample_t` draws from."""
    if config.kind == "logit_normal":
        u = jax.nn.sigmoid(config.mean + config.std * jax.scipy.special.ndtri(u))
    return shift_time(u, shift)


def _check_steps(num_steps: int, shift: float) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be at least 1.")
    if not MIN_SHIFT <= shift <= MAX_SHIFT:
        raise ValueError(
            f"shift {shift} is out of range; use {MIN_SHIFT:g} to {MAX_SHIFT:g}: 1 is none, Wan "
            "uses 3 for 480p."
        )


def sampling_times(num_steps: int, *, shift: float = 1.0) -> Float[np.ndarray, " s"]:
    """`num_steps + 1` times from exactly 1 to exactly 0, equally spaced before the shift.

    Float64 on the host: solvers work their coefficients out from it before anything is traced.
    """
    _check_steps(num_steps, shift)
    return shift_time(np.linspace(1.0, 0.0, num_steps + 1), shift)


def wan_times(num_steps: int, *, shift: float = 3.0) -> Float[np.ndarray, " s"]:
    """The schedule Wan's weights are published with, that of diffusers' UniPC with flow sigmas.

        s = linspace(1, 1/1000, num_steps + 1) without its last;  t = shift s / (1 + (shift - 1) s)

    then 0; the first is 1 - 1e-6 and not 1, which this package's solvers do not need but which
    makes a trajectory equal to diffusers', together with `truncate_times`.
    """
    _check_steps(num_steps, shift)
    s = np.linspace(1.0, 1e-3, num_steps + 1)[:-1]
    times = np.append(shift_time(s, shift), 0.0)
    times[0] -= 1e-6
    return times


def flow_match_euler_times(num_steps: int, *, shift: float = 3.0) -> Float[np.ndarray, " s"]:
    """The schedule of diffusers' FlowMatchEuler, which applies the shift twice at the low end.

    shift_time of linspace(1, shift_time(1/1000), num_steps), then 0. The model sees these times
    as they are.
    """
    _check_steps(num_steps, shift)
    s = np.linspace(1.0, shift_time(1e-3, shift), num_steps)
    return np.append(shift_time(s, shift), 0.0)


def wan_official_times(num_steps: int, *, shift: float) -> Float[np.ndarray, " s"]:
    """Times of the official Wan code's UniPC, which begin at 1 - 1/1000, shifted.

    shift_time of linspace(.999, 0, num_steps + 1). The model sees them cut to integers.
    """
    _check_steps(num_steps, shift)
    return shift_time(np.linspace(0.999, 0.0, num_steps + 1), shift)


SCHEDULES = ("linear", "wan", "wan_official", "flow_match_euler")


def schedule(
    name: str, num_steps: int, *, shift: float
) -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, " s"]]:
    """(times, the times that the model is told) of a schedule by name.

    "linear" is `sampling_times`. "wan" is what diffusers' UniPC does with Wan's weights, integer
    timesteps included, and "flow_match_euler" what its FlowMatchEuler does: with them a video
    equals the one that diffusers makes from the same noise. "wan_official" is the official code's,
    with its UniPC.

    Raises:
      ValueError: an unknown name, or steps or shift out of range.
    """
    if name == "linear":
        times = sampling_times(num_steps, shift=shift)
        return times, times
    if name == "wan":
        times = wan_times(num_steps, shift=shift)
        return times, truncate_times(times)
    if name == "wan_official":
        times = wan_official_times(num_steps, shift=shift)
        return times, truncate_times(times)
    if name == "flow_match_euler":
        times = flow_match_euler_times(num_steps, shift=shift)
        return times, times
    near = difflib.get_close_matches(name, SCHEDULES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"schedule {name!r} is unknown; use one of {', '.join(SCHEDULES)}.{hint}")


def truncate_times(times: Float[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
    """The t that diffusers' UniPC shows the model: t * 1000 cut to an integer, over 1000.

    Pass the result for `wan_times` as `model_times` to `sampler.sample` to repeat a diffusers
    trajectory. Four steps at shift 3 give .999, .9, .75, .5, 0.
    """
    # Not rounded first: a product that falls an ulp short of an integer is cut there too.
    return np.floor(times * 1000) / 1000
