"""Attention tile by tile with a gradient of its own: what XLA runs fastest on CPUs.

The logits of one tile, some heads by some queries by all keys, exist at a time, and should fit
the cache. The backward pass computes them again from the log of the softmax's denominator (Dao et
al. 2022, arXiv:2205.14135, Algorithms 2 and 4; keys are not cut, so no running maximum is kept).
Knows nothing of meshes or of which kernel is chosen. `forward` and `backward` are apart, because
ring attention calls them on parts of the keys, with the softmax's sums over all of them.

Every product here contracts the last axis of its left operand: XLA's CPU backend runs bfloat16
operands at full rate in that form alone, and computes the others in float32, at a third of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The logit of a pair that may not attend: finite, so that a row without keys is not NaN.
MASKED = -1e30
QUERIES = 576  # a tile at most, and
TILE_BYTES = 6_000_000  # of float32 logits, if one head has no more


class Keys(NamedTuple):
    """What queries attend to: keys and values (b, s, h, e); ids and bias (b, s), or None."""

    k: jax.Array
    v: jax.Array
    ids: jax.Array | None = None  # of segments
    bias: jax.Array | None = None  # added to every logit of a key


def forward(
    q,
    q_ids,
    keys: Keys,
    *,
    dtype: str,
    out_dtype: str,
    tile_bytes: int | None = None,
):
    """(out (b, n, h, e), log of the softmax's sums (b, h, n) in float32).

    Args:
      q: (b, n, h, e), scaled; `q_ids` (b, n), with `keys.ids`, or None.
      dtype: of the operands of both products.
      out_dtype: of `out`.
      tile_bytes: in place of TILE_BYTES.
    """
    k, v, kv_ids, kv_bias = keys
    heads, size = _tile(q.shape, k.shape[1], QUERIES, tile_bytes or TILE_BYTES)
    mask = _mask(q.shape[2], q_ids, kv_ids, kv_bias)

    def of_heads(arguments):
        q, k, v_t, mask = arguments

        def of_queries(arguments):
            q, ids = arguments
            logits = _logits(q, k, ids, mask)
            peak = jnp.max(logits, axis=-1, keepdims=True)
            p = jnp.exp(logits - peak)
            total = jnp.sum(p, axis=-1, keepdims=True)
            out = _product(p.astype(dtype), v_t) / total
            return out.astype(out_dtype), peak + jnp.log(total)

        out = _loop(of_queries, _cut((q, mask["q_ids"]), size))
        return jax.tree.map(lambda x: _join(x, q.shape[1]), out)

    arguments = (_rows(q, dtype), _rows(k, dtype), _columns(v, dtype), mask)
    out, log_sum = _loop(of_heads, jax.tree.map(lambda x: _split(x, heads), arguments))
    out = _tokens_first(out.reshape(-1, *out.shape[2:]), q.shape)
    return out, log_sum.reshape(q.shape[0], q.shape[2], q.shape[1])


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
    tile_bytes: int | None = None,
):
    """Gradients of q, k and v, in `out_dtype`.

    Args:
      log_sum: of the softmax over all keys, of which `keys` may be a part (b, h, n).
      pull: sum over channels of `d_out` times the whole output (b, h, n).
      d_out: gradient of the whole output (b, n, h, e).
    """
    k, v, kv_ids, kv_bias = keys
    heads, size = _tile(q.shape, k.shape[1], QUERIES, tile_bytes or TILE_BYTES)
    mask = _mask(q.shape[2], q_ids, kv_ids, kv_bias)
    by_row = lambda x: x.reshape(-1, x.shape[2], 1)  # noqa: E731

    def of_heads(arguments):
        by_query, by_query_t, k, k_t, v, mask = arguments

        def of_queries(totals, arguments):
            (q, d_out, pull, log_sum, ids), (q_t, d_out_t) = arguments
            p = jnp.exp(_logits(q, k, ids, mask) - log_sum)
            d_logits = (p * (_product(d_out, v) - pull)).astype(dtype)
            dk_t = _product(q_t, d_logits, rows=True)
            dv_t = _product(d_out_t, p.astype(dtype), rows=True)
            return jax.tree.map(jnp.add, totals, (dk_t, dv_t)), _product(d_logits, k_t)

        parts = _cut((*by_query, mask["q_ids"]), size), _cut(by_query_t, size, axis=2)
        zeros = jnp.zeros(k_t.shape, jnp.float32)
        (dk_t, dv_t), dq = jax.lax.scan(of_queries, (zeros, zeros), parts)
        return _join(dq, by_query[0].shape[1]), dk_t, dv_t

    arguments = (
        (_rows(q, dtype), _rows(d_out, dtype), by_row(pull), by_row(log_sum)),
        (_columns(q, dtype), _columns(d_out, dtype)),
        *(_rows(k, dtype), _columns(k, dtype), _rows(v, dtype)),
        mask,
    )
    grads = _loop(of_heads, jax.tree.map(lambda x: _split(x, heads), arguments))
    dq, dk_t, dv_t = (x.reshape(-1, *x.shape[2:]) for x in grads)
    grads = _tokens_first(dq, q.shape), _columns_back(dk_t, k), _columns_back(dv_t, v)
    return tuple(x.astype(out_dtype) for x in grads)


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
    logits = _product(q, k)
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
