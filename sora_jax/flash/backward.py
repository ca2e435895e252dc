"""The backward pass: five products of every tile, in one visit.

All is transposed, as in the forward pass: logits are keys by queries, queries and gradients are
channels by tokens. So only keys are turned, once for all queries, and the three products that end
in channels have them as rows, where they fill a matrix unit of 256 columns.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sora_jax.blocked_attention import Keys
from sora_jax.flash import tiles as tiling


def backward(
    q,
    q_ids,
    keys: Keys,
    log_sum,
    pull,
    d_out,
    *,
    dtype: str,
    out_dtype: str,
    interpret: bool = False,
):
    """Gradients of q, k and v, in `out_dtype`.

    Args:
      log_sum: of the softmax over all keys, of which `keys` may be a part (b, h, n).
      pull: sum over channels of `d_out` times the whole output (b, h, n).
      d_out: gradient of the whole output (b, n, h, e).
    """
    shape, kv_length = q.shape, keys.k.shape[1]
    parts = -(-shape[1] // tiling.BACKWARD_QUERIES)
    part = -(-shape[1] // parts)
    tile = (tiling.block(part, tiling.BACKWARD_BLOCK), tiling.block(kv_length))
    # Gradients lie beside the operands.
    row_bytes = max(tiling.row_bytes(shape[3], kind) for kind in (dtype, out_dtype))
    steps = tiling.tiles_a_step(-(-part // tile[0]), row_bytes=row_bytes)
    part = tiling.round_up(part, tile[0] * steps)
    q, q_ids, keys = tiling.prepare(q, q_ids, keys, dtype, multiples=(parts * part, tile[1]))
    fill = q.shape[2] - shape[1]
    d_out = tiling.pad(d_out.astype(dtype).transpose(0, 2, 3, 1), 2, q.shape[3] - shape[3])
    queries = {
        "q": q.swapaxes(2, 3),
        "q_ids": q_ids,
        "d_out": tiling.pad(d_out, 3, fill),
        # A row's sums lie along the lanes, as the tile of logits has them.
        "log_sum": tiling.rows(tiling.pad(log_sum * tiling.LOG2_E, 2, fill)),
        "pull": tiling.rows(tiling.pad(pull, 2, fill)),
    }
    call = functools.partial(
        _backward_call,
        keys=keys,
        tile=tile,
        steps=steps,
        dtype=dtype,
        out_dtype=out_dtype,
        interpret=interpret,
    )
    if parts == 1:
        dq, dk, dv = call(queries, None)
    else:
        axes = {"q": 3, "q_ids": 1, "d_out": 3, "log_sum": 3, "pull": 3}
        cut = {
            name: None if x is None else tiling.cut(x, axes[name], parts)
            for name, x in queries.items()
        }

        def one(sums, queries):
            dq, *sums = call(queries, sums)
            return sums, dq

        zeros = jnp.zeros(keys.k.swapaxes(2, 3).shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(one, [zeros, zeros], cut)
        dq, dk = jnp.moveaxis(dq, 0, 3).reshape(queries["q"].shape), dk / tiling.LOG2_E
    dq, dk, dv = (x.transpose(0, 3, 1, 2)[..., : shape[3]].astype(out_dtype) for x in (dq, dk, dv))
    return dq[:, : shape[1]], dk[:, :kv_length], dv[:, :kv_length]


def _backward_call(
    queries: dict,
    sums,
    *,
    keys: Keys,
    tile: tuple[int, int],
    steps: int,
    dtype: str,
    out_dtype: str,
    interpret: bool,
):
    """(dq, dk, dv) of `queries`, each (b, h, e, n).

    Those of keys and values are added to `sums`, if there are any.
    """
    b, h, e, n = queries["q"].shape
    queries_block = tile[0] * steps
    count = (n // queries_block, keys.k.shape[2] // tile[1])
    segmented, biased = keys.ids is not None, keys.bias is not None
    scalars = tiling.segments_of(keys.ids, queries["q_ids"], tile[::-1], steps) if segmented else ()

    def of_queries(height):
        return pl.BlockSpec(
            (None, None, height, queries_block),
            lambda b, h, j, i, *s: (b, h, 0, tiling.near(i, s, b, j)),
        )

    of_keys = pl.BlockSpec((None, None, tile[1], e), lambda b, h, j, i, *s: (b, h, j, 0))
    of_gradients = pl.BlockSpec((None, None, e, tile[1]), lambda b, h, j, i, *s: (b, h, 0, j))
    inputs = [
        (queries["q"], of_queries(e)),
        (queries["d_out"], of_queries(e)),
        (queries["log_sum"], of_queries(tiling.SUBLANES)),
        (queries["pull"], of_queries(tiling.SUBLANES)),
        (keys.k, of_keys),
        (keys.v, of_keys),
    ]
    columns = pl.BlockSpec((None, tile[1], tiling.LANES), lambda b, h, j, i, *s: (b, j, 0))
    if segmented:
        rows = pl.BlockSpec(
            (None, tiling.SUBLANES, queries_block),
            lambda b, h, j, i, *s: (b, 0, tiling.near(i, s, b, j)),
        )
        inputs += [(tiling.rows(queries["q_ids"]), rows), (tiling.columns(keys.ids), columns)]
    if biased:
        inputs.append((tiling.columns(keys.bias), columns))
    aliases = {}
    if sums is not None:
        aliases = {len(scalars) + len(inputs) + i: 1 + i for i in range(2)}
        inputs += [(x, of_gradients) for x in sums]
    last = count[1] - 1
    keys_dtype = out_dtype if sums is None else jnp.float32
    return pl.pallas_call(
        functools.partial(
            _backward_kernel,
            size=tile[0],
            steps=steps,
            summed=sums is not None,
            segmented=segmented,
            biased=biased,
            precision=tiling.precision(dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, h, count[1], count[0]),
            in_specs=[spec for _, spec in inputs],
            out_specs=[
                # The same block until the last keys, so that nothing is written before.
                pl.BlockSpec(
                    (None, None, e, queries_block),
                    lambda b, h, j, i, *s: (b, h, 0, jnp.where(j == last, i, 0)),
                ),
                of_gradients,
                of_gradients,
            ],
            scratch_shapes=[
                pltpu.VMEM((count[0], steps, e, tile[0]), jnp.float32),  # of all queries
                pltpu.VMEM((e, tile[1]), jnp.float32),
                pltpu.VMEM((e, tile[1]), jnp.float32),
                pltpu.VMEM((e, tile[1]), keys.k.dtype),  # the keys, turned
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries["q"].shape, out_dtype),
            *2 * (jax.ShapeDtypeStruct(keys.k.swapaxes(2, 3).shape, keys_dtype),),
        ],
        input_output_aliases=aliases,
        compiler_params=tiling.compiler_params(parallel=2),
        name="flash_attention_backward",
        interpret=interpret,
    )(*scalars, *(x for x, _ in inputs))


def _backward_kernel(
    *refs, size: int, steps: int, summed: bool, segmented: bool, biased: bool, precision
):
    refs = iter(refs)
    scalars = tuple(next(refs) for _ in range(6)) if segmented else ()
    q, d_out, log_sum, pull, k, v = (next(refs) for _ in range(6))
    ids = (next(refs), next(refs)) if segmented else None
    bias = next(refs) if biased else None
    sums = (next(refs), next(refs)) if summed else None
    dq, dk, dv, dq_all, dk_sum, dv_sum, k_turned = refs
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _():
        k_turned[...] = k[...].T
        dk_sum[...] = sums[0][...] if summed else jnp.zeros_like(dk_sum)
        dv_sum[...] = sums[1][...] if summed else jnp.zeros_like(dv_sum)

    @pl.when(j == 0)
    def _():
        dq_all[i] = jnp.zeros(dq_all.shape[1:], jnp.float32)

    def visit(step, masked: bool):
        part = tiling.part_of(step, size, steps)
        logits = tiling.dot(k[...], q[:, part], (1, 0), precision)
        if biased:
            logits += bias[:, :1]
        p = jnp.exp2(logits - log_sum[:1, part])
        if masked:
            p = jnp.where(ids[1][:, :1] == ids[0][:1, part], p, 0.0)
        dv_sum[...] += tiling.dot(d_out[:, part], p.astype(v.dtype), (1, 1), precision)
        d_logits = p * (tiling.dot(v[...], d_out[:, part], (1, 0), precision) - pull[:1, part])
        d_logits = d_logits.astype(q.dtype)
        dk_sum[...] += tiling.dot(q[:, part], d_logits, (1, 1), precision)
        dq_all[i, step] += tiling.dot(k_turned[...], d_logits, (1, 0), precision)

    tiling.visit_shared(visit, scalars, b, j, i, steps)

    # Logits were exponents of two, of which exponents of e have the gradient 1 / log2(e).
    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk[...] = (dk_sum[...] if summed else dk_sum[...] / tiling.LOG2_E).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        for step in range(steps):
            part = slice(step * size, (step + 1) * size)
            dq[:, part] = (dq_all[i, step] / tiling.LOG2_E).astype(dq.dtype)
