"""Attention by cuDNN, for 16-bit operands on NVIDIA's GPUs.

Segments that are runs of tokens go to cuDNN as where each begins and how long it is, so that no
tile between two of them is computed. Otherwise they are a mask, which cuDNN takes as a bias of
every query and key: of 32,768 tokens 2 GiB a row. On an H200 rows of 8,192 tokens in 16 segments
took 0.85 ms forward and back for 9.4 ms with the mask (12 heads of 128 channels).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_FILL = -(2**31)  # segment of tokens that fill up; no caller's id, not even -1 for padding
_RUNS_CAPABILITY = 9.0  # as JAX asks for, too
_RUNS_MIN_TOKENS = 1024  # of rows of 576 tokens a mask is faster than runs


def attend(
    q: Float[Array, "b n k e"],
    k: Float[Array, "b s k e"],
    v: Float[Array, "b s k e"],
    q_ids: Int[Array, "b n"] | None = None,
    kv_ids: Int[Array, "b s"] | None = None,
    *,
    runs: int | None = None,
) -> Float[Array, "b n k e"]:
    """Scaled dot-product attention of queries to the keys of their own segment.

    Args:
      runs: with it, tokens of each id in [0, runs) lie side by side, in the order of the ids, and
        queries and keys have the same ids; other ids are padding, whose rows are zero or without
        meaning. Nothing checks it: ids in another order give wrong rows.
    """
    if q_ids is None or kv_ids is None:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if runs is not None and min(q.shape[1], k.shape[1]) >= _RUNS_MIN_TOKENS and _takes_runs():
        return _in_runs(q, k, v, q_ids, kv_ids, runs)
    length = q.shape[1]
    # With a mask, cuDNN's backward pass wants even lengths.
    q, q_ids = _fill_up(q, q_ids, multiple=2)
    k, _ = _fill_up(k, kv_ids, multiple=2)
    v, kv_ids = _fill_up(v, kv_ids, multiple=2)
    mask = q_ids[:, None, :, None] == kv_ids[:, None, None, :]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return out[:, :length]


def _takes_runs() -> bool:
    """Whether the devices' cuDNN has packed sequences: from Hopper on."""
    return float(getattr(jax.local_devices()[0], "compute_capability", 0)) >= _RUNS_CAPABILITY


def _in_runs(q, k, v, q_ids, kv_ids, runs: int):
    # JAX has no public name for cuDNN's packed sequences (jax.nn takes lengths, but no offsets).
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    # What cuDNN leaves out it does not write: neither output nor gradients of padding are defined.
    real_q, real_kv = ((ids >= 0) & (ids < runs) for ids in (q_ids, kv_ids))
    q, k, v = _or_zero(q, real_q), _or_zero(k, real_kv), _or_zero(v, real_kv)
    # A single segment may yet end in padding; cuDNN's packed layout takes two or more.
    q_lengths, q_offsets = extents(q_ids, max(2, runs))
    kv_lengths, kv_offsets = extents(kv_ids, max(2, runs))
    out = cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=q_lengths,
        kv_seqlen=kv_lengths,
        q_offsets=q_offsets,
        kv_offsets=kv_offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.NO_MASK,
    )
    return _or_zero(out, real_q)


def _or_zero(x, real):
    """`x` where tokens are real; so are its gradients."""
    return jnp.where(real[:, :, None, None], x, 0)


def is_forward(primitive: Any) -> bool:
    """Whether that is cuDNN's forward pass, which also gives what its backward pass needs.

    With runs that is a number for every query, head and run, of which most mean nothing. It lies
    within JAX's own gradient rule, where no `checkpoint_name` reaches.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


def extents(ids: Int[Array, "b n"], runs: int) -> tuple[Int[Array, "b r"], Int[Array, "b r1"]]:
    """Length and first token of each id in [0, runs), -1 where there is none; one -1 more of these.

    The lengths and offsets that cuDNN's packed sequences are described with.
    """
    there = ids[:, :, None] == jnp.arange(runs)[None, None, :]
    lengths = jnp.sum(there, axis=1, dtype=jnp.int32)
    first = jnp.argmax(there, axis=1).astype(jnp.int32)
    lengths, first = (jnp.where(lengths > 0, x, -1) for x in (lengths, first))
    return lengths, jnp.pad(first, ((0, 0), (0, 1)), constant_values=-1)


def _fill_up(x, ids, *, multiple: int):
    """Appends tokens of a segment of their own, up to a multiple of `multiple`."""
    fill = -x.shape[1] % multiple
    x = jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0)))
    return x, jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, fill)), constant_values=_FILL)
