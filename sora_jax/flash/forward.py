"""The forward pass: softmax over tiles of keys, with a running maximum."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sora_jax.blocked_attention import MASKED, Keys
from sora_jax.flash import tiles as tiling


def forward(
    q,
    q_ids,
    keys: Keys,
    *,
    dtype: str,
    out_dtype: str,
    wide: bool = False,
    interpret: bool = False,
):
    """(out (b, n, h, e), log of the softmax's sums (b, h, n) in float32).

    Args:
      q: (b, n, h, e), times `query_scale`; `q_ids` (b, n), with `keys.ids`, or None.
      dtype: of the operands of both products.
      out_dtype: of `out`; parts that are to be added want float32.
      wide: for matrix units of 256 columns beside vector units that take bfloat16: exponentials
        in bfloat16, where that is `dtype`, and sums on the half of the matrix unit that a head's
        channels leave idle.
    """
    shape, tile = q.shape, (tiling.block(q.shape[1]), tiling.block(keys.k.shape[1]))
    wide = wide and dtype == "bfloat16" and shape[3] <= tiling.LANES
    q, q_ids, keys = tiling.prepare(q, q_ids, keys, dtype, tile=tile, queries=tile[0])
    if wide:  # a column of ones, in lanes of its own
        ones = jnp.ones((*keys.v.shape[:3], tiling.LANES), dtype)
        keys = keys._replace(v=jnp.concatenate([keys.v, ones], axis=3))
    b, h, n, e = q.shape
    tiles = keys.k.shape[2] // tile[1]
    steps = tiling.tiles_a_step(tiles)
    keys_block, count = tile[1] * steps, (n // tile[0], tiles // steps)
    segmented, biased = keys.ids is not None, keys.bias is not None
    scalars = tiling.segments_of(q_ids, keys.ids, tile, steps) if segmented else ()

    def of_keys(*shape, axis):
        """Blocks of keys along `axis`, after example and head where the array has them."""

        def index(b, h, i, j, *s):
            j = tiling.near(j, s, b, i)
            return (b, h, j, 0) if axis == 2 else (b, 0, j)

        return pl.BlockSpec(shape, index)

    queries = pl.BlockSpec((None, None, tile[0], e), lambda b, h, i, j, *s: (b, h, i, 0))
    inputs = [
        (q, queries),
        (keys.k, of_keys(None, None, keys_block, e, axis=2)),
        (keys.v, of_keys(None, None, keys_block, keys.v.shape[3], axis=2)),
    ]
    rows = of_keys(None, tiling.SUBLANES, keys_block, axis=1)
    if segmented:
        columns = pl.BlockSpec((None, tile[0], tiling.LANES), lambda b, h, i, j, *s: (b, i, 0))
        inputs += [(tiling.columns(q_ids), columns), (tiling.rows(keys.ids), rows)]
    if biased:
        inputs.append((tiling.rows(keys.bias), rows))
    out, log_sum = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            size=tile[1],
            steps=steps,
            wide=wide,
            segmented=segmented,
            biased=biased,
            precision=tiling.precision(dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, h, *count),
            in_specs=[spec for _, spec in inputs],
            out_specs=[
                queries,
                pl.BlockSpec(
                    (None, None, tiling.SUBLANES, tile[0]), lambda b, h, i, j, *s: (b, h, 0, i)
                ),
            ],
            scratch_shapes=[
                pltpu.VMEM((tile[0], tiling.LANES), jnp.float32),  # largest logit so far
                pltpu.VMEM((tile[0], tiling.LANES), jnp.float32),  # sum of the exponentials
                pltpu.VMEM((tile[0], keys.v.shape[3]), jnp.float32),  # their sum of values
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, h, n, e), out_dtype),
            jax.ShapeDtypeStruct((b, h, tiling.SUBLANES, n), jnp.float32),
        ],
        compiler_params=tiling.compiler_params(),
        name="flash_attention_forward",
        interpret=interpret,
    )(*scalars, *(x for x, _ in inputs))
    return out.swapaxes(1, 2)[:, : shape[1], :, : shape[3]], log_sum[:, :, 0, : shape[1]]


def _forward_kernel(
    *refs, size: int, steps: int, wide: bool, segmented: bool, biased: bool, precision
):
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

    def visit(step, masked: bool):
        part = tiling.part_of(step, size, steps)
        logits = tiling.dot(q[...], k[part], (1, 1), precision)
        if biased:
            logits += bias[:1, part]
        if masked:
            logits = jnp.where(ids[0][:, :1] == ids[1][:1, part], logits, MASKED)
        new_peak = jnp.maximum(peak[...], jnp.max(logits, axis=1, keepdims=True))
        below = logits - new_peak[:, :1]
        p = jnp.exp2(below.astype(v.dtype) if wide else below)
        shrink = jnp.exp2(peak[...] - new_peak)
        if not wide:
            total[...] = shrink * total[...] + jnp.sum(p, axis=1, keepdims=True)
        product = tiling.dot(p.astype(v.dtype), v[part], (1, 0), precision)
        values[...] = values[...] * shrink[:, :1] + product
        peak[...] = new_peak

    tiling.visit_shared(visit, scalars, b, i, j, steps)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        e = out.shape[1]
        sums = values[:, e:] if wide else total[...]
        sums = jnp.where(sums == 0, 1.0, sums)
        out[...] = (values[:, :e] / sums[:, :1]).astype(out.dtype)
        logs = (peak[...] + jnp.log2(sums)) / tiling.LOG2_E
        log_sum[...] = logs.T[: tiling.SUBLANES]
