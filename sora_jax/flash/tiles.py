"""Cutting queries and keys into tiles, and which of them meet: shared by both passes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sora_jax.blocked_attention import Keys

LANES, SUBLANES = 128, 8
BLOCK = 1024  # queries or keys of a tile, at most
BACKWARD_BLOCK = 512  # queries of a tile of the backward pass
# At most, of 128 channels in 16 bits: their blocks have to fit in fast memory twice.
TILES_A_STEP = 16
_STEP_COST = 0.5  # of a tile: what a step of the grid takes beside its own
# Tokens: what a tile takes beside its own. Of as many logits, tiles of 768 take up to 15 % more
# instruction words than those of 1024, of 640 up to 46 % (tools/kernel_cycles.py).
_TILE_COST = 128
# Queries whose gradients are held at a time: 16 MiB of float32 at 128 channels a head.
BACKWARD_QUERIES = 32_768
VMEM_BYTES = 48 * 2**20  # of the 64 MiB that the smallest has
LOG2_E = math.log2(math.e)  # powers of two are what the hardware computes
# Segment of the tokens that fill a tile; no caller's id, not even -1 for padding.
_FILL = np.iinfo(np.int32).min


def block(length: int, largest: int | None = None) -> int:
    """Tokens of a tile: equal tiles of whole lanes, large ones, of which little is filled up.

    Args:
      largest: in place of BLOCK.
    """
    largest = largest or BLOCK
    fewest = -(-length // largest)
    sizes = [(tiles, round_up(-(-length // tiles), LANES)) for tiles in range(fewest, 2 * fewest)]
    return min(sizes, key=lambda tiles_size: tiles_size[0] * (tiles_size[1] + _TILE_COST))[1]


def query_scale(head_dim: int) -> float:
    """What queries are multiplied with, so that logits are exponents of two."""
    return head_dim**-0.5 * LOG2_E


def part_of(step, size: int, steps: int):
    """The tile within its block."""
    return slice(None) if steps == 1 else pl.ds(pl.multiple_of(step * size, size), size)


def visit_shared(visit, scalars, b, outer, inner, steps: int) -> None:
    """visit(step, masked) the tiles of a block that share a segment with tile `outer`.

    Masked is a tile unless it has one segment alone.
    """

    def one(step, _):
        if not scalars:
            visit(step, False)
            return 0
        index = inner * steps + step
        lo, hi, other_lo, other_hi, _, _ = scalars
        lo_, hi_ = lo[b, outer], hi[b, outer]
        other_lo_, other_hi_ = other_lo[b, index], other_hi[b, index]
        shared = (lo_ <= other_hi_) & (other_lo_ <= hi_)
        alone = (lo_ == hi_) & (other_lo_ == other_hi_)

        @pl.when(shared & alone)
        def _():
            visit(step, False)

        @pl.when(shared & jnp.logical_not(alone))
        def _():
            visit(step, True)

        return 0

    if steps == 1:
        one(0, 0)
    else:
        jax.lax.fori_loop(0, steps, one, 0)


def segments_of(ids, other_ids, tile: tuple[int, int], steps: int) -> tuple[jax.Array, ...]:
    """Of the tiles of `ids`: least and largest id, of the others' too; first and last block shared.

    Args:
      steps: tiles of the others that make a block.
    """
    ids, other = (
        x.reshape(x.shape[0], -1, size) for x, size in zip((ids, other_ids), tile, strict=True)
    )
    lo, hi, other_lo, other_hi = ids.min(2), ids.max(2), other.min(2), other.max(2)
    shared = (lo[:, :, None] <= other_hi[:, None]) & (other_lo[:, None] <= hi[:, :, None])
    first = jnp.argmax(shared, axis=2)
    last = jnp.where(shared.any(2), shared.shape[2] - 1 - jnp.argmax(shared[:, :, ::-1], 2), first)
    found = (lo, hi, other_lo, other_hi, first // steps, last // steps)
    return tuple(x.astype(jnp.int32) for x in found)


def tiles_a_step(tiles: int, *, row_bytes: int = 2 * LANES) -> int:
    """Tiles of a step of the grid: few steps, and few tiles that only fill up the last one.

    Args:
      row_bytes: of a token's channels in a block.
    """
    most = max(1, min(tiles, TILES_A_STEP * 2 * LANES // row_bytes))
    return min(range(1, most + 1), key=lambda steps: -(-tiles // steps) * (steps + _STEP_COST))


def row_bytes(channels: int, dtype: str) -> int:
    """Of a token's channels, filled up to whole lanes."""
    return round_up(channels, LANES) * jnp.dtype(dtype).itemsize


def near(index, scalars, b, outer):
    """`index`, or the nearest that shares a segment with tile `outer`: nothing else is read."""
    if not scalars:
        return index
    return jnp.clip(index, scalars[4][b, outer], scalars[5][b, outer])


def prepare(q, q_ids, keys: Keys, dtype: str, *, multiples: tuple[int, int]):
    """Heads first, filled up to whole lanes and `multiples` of queries and keys."""
    fill, kv_fill = -q.shape[1] % multiples[0], -keys.k.shape[1] % multiples[1]
    if q_ids is None and (fill or kv_fill):
        q_ids = jnp.zeros(q.shape[:2], jnp.int32)
        keys = keys._replace(ids=jnp.zeros(keys.k.shape[:2], jnp.int32))
    if q_ids is not None:
        q_ids = pad(q_ids.astype(jnp.int32), 1, fill, _FILL)
        keys = keys._replace(ids=pad(keys.ids.astype(jnp.int32), 1, kv_fill, _FILL))
    if keys.bias is not None:
        keys = keys._replace(bias=pad(keys.bias.astype(jnp.float32) * LOG2_E, 1, kv_fill))

    def heads_first(x, fill):
        return pad(pad(x.astype(dtype).swapaxes(1, 2), 2, fill), 3, -x.shape[3] % LANES)

    keys = keys._replace(k=heads_first(keys.k, kv_fill), v=heads_first(keys.v, kv_fill))
    return heads_first(q, fill), q_ids, keys


def dot(x, y, contracted: tuple[int, int], precision):
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32, precision=precision)


def precision(dtype: str):
    """float32 operands are meant as such: by default they would be rounded to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == "float32" else None


def compiler_params(parallel: int):
    """Of a grid of four axes, of which the first `parallel` may be shared out to cores."""
    kinds = ("parallel",) * parallel + ("arbitrary",) * (4 - parallel)
    return pltpu.CompilerParams(dimension_semantics=kinds, vmem_limit_bytes=VMEM_BYTES)


def columns(x):
    """(b, n) to (b, n, LANES): a value along the rows of a tile."""
    return jnp.broadcast_to(x[..., None], (*x.shape, LANES))


def rows(x):
    """(..., n) to (..., SUBLANES, n): a value along the columns of a tile."""
    return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], SUBLANES, x.shape[-1]))


def cut(x, axis: int, parts: int):
    x = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def pad(x, axis: int, count: int, value=0):
    if not count:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths, constant_values=value)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
