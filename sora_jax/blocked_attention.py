"""Attention tile by tile with a gradient of its own: what XLA runs fastest on CPUs.

The logits of one tile, some heads by some queries by all keys, exist at a time, and should fit
the cache. The backward pass computes them again from the log of the softmax's denominator (Dao et
al. 2022, arXiv:2205.14135, Algorithms 2 and 4; keys are not cut, so no running maximum is kept).
Knows nothing of meshes or of which kernel is chosen.

Every product here contracts the last axis of its left operand: XLA's CPU backend runs bfloat16
operands at full rate in that form alone, and computes the others in float32, at a third of it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The logit of a pair that may not attend: finite, so that a row without keys is not NaN.
MASKED = -1e30
# Name of what the backward pass needs beside q, k and v, for policies of rematerialisation.
RESIDUALS = "attention_out"
QUERIES = 576  # a tile at most, and
TILE_BYTES = 6_000_000  # of float32 logits, if one head has no more


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def blocked(
    q,
    k,
    v,
    q_segment_ids,
    kv_segment_ids,
    kv_bias,
    dtype: str,
    queries: int = QUERIES,
    tile_bytes: int = TILE_BYTES,
):
    """softmax(q k^T / sqrt(e) + bias) v for q (b, n, h, e), k and v (b, s, h, e); float32.

    Segment ids (b, n) and (b, s), and `kv_bias` (b, s), may be None; none has a gradient.
    """
    return _forward(q, k, v, q_segment_ids, kv_segment_ids, kv_bias, dtype, queries, tile_bytes)[0]


def _forward(q, k, v, q_ids, kv_ids, kv_bias, dtype, queries, tile_bytes):
    heads, size = _tile(q.shape, k.shape[1], queries, tile_bytes)
    mask = _mask(q.shape[2], q_ids, kv_ids, kv_bias)

    def of_heads(arguments):
        q, k, v_t, mask = arguments

        def of_queries(arguments):
            q, ids = arguments
            logits = _logits(q, k, ids, mask)
            peak = jnp.max(logits, axis=-1, keepdims=True)
            p = jnp.exp(logits - peak)
            total = jnp.sum(p, axis=-1, keepdims=True)
            return _product(p.astype(dtype), v_t) / total, peak + jnp.log(total)

        out = _loop(of_queries, _cut((q, mask["q_ids"]), size))
        return jax.tree.map(lambda x: _join(x, q.shape[1]), out)

    arguments = (_rows(q, dtype), _rows(k, dtype), _columns(v, dtype), mask)
    out, log_total = _loop(of_heads, jax.tree.map(lambda x: _split(x, heads), arguments))
    # Named, so that a rematerialised block may keep them and need not attend again.
    out, log_total = (
        checkpoint_name(x.reshape(-1, *x.shape[2:]), RESIDUALS) for x in (out, log_total)
    )
    return _tokens_first(out, q.shape), (q, k, v, q_ids, kv_ids, kv_bias, out, log_total)


def _backward(dtype, queries, tile_bytes, residuals, cotangent):
    q, k, v, q_ids, kv_ids, kv_bias, out, log_total = residuals
    heads, size = _tile(q.shape, k.shape[1], queries, tile_bytes)
    mask = _mask(q.shape[2], q_ids, kv_ids, kv_bias)
    # Of each row of the softmax: its probabilities times their gradients.
    pull = jnp.sum(_rows(cotangent, "float32") * out, axis=-1, keepdims=True)

    def of_heads(arguments):
        by_query, by_query_t, k, k_t, v, mask = arguments

        def of_queries(totals, arguments):
            (q, d_out, pull, log_total, ids), (q_t, d_out_t) = arguments
            p = jnp.exp(_logits(q, k, ids, mask) - log_total)
            d_logits = (p * (_product(d_out, v) - pull) * q.shape[-1] ** -0.5).astype(dtype)
            dk_t = _product(q_t, d_logits, rows=True)
            dv_t = _product(d_out_t, p.astype(dtype), rows=True)
            return jax.tree.map(jnp.add, totals, (dk_t, dv_t)), _product(d_logits, k_t)

        parts = _cut((*by_query, mask["q_ids"]), size), _cut(by_query_t, size, axis=2)
        zeros = jnp.zeros(k_t.shape, jnp.float32)
        (dk_t, dv_t), dq = jax.lax.scan(of_queries, (zeros, zeros), parts)
        return _join(dq, by_query[0].shape[1]), dk_t, dv_t

    arguments = (
        (_rows(q, dtype), _rows(cotangent, dtype), pull, log_total),
        (_columns(q, dtype), _columns(cotangent, dtype)),
        *(_rows(k, dtype), _columns(k, dtype), _rows(v, dtype)),
        mask,
    )
    grads = _loop(of_heads, jax.tree.map(lambda x: _split(x, heads), arguments))
    dq, dk_t, dv_t = (x.reshape(-1, *x.shape[2:]) for x in grads)
    dq, dk, dv = _tokens_first(dq, q.shape), _columns_back(dk_t, k), _columns_back(dv_t, v)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


blocked.defvjp(_forward, _backward)


def _tile(q_shape, kv_len: int, queries: int, tile_bytes: int) -> tuple[int, int]:
    """Heads (of all examples; they divide into such tiles) and queries of a tile."""
    b, n, h, _ = q_shape
    size = -(-n // -(-n // queries))  # equal tiles, the last one filled up
    fitting = max(1, tile_bytes // (4 * size * kv_len))
    return max(d for d in range(1, min(b * h, fitting) + 1) if b * h % d == 0), size


def _mask(heads: int, q_ids, kv_ids, kv_bias):
    """What restricts attention, by head of each example; None where nothing does."""
    named = {"q_ids": q_ids, "kv_ids": kv_ids, "kv_bias": kv_bias}
    return jax.tree.map(lambda x: jnp.repeat(x, heads, axis=0), named)


def _logits(q, k, q_ids, mask):
    logits = _product(q, k) * q.shape[-1] ** -0.5
    if mask["kv_bias"] is not None:
        logits = logits + mask["kv_bias"].astype(jnp.float32)[:, None, :]
    if q_ids is not None:
        logits = jnp.where(q_ids[:, :, None] == mask["kv_ids"][:, None, :], logits, MASKED)
    return logits


def _product(x, y, *, rows: bool = False):
    """x (g, n, e) times y, (g, s, e) or, as `rows`, (g, e, s): (g, n, s)."""
    contracted = ((2,), (1 if rows else 2,))
    return jax.lax.dot_general(x, y, (contracted, ((0,), (0,))), preferred_element_type=jnp.float32)


def _rows(x, dtype):
    """(b, n, h, e) to (b * h, n, e)."""
    b, n, h, e = x.shape
    return x.astype(dtype).swapaxes(1, 2).reshape(b * h, n, e)


def _tokens_first(x, shape):
    """Undoes `_rows`."""
    b, n, h, e = shape
    return x.reshape(b, h, n, e).swapaxes(1, 2)


def _columns(x, dtype):
    """(b, n, h, e) to (b * h, e, n).

    Its reshape, and that of `_columns_back`, stand between transpose and product: XLA would fold
    neighbours into one, and contract the first axis after all.
    """
    b, n, h, e = x.shape
    return x.astype(dtype).transpose(0, 2, 3, 1).reshape(b * h, e, n)


def _columns_back(x, like):
    b, n, h, e = like.shape
    return x.reshape(b, h, e, n).transpose(0, 3, 1, 2)


def _split(x, count: int):
    """(g, ...) to (g / count, count, ...)."""
    return x.reshape(-1, count, *x.shape[1:])


def _cut(tree, size: int, *, axis: int = 1):
    """Cuts `axis` into parts along a new first axis; zeros fill the last one up."""

    def one(x):
        count = -(-x.shape[axis] // size)
        fill = [(0, 0)] * x.ndim
        fill[axis] = (0, count * size - x.shape[axis])
        x = jnp.pad(x, fill).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return jax.tree.map(one, tree)


def _join(x, length: int):
    """Undoes `_cut` of axis 1: (count, g, size, ...) to (g, length, ...)."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _loop(f, parts):
    """f of each part, stacked; a single one needs no loop."""
    if jax.tree.leaves(parts)[0].shape[0] > 1:
        return jax.lax.map(f, parts)
    out = f(jax.tree.map(lambda x: x[0], parts))
    return jax.tree.map(lambda x: x[None], out)
