"""The loss of packed rows: every clip of a row has a time, a caption and a loss of its own."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sora_jax.data.packing import PADDING_SEGMENT
from sora_jax.diffusion import objective

WEIGHTS = ("clip", "token")


class PackedText(NamedTuple):
    """Texts of a row one after the other: ids (b, l), or embeddings (b, l, d).

    A segment has one, or with a time-stamped caption several.
    """

    values: Int[Array, "b l"] | Float[Array, "b l d"]
    segment_ids: Int[Array, "b l"]

    @property
    def mask(self) -> Bool[Array, "b l"]:
        return self.segment_ids != PADDING_SEGMENT


def segment_sizes(
    segment_ids: Int[Array, "b n"],
    num_segments: int,
    *,
    counted: Bool[Array, "b n"] | None = None,
) -> Int[Array, "b s"]:
    """Tokens of each segment of a row, or those that are counted; 0 for those not there."""
    member = _membership(segment_ids, num_segments)
    member = member if counted is None else member * counted[:, :, None]
    return jnp.sum(member, axis=1).astype(jnp.int32)


def spread(values: Float[Array, "b s"], segment_ids: Int[Array, "b n"]) -> Float[Array, "b n"]:
    """A value of every segment to each of its tokens; 0 on padding."""
    there = segment_ids != PADDING_SEGMENT
    return jnp.where(there, jnp.take_along_axis(values, jnp.maximum(segment_ids, 0), axis=1), 0)


def of_texts(
    chosen: Bool[Array, "b s"], segment_ids: Int[Array, "b n"], text_of_tokens: Int[Array, "b n"]
) -> Bool[Array, "b s"]:
    """The texts of the segments that are chosen: those that their tokens follow."""
    tokens = spread(chosen.astype(jnp.float32), segment_ids)
    follow = _membership(text_of_tokens, chosen.shape[1])
    return jnp.einsum("bn,bns->bs", tokens, follow) > 0


def drop_captions(
    text: PackedText,
    positions: Int[Array, "b l"],
    drop: Bool[Array, "b s"],
    *,
    empty: Int[Array, " e"] | Float[Array, "e d"],
) -> PackedText:
    """Puts the empty caption in the place of those that are dropped.

    Args:
      positions: place of every token in its caption.
      drop: which of the texts.
      empty: the empty caption, of at most as many tokens as the shortest caption has.
    """
    dropped = spread(drop.astype(jnp.float32), text.segment_ids) > 0
    kept = positions < len(empty)
    trailing = (1,) * (text.values.ndim - 2)
    values = jnp.where(
        (dropped & kept).reshape(*dropped.shape, *trailing),
        empty[jnp.minimum(positions, len(empty) - 1)],
        text.values,
    )
    segment_ids = jnp.where(dropped & ~kept, PADDING_SEGMENT, text.segment_ids)
    return PackedText(values, segment_ids)


def segment_losses(
    velocity: Callable[[jax.Array], jax.Array],
    x0: Float[Array, "b n p"],
    *,
    noise: Float[Array, "b n p"],
    t: Float[Array, "b n"],
    segment_ids: Int[Array, "b n"],
    num_segments: int,
    counted: Bool[Array, "b n"] | None = None,
) -> Float[Array, "b s"]:
    """Rectified-flow loss of each segment, equal to `flow_matching_loss` of it alone.

    Args:
      velocity: of noisy tokens (b, n, p); it knows their times.
      t: flow time of each token.
      counted: the tokens that the means are over; None: all. 0 for a segment that has none.
    """
    b, n, p = x0.shape

    def of_tokens(x_t, _):
        return velocity(x_t.reshape(b, n, p)).reshape(b * n, p)

    per_token = objective.flow_matching_loss(
        of_tokens, x0.reshape(b * n, p), noise=noise.reshape(b * n, p), t=t.reshape(b * n)
    ).reshape(b, n)
    # `where` and not a product: what padding gets has no meaning, and may not be finite.
    real = segment_ids != PADDING_SEGMENT
    real = real if counted is None else real & counted
    member = _membership(segment_ids, num_segments) * real[:, :, None]
    total = jnp.einsum("bn,bns->bs", jnp.where(real, per_token, 0), member)
    return total / jnp.maximum(jnp.sum(member, axis=1), 1)


def mean_over_segments(
    losses: Float[Array, "b s"], sizes: Int[Array, "b s"], *, weight: str
) -> Float[Array, ""]:
    """Mean over all segments of a batch, or over all tokens.

    Raises:
      ValueError: a weight that is not one of WEIGHTS.
    """
    if weight not in WEIGHTS:
        raise ValueError(f"config.data.pack_weight {weight!r}: use one of {', '.join(WEIGHTS)}.")
    counts = (sizes > 0 if weight == "clip" else sizes).astype(jnp.float32)
    return jnp.sum(losses * counts) / jnp.maximum(jnp.sum(counts), 1)


def _membership(segment_ids: Int[Array, "b n"], num_segments: int) -> Float[Array, "b n s"]:
    numbers = jnp.arange(num_segments, dtype=segment_ids.dtype)[None, None]
    return (segment_ids[:, :, None] == numbers).astype(jnp.float32)
