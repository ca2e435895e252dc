"""A transformer over more than it was trained on: its velocity on overlapping tiles, blended.

In space this is tiled refinement, in time the joint denoising of windows (Bar-Tal et al. 2023,
arXiv:2302.08113, Eq. 5): at every step each latent takes the mean of what the tiles say that hold
it, weighted by a ramp that falls towards a tile's sides.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.types import Latents

Size = tuple[int, int, int]


def begins(extent: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `extent` and share `overlap` places, or more at the end."""
    if extent <= tile:
        return [0]
    last = extent - tile
    return [*range(0, last, max(tile - overlap, 1)), last]


def ramp(tile: int) -> Float[np.ndarray, " tile"]:
    """Weights along an axis: highest in the middle, nowhere 0."""
    places = np.arange(tile)
    return np.minimum(places + 1, tile - places).astype(np.float32)


def blended(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    x: Latents,
    t: Float[Array, "b f h w"],
    *,
    tile: Size,
    overlap: Size,
) -> Latents:
    """`velocity(x, t)` of each tile of latents, blended over all.

    Args:
      velocity: of a tile's latents and their times (b, f', h', w').
      t: time of every latent position.
      tile: frames, rows and columns of latents; more than there are is all.
    """
    alone = lambda part, times, _: (velocity(part, times), None)  # noqa: E731
    return blended_with(alone, x, t, None, tile=tile, overlap=overlap)[0]


def blended_with(
    velocity: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    x: Latents,
    t: Float[Array, "b f h w"],
    given: Any,
    *,
    tile: Size,
    overlap: Size,
    channels: int | None = None,
) -> tuple[Float[Array, "b f h w made"], Any]:
    """As `blended`, of a velocity that also takes, and gives, something of each tile.

    Args:
      given: a tree of arrays, tiles first, or None; so is what is given back.
      channels: that `velocity` gives, where these are not as many as those of `x`.
    """
    tile = tuple(min(a, b) for a, b in zip(tile, x.shape[1:4], strict=True))
    axes = [begins(*sizes) for sizes in zip(x.shape[1:4], tile, overlap, strict=True)]
    places = jnp.array(list(itertools.product(*axes)))
    f, h, w = (ramp(size) for size in tile)
    weight = jnp.asarray(f[:, None, None] * h[None, :, None] * w[None, None, :])[None, ..., None]
    count = x.shape[0]

    def add(total, each):
        (sums, weights), (place, own) = total, each
        at = (0, *place, 0)
        part = jax.lax.dynamic_slice(x, at, (count, *tile, x.shape[-1]))
        times = jax.lax.dynamic_slice(t, at[:-1], (count, *tile))
        part, made = velocity(part, times, own)
        fresh = part.astype(sums.dtype) * weight
        old = jax.lax.dynamic_slice(sums, at, fresh.shape)
        sums = jax.lax.dynamic_update_slice(sums, old + fresh, at)
        old = jax.lax.dynamic_slice(weights, at, weight.shape)
        return (sums, jax.lax.dynamic_update_slice(weights, old + weight, at)), made

    made_shape = (*x.shape[:-1], channels or x.shape[-1])
    empty = jnp.zeros(made_shape, x.dtype), jnp.zeros((1, *x.shape[1:4], 1), x.dtype)
    (sums, weights), made = jax.lax.scan(add, empty, (places, given))
    return sums / weights, made
