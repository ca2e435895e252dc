"""Every task of a video model as a mask: which tokens are given, and which are noise.

A given token is clean (t = 0) or lightly noised, the others are at the time t of their example,
and the loss counts these alone. To animate a picture is to be given the first frame; to extend a
clip, its beginning or its end; to inpaint, all but a box. The idea of a time for every token is
that of Wan 2.2's TI2V-5B and of diffusion forcing (Chen et al. 2024, arXiv:2407.01392); a mixture
of masks in training is Sora's way to "prompting with images and videos".

What decides a mask is drawn once for an example (`Draws`) and then worked out for each token from
its place, so that fixed batches and packed rows go the same way.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

# In this order: a mask is known by its number.
MASKS = (
    *("none", "first", "first_last", "keyframes", "prefix", "suffix", "middle", "loop"),
    *("box", "border", "tokens"),
)
FRAME_TIMES = "frame_times"  # beside the masks: some examples had a time for every latent frame
MOST_KEYFRAMES = 4
LOOP_ENDS = 2  # latent frames given at each end, so that motion is known there too
_DRAWS = 6  # uniform numbers that decide one mask


@dataclasses.dataclass(frozen=True)
class TaskMixture:
    """Shares of the masks in training.

    Attributes:
      weights: of the names in MASKS, in any unit; those left out are 0. "none" is text to video,
        or to an image. Masks in time are "none" for single images.
      given_noise: half of the examples have their given tokens noised up to this time, which
        makes a model forgive what was not given quite right; in [0, 1).
      frame_noise: share of the examples in which every latent frame has a time of its own
        (diffusion forcing).

    Raises:
      ValueError: an unknown mask, a weight below 0 or none above, or a share out of range.
    """

    weights: Mapping[str, float | int] = dataclasses.field(default_factory=lambda: {"none": 1.0})
    given_noise: float = 0.0
    frame_noise: float = 0.0

    def __post_init__(self):
        for name, weight in self.weights.items():
            if name not in MASKS:
                near = difflib.get_close_matches(name, MASKS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(MASKS)}."
                raise ValueError(f"config.tasks.weights.{name} is unknown; {hint}")
            if not weight >= 0:
                raise ValueError(f"config.tasks.weights.{name} {weight} is below 0.")
        if not sum(self.weights.values()) > 0:
            raise ValueError("config.tasks.weights are all 0; give 'none' 1 for text to video.")
        if not 0 <= self.given_noise < 1:
            raise ValueError(f"config.tasks.given_noise {self.given_noise} is not in [0, 1).")
        if not 0 <= self.frame_noise <= 1:
            raise ValueError(f"config.tasks.frame_noise {self.frame_noise} is not in [0, 1].")

    @classmethod
    def from_config(cls, section: Any | None) -> "TaskMixture":
        """Of `config.tasks`; None, of runs that are older than it, is text to video alone."""
        if section is None:
            return cls()
        fields = section.to_dict()
        return cls(dict(fields.pop("weights")), **fields)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the masks that occur, in the order of MASKS."""
        return tuple(name for name in MASKS if self.weights.get(name, 0) > 0)

    @property
    def recorded(self) -> tuple[str, ...]:
        """What a checkpoint says that it was trained for: `trained`, and FRAME_TIMES if so."""
        return self.trained + ((FRAME_TIMES,) if self.frame_noise > 0 else ())

    @property
    def is_plain(self) -> bool:
        """Nothing is ever given, and every example has one time."""
        return self.trained == ("none",) and self.frame_noise == 0


class Draws(NamedTuple):
    """What decides the mask of each example, or of each token's example."""

    mask: Int[Array, "*s"]  # number in MASKS
    u: Float[Array, "*s draws"]  # uniform in [0, 1)
    t_given: Float[Array, "*s"]  # time of given tokens
    by_frame: Bool[Array, "*s"]  # whether each frame has a time of its own


