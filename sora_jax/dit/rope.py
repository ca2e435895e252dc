"""Rotary position embedding over time, height and width (Su et al. 2021, arXiv:2104.09864).

Each head's channels split into three runs, one per axis; within a run the channels form
adjacent pairs (2i, 2i + 1), turned by position * theta^(-2i / run). Weights have them adjacent,
`apply` takes them apart.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

THETA = 1e4
# Positions of up to this size get angles that are right to about 1e-6.
MAX_POSITION = 4096


def split(head_dim: int) -> tuple[int, int, int]:
    """Channels given to time, height and width: Wan's 2 * (head_dim // 6) for each side."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def frequencies(head_dim: int) -> np.ndarray:
    """Radians per position for every channel pair, float64 (head_dim // 2,)."""
    runs = [THETA ** -(np.arange(0, run, 2) / run) for run in split(head_dim)]
    return np.concatenate(runs)


def rotation(
    positions: Int[Array, "*batch n 3"], head_dim: int
) -> tuple[Float[Array, "*batch n e2"], Float[Array, "*batch n e2"]]:
    """Cosine and sine of every pair's angle, for any positions in [0, MAX_POSITION].

    A float32 product position * frequency is off by 1e-4 at position 1000, so angles are
    counted in turns: the frequency's leading 12 bits times the position is exact, whole
    turns are dropped exactly, and only then the rest of the frequency is added.
    """
    turns = frequencies(head_dim) / (2 * np.pi)
    mantissa, exponent = np.frexp(turns)
    leading = np.ldexp(np.round(np.ldexp(mantissa, 12)), exponent - 12)
    rest = (turns - leading).astype(np.float32)
    axis = np.repeat(np.arange(3), [run // 2 for run in split(head_dim)])
    lead_shape = (1,) * (positions.ndim - 1)
    position = positions.astype(jnp.float32)[..., axis]
    turned = position * leading.astype(np.float32).reshape(*lead_shape, -1)
    turned = turned - jnp.round(turned) + position * rest.reshape(*lead_shape, -1)
    angle = 2 * np.pi * turned
    return jnp.cos(angle), jnp.sin(angle)


def pairs_apart(columns: Float[Array, "*batch d"], head_dim: int) -> Float[Array, "*batch d"]:
    """Reorders each head's channels: the first of every pair, then the second of every pair.

    Of a projection's columns, so that `apply` turns halves and not neighbours, which lie in one
    register of an accelerator. Queries and keys reordered alike have the same products.
    """
    pairs = columns.reshape(*columns.shape[:-1], -1, head_dim // 2, 2)
    return pairs.swapaxes(-1, -2).reshape(columns.shape)


def apply(
    x: Float[Array, "b n k e"],
    cos: Float[Array, "#b n e2"],
    sin: Float[Array, "#b n e2"],
) -> Float[Array, "b n k e"]:
    """Turns every channel pair of `x` by its angle, in float32; pairs stand apart."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
