"""Encoding and decoding in overlapping tiles of height and width; no parameters.

Approximate: a tile sees zeros beyond its border, and the attention of the middle block only
the tile. The overlaps are blended linearly, so that larger tiles and overlaps come nearer to
the whole result. In time nothing is cut: each tile runs in chunks, which is exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sora_jax.types import Latents, Video
from sora_jax.vae.model import Moments, VideoVAE, check_video_shape
from sora_jax.vae.streaming import decode_chunked, encode_chunked

Pair = tuple[int, int]


def encode_tiled(
    vae: VideoVAE, video: Video, *, tile: Pair, overlap: Pair, chunk: int = 1
) -> Moments:
    """Approximates `vae.encode_moments(video)` in tiles.

    Args:
      tile: height and width of a tile, in latents; cut to the video's.
      overlap: latents that neighbours share, height and width; below tile.
      chunk: latent frames at a time.

    Raises:
      ValueError: for a video, tile or overlap that does not fit.
    """
    check_video_shape(vae.config, *video.shape[1:4])
    scale = vae.config.scale_factor_spatial
    size = (video.shape[2] // scale, video.shape[3] // scale)

    def run(x):
        return encode_chunked(vae, x, chunk=chunk)

    return _blend_tiles(run, video, size, tile, overlap, in_scale=scale, out_scale=1)


def decode_tiled(
    vae: VideoVAE, latents: Latents, *, tile: Pair, overlap: Pair, chunk: int = 1
) -> Video:
    """Approximates `vae.decode(latents)` in tiles; arguments and errors as `encode_tiled`."""
    scale = vae.config.scale_factor_spatial
    size = latents.shape[2:4]

    def run(x):
        return decode_chunked(vae, x, chunk=chunk)

    return _blend_tiles(run, latents, size, tile, overlap, in_scale=1, out_scale=scale)


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of one axis begin; the last is moved back to end with the axis.

    Raises:
      ValueError: for an overlap that leaves no progress, or a tile below 1.
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise ValueError(
            f"tile {tile} with overlap {overlap}: a tile needs 1 latent or more and an overlap "
            f"from 0 to {max(tile - 1, 0)}."
        )
    return [*range(0, size - tile, tile - overlap), max(size - tile, 0)]


def _ramp(tile: int, overlap: int) -> np.ndarray:
    """Weights of a tile along one axis: 1 inside, falling linearly over the overlaps."""
    inside = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 0.5
    return np.minimum(inside / max(overlap, 0.5), 1.0).astype(np.float32)


def _blend_tiles(
    run: Callable,
    x: jax.Array,
    size: Pair,
    tile: Pair,
    overlap: Pair,
    *,
    in_scale: int,
    out_scale: int,
):
    """Weighted mean, over the tiles of `x`, of `run(tile)`; sizes are in latents.

    One scan over all tiles: they have one shape, so `run` is compiled once.
    """
    starts = [_starts(*axis) for axis in zip(size, tile, overlap, strict=True)]
    tile = (min(tile[0], size[0]), min(tile[1], size[1]))
    ramps = [_ramp(t * out_scale, o * out_scale) for t, o in zip(tile, overlap, strict=True)]
    weight = np.outer(*ramps)
    total = np.zeros([n * out_scale for n in size], np.float32)
    corners = np.array([(top, left) for top in starts[0] for left in starts[1]], np.int32)
    for top, left in corners * out_scale:
        total[top : top + weight.shape[0], left : left + weight.shape[1]] += weight

    def cut(corner):
        shape = (*x.shape[:2], tile[0] * in_scale, tile[1] * in_scale, x.shape[4])
        top, left = corner[0] * in_scale, corner[1] * in_scale
        return lax.dynamic_slice(x, (0, 0, top, left, 0), shape)

    def add(sums, corner):
        top, left = corner[0] * out_scale, corner[1] * out_scale

        def one(total, y):
            at = (0, 0, top, left, 0)
            before = lax.dynamic_slice(total, at, y.shape)
            return lax.dynamic_update_slice(total, before + y * _plane(weight), at)

        return jax.tree.map(one, sums, run(cut(corner))), None

    shapes = jax.eval_shape(run, jax.eval_shape(cut, corners[0]))
    zeros = jax.tree.map(
        lambda y: jnp.zeros((*y.shape[:2], *total.shape, y.shape[4]), y.dtype), shapes
    )
    sums, _ = lax.scan(add, zeros, corners)
    return jax.tree.map(lambda y: y / _plane(total), sums)


def _plane(weight: np.ndarray) -> jax.Array:
    return jnp.asarray(weight)[None, None, :, :, None]
