"""Classifier-free guidance: combines a conditional and an unconditional velocity.

Ho & Salimans 2022 (arXiv:2207.12598), with the guidance interval of Kynkaanniemi et al. 2024
(arXiv:2404.07724) and the rescale of Lin et al. 2023 (arXiv:2305.08891, Sec. 3.4).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sora_jax.types import Velocity


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """How strongly a sampler follows the prompt, and when.

    Attributes:
      scale: 1 is the conditional velocity alone, 0 the unconditional; Wan uses 5.
      interval: (lo, hi) in flow time; outside it the conditional velocity is used as it is.
        Guidance near t = 1 costs variety, near t = 0 it does nothing (arXiv:2404.07724).
      rescale: in [0, 1]; how far the guided velocity's standard deviation is brought back to the
        conditional one's, against over-saturation at large scales.
      blocks: of the transformer, counted from 0, in which frames of the unconditional branch do
        not see each other. What moves wrongly is then likelier without the prompt than with it,
        and is steered away from: spatiotemporal skip guidance (Hyung et al. 2024,
        arXiv:2411.18664), for models whose attention is over space and time at once, and without
        a further evaluation, for it is the branch that there is. Whoever makes the velocity sees
        to it, by `frames_apart`.
      blocks_interval: (lo, hi) in flow time, between which that is so.
    """

    scale: float = 5.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    blocks: tuple[int, ...] = ()
    blocks_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        for name, (lo, hi) in (("", self.interval), ("blocks' ", self.blocks_interval)):
            if not 0 <= lo <= hi <= 1:
                raise ValueError(
                    f"guidance {name}interval ({lo}, {hi}) must satisfy 0 <= lo <= hi <= 1 "
                    "(t = 0 data, t = 1 noise); (0, 1) is everywhere."
                )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale {self.rescale} must lie in [0, 1]; 0 is none.")
        if any(block < 0 for block in self.blocks) or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(
                f"guidance blocks {self.blocks} must be different numbers from 0; () is none."
            )

    @property
    def needs_uncond(self) -> bool:
        """False where guidance changes nothing, so half of the model's work can be saved."""
        return self.scale != 1.0 and self.interval[0] < self.interval[1]

    @property
    def apart(self) -> tuple[int, ...]:
        """`blocks`, where there is an unconditional branch."""
        return self.blocks if self.needs_uncond else ()


def of_config(sample: Any) -> GuidanceConfig:
    """Of a run's `config.sample`; runs from before there were blocks name none."""
    return GuidanceConfig(
        scale=float(sample.guidance),
        interval=tuple(sample.guidance_interval),
        rescale=sample.guidance_rescale,
        blocks=tuple(sample.get("guidance_blocks", ())),
        blocks_interval=tuple(sample.get("guidance_blocks_interval", (0.0, 1.0))),
    )


def at_times(config: GuidanceConfig, times: Float[np.ndarray, " r"]) -> GuidanceConfig:
    """What `config` comes to where t is one of `times` alone, its intervals left out.

    A sampler that knows the times of a step compiles the steps outside the interval without the
    unconditional half of the batch.
    """
    guided, apart = (
        [bool(lo <= t <= hi) for t in times] for lo, hi in (config.interval, config.blocks_interval)
    )
    if all(apart) or not any(apart):
        blocks = config.blocks if all(apart) else ()
        config = dataclasses.replace(config, blocks_interval=(0.0, 1.0), blocks=blocks)
    if all(guided) or not any(guided):
        scale = config.scale if all(guided) else 1.0
        config = dataclasses.replace(config, interval=(0.0, 1.0), scale=scale)
    return config


def frames_apart(
    config: GuidanceConfig, t: Float[Array, ""] | Float[Array, " f"], *, rows: int
) -> tuple[tuple[int, ...], Bool[Array, "rows #f"]] | None:
    """Blocks and, of a doubled batch at time t, the frames that see only themselves there.

    Args:
      t: of all frames of patches, or of each.
      rows: of the doubled batch, whose second half has no prompt.

    Returns:
      What the transformer takes as `frames_apart`; None where there are no such frames.
    """
    if not config.apart:
        return None
    lo, hi = config.blocks_interval
    inside = jnp.atleast_1d((t >= lo) & (t <= hi))
    return config.apart, (jnp.arange(rows) >= rows // 2)[:, None] & inside[None]


def combine(
    cond: Float[Array, "*x"], uncond: Float[Array, "*x"], *, scale: float | Float[Array, ""]
) -> Float[Array, "*x"]:
    """uncond + scale (cond - uncond) (arXiv:2207.12598, Eq. 6 with w = scale - 1)."""
    return uncond + scale * (cond - uncond)


def rescale_to(
    guided: Float[Array, "b *x"], cond: Float[Array, "b *x"], *, amount: float
) -> Float[Array, "b *x"]:
    """Brings each example's standard deviation back to the conditional one's.

    amount * guided std(cond) / std(guided) + (1 - amount) * guided, the standard deviations over
    everything but the batch (arXiv:2305.08891, Eq. 15 and 16).
    """
    axes = tuple(range(1, guided.ndim))
    std_cond = jnp.std(cond, axis=axes, keepdims=True)
    std_guided = jnp.std(guided, axis=axes, keepdims=True)
    # A constant prediction has nothing to rescale: keep it instead of dividing 0 by 0.
    factor = jnp.where(std_guided > 0, std_cond / jnp.where(std_guided > 0, std_guided, 1.0), 1.0)
    return guided * (amount * factor + (1 - amount))


def guide(
    cond: Float[Array, "b *x"],
    uncond: Float[Array, "b *x"],
    *,
    t: Float[Array, "*t"],
    config: GuidanceConfig,
) -> Float[Array, "b *x"]:
    """One velocity out of two at time t: scale, rescale and interval of `config`.

    `t` is a scalar, or broadcasts against the velocities. It may be traced: the interval is a
    `where`, so a scan over steps keeps one program.
    """
    guided = combine(cond, uncond, scale=config.scale)
    if config.rescale > 0:
        guided = rescale_to(guided, cond, amount=config.rescale)
    lo, hi = config.interval
    return jnp.where((t >= lo) & (t <= hi), guided, cond)


def guided_velocity(velocity: Velocity, *, config: GuidanceConfig) -> Velocity:
    """Turns a velocity over a doubled batch into a guided velocity over the batch.

    Args:
      velocity: (x_t of 2b examples, t) -> velocities of 2b examples, the first b with the prompt
        and the last b without (or with the negative prompt). Where `config.needs_uncond` is
        false it is called on the b examples with the prompt alone.

    Returns:
      (x_t of b examples, t) -> velocity of b examples. `t` is as for `guide`.
    """

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        if not config.needs_uncond:
            return velocity(x, t)
        cond, uncond = jnp.split(velocity(jnp.concatenate([x, x]), t), 2)
        return guide(cond, uncond, t=t, config=config)

    return guided
