"""The forward pass: softmax over tiles of keys, without a maximum where none is needed.

Exponentials of logits need a maximum below which they are taken only where they could overflow. By
Cauchy and Schwarz no logit of a head exceeds the longest query times the longest key; where that,
the number of keys and the largest value leave room in float32, the sums are of exponentials as
they are, and nothing is scaled when a larger logit comes (as FlashDecoding++ does, Hong et al.
2023, arXiv:2311.01282, section 3, with a maximum guessed beforehand). Nothing is lost: float32, and
bfloat16 too, are as precise at 2^100 as at 1. Heads that do not fit take the running maximum.

Logits, exponentials and outputs are transposed, keys by queries and channels by queries: a row's
sums are sums of whole registers, and the product with the values, 128 channels wide, fills a
matrix unit of 256 columns, as the channels are its rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sora_jax.blocked_attention import MASKED, Keys
from sora_jax.flash import tiles as tiling

# Exponents of two that sums may reach, and logits from below, so that float32 has some to spare on
# either side of 1: products of float32 operands are sums of parts 2^16 smaller.
_ABOVE, _BELOW = 124, 100


def forward(
    q,
    q_ids,
    keys: Keys,
    *,
    dtype: str,
    out_dtype: str,
    running: bool | None = None,
    interpret: bool = False,
):
    """(out (b, n, h, e), log of the softmax's sums (b, h, n) in float32).

    Args:
      q: (b, n, h, e), times `query_scale`; `q_ids` (b, n), with `keys.ids`, or None.
      dtype: of the operands of both products.
      out_dtype: of `out`; parts that are to be added want float32.
      running: takes exponentials below a running maximum: always, never (the caller knows the
        logits), or by default for heads whose logits may be too large without.
    """
    shape, tile = q.shape, (tiling.block(q.shape[1]), tiling.block(keys.k.shape[1]))
    steps = tiling.tiles_a_step(
        -(-keys.k.shape[1] // tile[1]), row_bytes=tiling.row_bytes(shape[3], dtype)
    )
    keys_block = tile[1] * steps
    q, q_ids, keys = tiling.prepare(q, q_ids, keys, dtype, multiples=(tile[0], keys_block))
    b, h, n, e = q.shape
    count = (n // tile[0], keys.k.shape[2] // keys_block)
    segmented, biased = keys.ids is not None, keys.bias is not None
    scalars = tiling.segments_of(q_ids, keys.ids, tile, steps) if segmented else ()
    scalars = (
        _within_range(q, keys) if running is None else jnp.zeros((b, h), jnp.int32),
        *scalars,
    )

    def of_queries(height):
        return pl.BlockSpec((None, None, height, tile[0]), lambda b, h, i, j, *s: (b, h, 0, i))

    of_keys = pl.BlockSpec(
        (None, None, keys_block, e), lambda b, h, i, j, _, *s: (b, h, tiling.near(j, s, b, i), 0)
    )
    inputs = [
        (q, pl.BlockSpec((None, None, tile[0], e), lambda b, h, i, j, *s: (b, h, i, 0))),
        (keys.k, of_keys),
        (keys.v, of_keys),
    ]
    rows = pl.BlockSpec(
        (None, tiling.SUBLANES, keys_block),
        lambda b, h, i, j, _, *s: (b, 0, tiling.near(j, s, b, i)),
    )
    if segmented:
        of_ids = pl.BlockSpec((None, tiling.SUBLANES, tile[0]), lambda b, h, i, j, *s: (b, 0, i))
        inputs += [(tiling.rows(q_ids), of_ids), (tiling.rows(keys.ids), rows)]
    if biased:
        inputs.append((tiling.rows(keys.bias), rows))
    out, log_sum = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            size=tile[1],
            steps=steps,
            running=running,
            segmented=segmented,
            biased=biased,
            precision=tiling.precision(dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, h, *count),
            in_specs=[spec for _, spec in inputs],
            out_specs=[of_queries(e), of_queries(tiling.SUBLANES)],
            scratch_shapes=[
                pltpu.VMEM((1, tile[0]), jnp.float32),  # what exponentials are taken below
                pltpu.VMEM((tiling.SUBLANES, tile[0]), jnp.float32),  # their sums, in parts
                pltpu.VMEM((e, tile[0]), jnp.float32),  # their sum of values
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, h, e, n), out_dtype),
            jax.ShapeDtypeStruct((b, h, tiling.SUBLANES, n), jnp.float32),
        ],
        compiler_params=tiling.compiler_params(parallel=3),
        name="flash_attention_forward",
        interpret=interpret,
    )(*scalars, *(x for x, _ in inputs))
    out = out.transpose(0, 3, 1, 2)[:, : shape[1], :, : shape[3]]
    return out, log_sum[:, :, 0, : shape[1]]


def _within_range(q, keys: Keys):
    """1 for heads (b, h) whose sums of exponentials float32 holds whatever the logits are.

    The largest sum has an exponent of two of at most the largest logit, and of the number of keys
    times the largest value; the smallest term that counts has one of minus the largest logit, and
    of the largest value.
    """

    def longest(x):
        return jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=3), axis=2))

    logit = longest(q) * longest(keys.k)
    above, below = logit, logit
    if keys.bias is not None:
        bias = keys.bias[:, None]
        above += jnp.maximum(jnp.max(bias, axis=2), 0)
        masked = bias < MASKED / 2
        below += jnp.maximum(-jnp.min(jnp.where(masked, 0, bias), axis=2), 0)
    value = jnp.log2(jnp.max(jnp.abs(keys.v.astype(jnp.float32)), axis=(2, 3)))
    fits = above <= _ABOVE - jnp.maximum(value, 0) - math.log2(keys.k.shape[2])
    fits &= below <= _BELOW + jnp.minimum(value, 0)
    return fits.astype(jnp.int32)  # not where anything is NaN


def _forward_kernel(
    *refs,
    size: int,
    steps: int,
    running: bool | None,
    segmented: bool,
    biased: bool,
    precision,
):
    refs = iter(refs)
    fits = next(refs)
    scalars = tuple(next(refs) for _ in range(6)) if segmented else ()
    q, k, v = next(refs), next(refs), next(refs)
    ids = (next(refs), next(refs)) if segmented else None
    bias = next(refs) if biased else None
    out, log_sum, peak, total, values = refs
    b, h, i, j = (pl.program_id(axis) for axis in range(4))

    @pl.when(j == 0)
    def _():
        begins = MASKED if running else 0.0
        if running is None:
            begins = jnp.where(fits[b, h] == 1, 0.0, MASKED)
        peak[...] = jnp.full_like(peak, begins)
        total[...] = jnp.zeros_like(total)
        values[...] = jnp.zeros_like(values)

    def logits_of(part, masked: bool):
        logits = tiling.dot(k[part], q[...], (1, 1), precision)
        if biased:
            logits += bias[:, part].T[:, :1]
        if masked:
            logits = jnp.where(ids[1][:, part].T[:, :1] == ids[0][:1], logits, MASKED)
        return logits

    def add(p, part):
        total[...] += jnp.sum(p.reshape(-1, *total.shape), axis=0)
        values[...] += tiling.dot(v[part].T, p.astype(v.dtype), (1, 0), precision)

    def visit(step, masked: bool):
        part = tiling.part_of(step, size, steps)

        def plain():
            add(jnp.exp2(logits_of(part, masked)), part)

        def below_peak():
            logits = logits_of(part, masked)
            new = jnp.maximum(peak[...], jnp.max(logits, axis=0, keepdims=True))
            shrink = jnp.exp2(peak[...] - new)
            total[...] *= shrink
            values[...] *= shrink
            peak[...] = new
            add(jnp.exp2(logits - new), part)

        if running is None:
            pl.when(fits[b, h] == 1)(plain)
            pl.when(fits[b, h] == 0)(below_peak)
        else:
            (below_peak if running else plain)()

    tiling.visit_shared(visit, scalars, b, i, j, steps)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        sums = jnp.sum(total[...], axis=0, keepdims=True)
        none = sums == 0
        sums = jnp.where(none, 1.0, sums)
        out[...] = (values[...] / sums).astype(out.dtype)
        logs = jnp.where(none, MASKED, peak[...] + jnp.log2(sums)) / tiling.LOG2_E
        log_sum[...] = jnp.broadcast_to(logs, log_sum.shape)
