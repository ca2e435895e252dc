"""Attention on a TPU's matrix unit, tile by tile in its fast memory (Pallas).

Forward as Dao et al. 2022 (arXiv:2205.14135, Algorithm 1). The backward pass makes its five
products of a tile in one visit, and holds the gradient of the queries in fast memory meanwhile: in
two passes they would be seven. Tiles whose queries and keys share no segment are neither read nor
computed, and only those that mix segments are masked, so packed rows cost what their members do.

Knows nothing of meshes. `forward` and `backward` are apart, because ring attention calls them on
parts of the keys, with the softmax's sums over all of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sora_jax.blocked_attention import MASKED, Keys

LANES, SUBLANES = 128, 8
BLOCK = 1024  # queries or keys of a tile, at most
BACKWARD_BLOCK = 512  # queries of a tile of the backward pass
# Queries whose gradients are held at a time: 16 MiB of float32 at 128 channels a head.
BACKWARD_QUERIES = 32_768
VMEM_BYTES = 48 * 2**20  # of the 64 MiB that the smallest has
_LOG2_E = math.log2(math.e)  # powers of two are what the hardware computes
# Segment of the tokens that fill a tile; no caller's id, not even -1 for padding.
_FILL = np.iinfo(np.int32).min
_GRID = ("parallel", "parallel", "arbitrary", "arbitrary")


def block(length: int, largest: int | None = None) -> int:
    """Tokens of a tile: equal tiles of whole lanes, so that little is filled up.

    Args:
      largest: in place of BLOCK.
    """
    largest = largest or BLOCK
    return _round_up(-(-length // -(-length // largest)), LANES)


def query_scale(head_dim: int) -> float:
    """What queries are multiplied with, so that logits are exponents of two."""
    return head_dim**-0.5 * _LOG2_E


def forward(q, q_ids, keys: Keys, *, dtype: str, out_dtype: str, interpret: bool = False):
    """(out (b, n, h, e), log of the softmax's sums (b, h, n) in float32).

    Args:
      q: (b, n, h, e), times `query_scale`; `q_ids` (b, n), with `keys.ids`, or None.
      dtype: of the operands of both products.
      out_dtype: of `out`; parts that are to be added want float32.
    """
    shape, tile = q.shape, (block(q.shape[1]), block(keys.k.shape[1]))
    q, q_ids, keys = _prepare(q, q_ids, keys, dtype, tile=tile, queries=tile[0])
    b, h, n, e = q.shape
    count = (n // tile[0], keys.k.shape[2] // tile[1])
    segmented, biased = keys.ids is not None, keys.bias is not None
    queries = lambda b, h, i, j, *s: (b, h, i, 0)  # noqa: E731
    of_keys = lambda b, h, i, j, *s: (b, h, _near(j, s, b, i), 0)  # noqa: E731
    inputs = [
        (q, pl.BlockSpec((None, None, tile[0], e), queries)),
        (keys.k, pl.BlockSpec((None, None, tile[1], e), of_keys)),
        (keys.v, pl.BlockSpec((None, None, tile[1], e), of_keys)),
    ]
    if segmented:
        inputs += [
            (
                _columns(q_ids),
                pl.BlockSpec((None, tile[0], LANES), lambda b, h, i, j, *s: (b, i, 0)),
            ),
            (
                _rows(keys.ids),
                pl.BlockSpec(
                    (None, SUBLANES, tile[1]), lambda b, h, i, j, *s: (b, 0, _near(j, s, b, i))
                ),
            ),
        ]
    if biased:
        inputs.append(
            (
                _rows(keys.bias),
                pl.BlockSpec(
                    (None, SUBLANES, tile[1]), lambda b, h, i, j, *s: (b, 0, _near(j, s, b, i))
                ),
            )
        )
    scalars = _tiles(q_ids, keys.ids, tile) if segmented else ()
    out, log_sum = pl.pallas_call(
        functools.partial(
            _forward_kernel, segmented=segmented, biased=biased, precision=_precision(dtype)
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, h, *count),
            in_specs=[spec for _, spec in inputs],
            out_specs=[
                pl.BlockSpec((None, None, tile[0], e), queries),
                pl.BlockSpec((None, None, SUBLANES, tile[0]), lambda b, h, i, j, *s: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((tile[0], LANES), jnp.float32),  # largest logit so far
                pltpu.VMEM((tile[0], LANES), jnp.float32),  # sum of the exponentials
                pltpu.VMEM((tile[0], e), jnp.float32),  # their products with the values
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, h, n, e), out_dtype),
            jax.ShapeDtypeStruct((b, h, SUBLANES, n), jnp.float32),
        ],
        compiler_params=_compiler_params(),
        name="flash_attention_forward",
        interpret=interpret,
    )(*scalars, *(x for x, _ in inputs))
    return out.swapaxes(1, 2)[:, : shape[1], :, : shape[3]], log_sum[:, :, 0, : shape[1]]


def _forward_kernel(*refs, segmented: bool, biased: bool, precision):
    refs = iter(refs)
    scalars = tuple(next(refs) for _ in range(6)) if segmented else ()
    q, k, v = next(refs), next(refs), next(refs)
    ids = (next(refs), next(refs)) if segmented else None
    bias = next(refs) if biased else None
    out, log_sum, peak, total, values = refs
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)
        values[...] = jnp.zeros_like(values)

    def visit(masked: bool):
        logits = _dot(q[...], k[...], (1, 1), precision)
        if biased:
            logits += bias[:1]
        if masked:
            logits = jnp.where(ids[0][:, :1] == ids[1][:1], logits, MASKED)
        new_peak = jnp.maximum(peak[...], jnp.max(logits, axis=1, keepdims=True))
        p = jnp.exp2(logits - new_peak[:, :1])
        shrink = jnp.exp2(peak[...] - new_peak)
        total[...] = shrink * total[...] + jnp.sum(p, axis=1, keepdims=True)
        product = _dot(p.astype(v.dtype), v[...], (1, 0), precision)
        values[...] = values[...] * shrink[:, :1] + product
        peak[...] = new_peak

    _visit_if_shared(visit, scalars, b, i, j)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        sums = jnp.where(total[...] == 0, 1.0, total[...])
        out[...] = (values[...] / sums[:, :1]).astype(out.dtype)
        logs = (peak[...] + jnp.log2(sums)) / _LOG2_E
        log_sum[...] = logs.T[:SUBLANES]


def backward(q, q_ids, keys: Keys, log_sum, pull, d_out, *, dtype: str, interpret: bool = False):
    """Gradients of q, k and v, in float32.

    Args:
      log_sum: of the softmax over all keys, of which `keys` may be a part (b, h, n).
      pull: sum over channels of `d_out` times the whole output (b, h, n).
      d_out: gradient of the whole output (b, n, h, e).
    """
    shape, kv_length = q.shape, keys.k.shape[1]
    parts = -(-shape[1] // BACKWARD_QUERIES)
    part = -(-shape[1] // parts)
    tile = (block(part, BACKWARD_BLOCK), block(kv_length))
    part = _round_up(part, tile[0])
    q, q_ids, keys = _prepare(q, q_ids, keys, dtype, tile=tile, queries=parts * part)
    fill = q.shape[2] - shape[1]
    d_out = _pad(d_out.astype(dtype).swapaxes(1, 2), 3, q.shape[3] - shape[3])
    queries = {
        "q": q,
        "q_ids": q_ids,
        "d_out": _pad(d_out, 2, fill),
        # A row's sums lie along the lanes, as the tile of logits has them.
        "log_sum": _rows(_pad(log_sum * _LOG2_E, 2, fill)),
        "pull": _rows(_pad(pull, 2, fill)),
    }
    axes = {"q": 2, "q_ids": 1, "d_out": 2, "log_sum": 3, "pull": 3}

    def one(totals, queries):
        dq, dk, dv = _backward_call(queries, keys, tile, dtype, interpret)
        return jax.tree.map(jnp.add, totals, (dk, dv)), dq

    if parts == 1:
        dq, dk, dv = _backward_call(queries, keys, tile, dtype, interpret)
    else:
        cut = {
            name: None if x is None else _cut(x, axes[name], parts) for name, x in queries.items()
        }
        zeros = jnp.zeros(keys.k.shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(one, (zeros, zeros), cut)
        dq = jnp.moveaxis(dq, 0, 2).reshape(q.shape)
    scaled = (dq / _LOG2_E, dk / _LOG2_E, dv)
    dq, dk, dv = (x.swapaxes(1, 2)[..., : shape[3]] for x in scaled)
    return dq[:, : shape[1]], dk[:, :kv_length], dv[:, :kv_length]


def _backward_call(queries: dict, keys: Keys, tile: tuple[int, int], dtype, interpret: bool):
    b, h, n, e = queries["q"].shape
    count = (n // tile[0], keys.k.shape[2] // tile[1])
    segmented, biased = keys.ids is not None, keys.bias is not None
    scalars = _tiles(keys.ids, queries["q_ids"], tile[::-1]) if segmented else ()
    of_queries = pl.BlockSpec(
        (None, None, tile[0], e), lambda b, h, j, i, *s: (b, h, _near(i, s, b, j), 0)
    )
    of_sums = pl.BlockSpec(
        (None, None, SUBLANES, tile[0]), lambda b, h, j, i, *s: (b, h, 0, _near(i, s, b, j))
    )
    of_keys = pl.BlockSpec((None, None, tile[1], e), lambda b, h, j, i, *s: (b, h, j, 0))
    columns = pl.BlockSpec((None, tile[1], LANES), lambda b, h, j, i, *s: (b, j, 0))
    inputs = [
        (queries["q"], of_queries),
        (queries["d_out"], of_queries),
        (queries["log_sum"], of_sums),
        (queries["pull"], of_sums),
        (keys.k, of_keys),
        (keys.v, of_keys),
    ]
    if segmented:
        rows = pl.BlockSpec(
            (None, SUBLANES, tile[0]), lambda b, h, j, i, *s: (b, 0, _near(i, s, b, j))
        )
        inputs += [(_rows(queries["q_ids"]), rows), (_columns(keys.ids), columns)]
    if biased:
        inputs.append((_columns(keys.bias), columns))
    last = count[1] - 1
    like = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)  # noqa: E731
    return pl.pallas_call(
        functools.partial(
            _backward_kernel, segmented=segmented, biased=biased, precision=_precision(dtype)
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, h, count[1], count[0]),
            in_specs=[spec for _, spec in inputs],
            out_specs=[
                # The same block until the last keys, so that nothing is written before.
                pl.BlockSpec(
                    (None, None, tile[0], e),
                    lambda b, h, j, i, *s: (b, h, jnp.where(j == last, i, 0), 0),
                ),
                of_keys,
                of_keys,
            ],
            scratch_shapes=[
                pltpu.VMEM((count[0], tile[0], e), jnp.float32),  # gradient of all queries
                pltpu.VMEM((tile[1], e), jnp.float32),
                pltpu.VMEM((tile[1], e), jnp.float32),
            ],
        ),
        out_shape=[like(queries["q"]), like(keys.k), like(keys.v)],
        compiler_params=_compiler_params(),
        name="flash_attention_backward",
        interpret=interpret,
    )(*scalars, *(x for x, _ in inputs))


def _backward_kernel(*refs, segmented: bool, biased: bool, precision):
    """Logits and their gradients are transposed, keys by queries."""
    refs = iter(refs)
    scalars = tuple(next(refs) for _ in range(6)) if segmented else ()
    q, d_out, log_sum, pull, k, v = (next(refs) for _ in range(6))
    ids = (next(refs), next(refs)) if segmented else None
    bias = next(refs) if biased else None
    dq, dk, dv, dq_all, dk_sum, dv_sum = refs
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(j == 0)
    def _():
        dq_all[i] = jnp.zeros(dq.shape, jnp.float32)

    def visit(masked: bool):
        logits = _dot(k[...], q[...], (1, 1), precision)
        if biased:
            logits += bias[:, :1]
        p = jnp.exp2(logits - log_sum[:1])
        if masked:
            p = jnp.where(ids[1][:, :1] == ids[0][:1], p, 0.0)
        dv_sum[...] += _dot(p.astype(v.dtype), d_out[...], (1, 0), precision)
        d_logits = p * (_dot(v[...], d_out[...], (1, 1), precision) - pull[:1])
        d_logits = d_logits.astype(q.dtype)
        dk_sum[...] += _dot(d_logits, q[...], (1, 0), precision)
        dq_all[i] += _dot(d_logits, k[...], (0, 0), precision)

    _visit_if_shared(visit, scalars, b, j, i)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk[...] = dk_sum[...]
        dv[...] = dv_sum[...]

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        dq[...] = dq_all[i]


def _visit_if_shared(visit, scalars, b, outer, inner) -> None:
    """visit(masked) the tile if it has a segment in common, masked unless it has one alone."""
    if not scalars:
        visit(False)
        return
    lo, hi, other_lo, other_hi, _, _ = scalars
    lo, hi, other_lo, other_hi = lo[b, outer], hi[b, outer], other_lo[b, inner], other_hi[b, inner]
    shared = (lo <= other_hi) & (other_lo <= hi)
    alone = (lo == hi) & (other_lo == other_hi)

    @pl.when(shared & alone)
    def _():
        visit(False)

    @pl.when(shared & jnp.logical_not(alone))
    def _():
        visit(True)


def _tiles(ids, other_ids, tile: tuple[int, int]) -> tuple[jax.Array, ...]:
    """Of the tiles of `ids`: least and largest id, of the others' too; first and last shared."""
    ids, other = (
        x.reshape(x.shape[0], -1, size) for x, size in zip((ids, other_ids), tile, strict=True)
    )
    lo, hi, other_lo, other_hi = ids.min(2), ids.max(2), other.min(2), other.max(2)
    shared = (lo[:, :, None] <= other_hi[:, None]) & (other_lo[:, None] <= hi[:, :, None])
    first = jnp.argmax(shared, axis=2)
    last = jnp.maximum(first, shared.shape[2] - 1 - jnp.argmax(shared[:, :, ::-1], axis=2))
    last = jnp.where(shared.any(2), last, first)
    return tuple(x.astype(jnp.int32) for x in (lo, hi, other_lo, other_hi, first, last))


def _near(index, scalars, b, outer):
    """`index`, or the nearest that shares a segment with tile `outer`: nothing else is read."""
    if not scalars:
        return index
    return jnp.clip(index, scalars[4][b, outer], scalars[5][b, outer])


def _prepare(q, q_ids, keys: Keys, dtype: str, *, tile: tuple[int, int], queries: int):
    """Heads first, filled up to whole tiles and lanes.

    Args:
      queries: a multiple of it is filled up to.
    """
    fill = -q.shape[1] % queries
    kv_fill = -keys.k.shape[1] % tile[1]
    if q_ids is None and (fill or kv_fill):
        q_ids = jnp.zeros(q.shape[:2], jnp.int32)
        keys = keys._replace(ids=jnp.zeros(keys.k.shape[:2], jnp.int32))
    if q_ids is not None:
        q_ids = _pad(q_ids.astype(jnp.int32), 1, fill, _FILL)
        keys = keys._replace(ids=_pad(keys.ids.astype(jnp.int32), 1, kv_fill, _FILL))
    if keys.bias is not None:
        keys = keys._replace(bias=_pad(keys.bias.astype(jnp.float32) * _LOG2_E, 1, kv_fill))

    def heads_first(x, fill):
        return _pad(_pad(x.astype(dtype).swapaxes(1, 2), 2, fill), 3, -x.shape[3] % LANES)

    keys = keys._replace(k=heads_first(keys.k, kv_fill), v=heads_first(keys.v, kv_fill))
    return heads_first(q, fill), q_ids, keys


def _dot(x, y, contracted: tuple[int, int], precision):
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32, precision=precision)


def _precision(dtype: str):
    """float32 operands are meant as such: by default they would be rounded to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == "float32" else None


def _compiler_params():
    return pltpu.CompilerParams(dimension_semantics=_GRID, vmem_limit_bytes=VMEM_BYTES)


def _columns(x):
    """(b, n) to (b, n, LANES): a value along the rows of a tile."""
    return jnp.broadcast_to(x[..., None], (*x.shape, LANES))


def _rows(x):
    """(..., n) to (..., SUBLANES, n): a value along the columns of a tile."""
    return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], SUBLANES, x.shape[-1]))


def _cut(x, axis: int, parts: int):
    x = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _pad(x, axis: int, count: int, value=0):
    if not count:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths, constant_values=value)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