def draw(key: PRNGKeyArray | jax.Array, shape: tuple[int, ...], mixture: TaskMixture) -> Draws:
    """Draws of examples."""
    mask_key, u_key, noise_key, frame_key = jax.random.split(key, 4)
    weights = jnp.array([mixture.weights.get(name, 0) for name in MASKS], jnp.float32)
    noise = jax.random.uniform(noise_key, (2, *shape))
    return Draws(
        mask=jax.random.categorical(mask_key, jnp.log(weights), shape=shape),
        u=jax.random.uniform(u_key, (*shape, _DRAWS)),
        t_given=jnp.where(noise[0] < 0.5, mixture.given_noise * noise[1], 0.0),
        by_frame=jax.random.bernoulli(frame_key, mixture.frame_noise, shape),
    )


def _count(u: jax.Array, most: jax.Array) -> jax.Array:
    """Uniform in 1..max(most, 1)."""
    most = jnp.maximum(most, 1)
    return 1 + jnp.minimum(jnp.floor(u * most).astype(jnp.int32), most - 1)


def _span(u_size: jax.Array, u_begin: jax.Array, most: jax.Array, extent: jax.Array):
    """Begin and end of a run of 1 to `most` of `extent` places."""
    size = _count(u_size, most)
    begin = _count(u_begin, extent - size + 1) - 1
    return begin, begin + size


def given(
    draws: Draws,
    positions: Int[Array, "*s 3"],
    extents: Int[Array, "*s 3"],
    *,
    u_token: Float[Array, "*s"],
) -> Bool[Array, "*s"]:
    """Which tokens are given, each by the draws of its example.

    Args:
      positions: (time, row, column) of the token in its video.
      extents: frames, rows and columns of that video, in tokens.
      u_token: uniform, independent for each token.
    """
    p, f, u = positions[..., 0], extents[..., 0], draws.u
    begins = p < _count(u[..., 0], f - 1)
    ends = p >= f - _count(u[..., 0], f - 1)
    before = _count(u[..., 0], f - 2)
    after = _count(u[..., 1], f - 1 - before)
    frames = [p == _count(u[..., i], f) - 1 for i in range(MOST_KEYFRAMES)]
    how_many = _count(u[..., 4], jnp.full_like(f, MOST_KEYFRAMES))
    keyframes = sum(
        (frame & (i < how_many)).astype(jnp.int32) for i, frame in enumerate(frames)
    ).astype(bool)
    ends_of_loop = jnp.minimum(LOOP_ENDS, (f - 1) // 2)
    inside = jnp.ones_like(begins)
    for axis, (size, place) in ((1, (0, 1)), (2, (2, 3))):
        extent = extents[..., axis]
        # One row or column less than all, where there is more than one.
        lo, hi = _span(u[..., size], u[..., place], jnp.maximum(extent - 1, 1), extent)
        inside &= (positions[..., axis] >= lo) & (positions[..., axis] < hi)
    in_time = {
        "first": p == 0,
        "first_last": (p == 0) | (p == f - 1),
        "keyframes": keyframes,
        "prefix": begins,
        "suffix": ends,
        "middle": (p < before) | (p >= f - after),
        "loop": (p < ends_of_loop) | (p >= f - ends_of_loop),
    }
    by_name = {name: mask & (f > 1) for name, mask in in_time.items()} | {
        "none": jnp.zeros_like(begins),
        "box": ~inside,
        "border": inside,
        "tokens": u_token < u[..., 0],
    }
    chosen = [draws.mask == number for number in range(len(MASKS))]
    return jnp.select(chosen, [by_name[name] for name in MASKS], default=False)


class TokenTimes(NamedTuple):
    """Times of tokens in training, and which of them the loss counts."""

    t: Float[Array, "*s"]
    counted: Bool[Array, "*s"]


def token_times(
    draws: Draws,
    positions: Int[Array, "*s 3"],
    extents: Int[Array, "*s 3"],
    *,
    t: Float[Array, "*s"],
    t_frame: Float[Array, "*s"],
    u_token: Float[Array, "*s"],
) -> TokenTimes:
    """The time of each token under its example's mask.

    Args:
      positions, extents, u_token: as in `given`.
      t: time of the token's example.
      t_frame: time of the token's frame, where frames have their own.
    """
    kept = given(draws, positions, extents, u_token=u_token)
    return TokenTimes(jnp.where(kept, draws.t_given, jnp.where(draws.by_frame, t_frame, t)), ~kept)
