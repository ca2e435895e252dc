"""One attention function; the only file that selects a kernel.

softmax(q k^T / sqrt(e) + bias) v, where a query sees the keys of its own segment id. A query
whose segment holds no key gets a finite, meaningless row: give such padding no loss weight.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sora_jax import layers, sharding
from sora_jax.blocked_attention import MASKED, RESIDUALS, blocked

IMPLEMENTATIONS = ("auto", "xla", "blocked", "cudnn", "splash", "reference")

# From this many queries and keys on, whole logits cost more than blocks, on a TPU or GPU.
_BLOCKS_MIN_TOKENS = 1024
_SPLASH_BLOCK = 512
_SPLASH_LANES = 128
# Segment of the tokens added to fill a block; no caller's id, not even -1 for padding.
_FILL_SEGMENT = np.iinfo(np.int32).min


def select(
    implementation: str,
    dtype: str,
    *,
    backend: str,
    head_dim: int,
    q_len: int,
    kv_len: int,
    kv_bias: bool,
) -> str:
    """The kernel that will run: one of IMPLEMENTATIONS, but for "auto".

    - "reference", "xla" (whole logits) and "blocked" take everything and are what they say.
    - A `kv_bias` (cross-attention's weight of the padding) needs float32 logits, which these
      have: "cudnn" and "splash" give way to "xla" there.
    - "auto": cuDNN on a GPU for 16-bit operands and a head dimension that is a multiple of 8
      up to 128; splash on a TPU from 1024 queries and keys on; where neither can, "blocked" from
      as many on, and on CPUs always; "xla" for what is left.

    Raises:
      ValueError: for an unknown name, or for cuDNN with operands that it has no kernel for.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention {implementation!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}."
        )
    if implementation in ("reference", "xla", "blocked"):
        return implementation
    fallback = "blocked" if backend == "cpu" and implementation == "auto" else "xla"
    if kv_bias:
        return fallback
    cudnn_fits = dtype in ("bfloat16", "float16") and head_dim % 8 == 0 and head_dim <= 128
    if implementation == "cudnn" and not cudnn_fits:
        raise ValueError(
            f"attention 'cudnn' has no kernel for {dtype} with head dimension {head_dim}; it takes "
            "bfloat16 and head dimensions that are multiples of 8 up to 128: use 'xla'."
        )
    if implementation != "auto":
        return implementation
    if backend in ("gpu", "cuda") and cudnn_fits:
        return "cudnn"
    if min(q_len, kv_len) >= _BLOCKS_MIN_TOKENS:
        return "splash" if backend == "tpu" else "blocked"
    return fallback


def attention(
    q: Float[Array, "b n k e"],
    k: Float[Array, "b s k e"],
    v: Float[Array, "b s k e"],
    *,
    q_segment_ids: Int[Array, "b n"] | None = None,
    kv_segment_ids: Int[Array, "b s"] | None = None,
    kv_bias: Float[Array, "b s"] | None = None,
    kv_axis: str = "tokens",
    implementation: str = "auto",
    dtype: str = "float32",
    interpret: bool = False,
) -> Float[Array, "b n k e"]:
    """Scaled dot-product attention (Vaswani et al. 2017, Eq. 1); float32 result.

    Args:
      q_segment_ids: with `kv_segment_ids`, a query sees the keys whose id equals its own.
      kv_bias: added to every logit of a key: 0, log of a multiplicity, or MASKED. Not
        differentiated by callers.
      kv_axis: logical axis of the keys' tokens: "tokens" or "text_tokens".
      implementation: one of IMPLEMENTATIONS; see `select`.
      dtype: of the operands of both matrix products; logits and softmax are float32.
      interpret: runs splash in Pallas' interpreter, for tests off TPU.

    Raises:
      ValueError: for what `select` rejects, or for segment ids on one side only.
    """
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError(
            "attention got segment ids for queries or keys only; give both or neither."
        )
    kernel = select(
        implementation,
        dtype,
        backend=jax.default_backend(),
        head_dim=q.shape[-1],
        q_len=q.shape[1],
        kv_len=k.shape[1],
        kv_bias=kv_bias is not None,
    )
    q = sharding.constrain(q, "batch", "tokens", "act_heads", None)
    k = sharding.constrain(k, "batch", kv_axis, "act_heads", None)
    v = sharding.constrain(v, "batch", kv_axis, "act_heads", None)
    if kernel == "cudnn":
        out = _cudnn(q, k, v, q_segment_ids, kv_segment_ids, dtype=dtype)
    elif kernel == "splash":
        out = _splash(q, k, v, q_segment_ids, kv_segment_ids, dtype=dtype, interpret=interpret)
    elif kernel == "blocked":
        out = _blocked(q, k, v, q_segment_ids, kv_segment_ids, kv_bias, dtype=dtype)
    else:
        mask = _mask(q_segment_ids, kv_segment_ids)
        if kernel == "reference":
            out = _reference(q, k, v, mask, kv_bias)
        else:
            out = _xla(q, k, v, mask, kv_bias, dtype=dtype)
    if kernel not in ("blocked", "splash"):  # which name their logits' sums too
        out = checkpoint_name(out, RESIDUALS)
    return sharding.constrain(out, "batch", "tokens", "act_heads", None)


def _mask(q_segment_ids, kv_segment_ids) -> jax.Array | None:
    """True where query and key share a segment, (b, 1, n, s)."""
    if q_segment_ids is None:
        return None
    return q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :]


def _probabilities(logits, mask, kv_bias):
    if kv_bias is not None:
        logits = logits + kv_bias.astype(jnp.float32)[:, None, None, :]
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    return jax.nn.softmax(logits, axis=-1)


def _reference(q, k, v, mask, kv_bias):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("bnke,bske->bkns", q, k, precision="highest") * q.shape[-1] ** -0.5
    p = _probabilities(logits, mask, kv_bias)
    return jnp.einsum("bkns,bske->bnke", p, v, precision="highest")


def _xla(q, k, v, mask, kv_bias, *, dtype):
    # Heads before tokens, so that gradients too are plain batched matrix products.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = layers.contract("bkne,bkse->bkns", q, k, dtype) * q.shape[-1] ** -0.5
    out = layers.contract("bkns,bkse->bkne", _probabilities(logits, mask, kv_bias), v, dtype)
    return out.swapaxes(1, 2)


def _cudnn(q, k, v, q_segment_ids, kv_segment_ids, *, dtype):
    length = q.shape[1]
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    if q_segment_ids is not None:
        # With a mask, cuDNN's backward pass wants even lengths.
        q, q_segment_ids = _fill(q, q_segment_ids, multiple=2)
        k, _ = _fill(k, kv_segment_ids, multiple=2)
        v, kv_segment_ids = _fill(v, kv_segment_ids, multiple=2)
    mask = _mask(q_segment_ids, kv_segment_ids)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return out[:, :length].astype(jnp.float32)


def _fill(x, segment_ids, *, multiple):
    """Appends tokens of a segment of their own, up to a multiple of `multiple`."""
    fill = -x.shape[1] % multiple
    x = jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0)))
    if segment_ids is None:
        return x, None
    ids = segment_ids.astype(jnp.int32)
    return x, jnp.pad(ids, ((0, 0), (0, fill)), constant_values=_FILL_SEGMENT)


def _on_shards(local, q, k, v, q_segment_ids, kv_segment_ids, kv_bias=None):
    """`local` of these arguments on each shard; keys and values are whole along `context`."""
    mesh = sharding.current_mesh()
    arguments = (q, k, v, q_segment_ids, kv_segment_ids, kv_bias)
    if mesh is None or mesh.size == 1:
        return local(*arguments)
    queries, keys = ("tokens", "act_heads", None), (None, "act_heads", None)
    axes = (queries, keys, keys, ("tokens",), (None,), (None,))
    specs = tuple(
        None if x is None else sharding._fit(sharding.spec("batch", *names), x.shape, mesh)
        for x, names in zip(arguments, axes, strict=True)
    )
    # The partitioner can neither see into a Pallas call nor cut a loop over blocks: without
    # shard_map it would gather all.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(
        *arguments
    )


def _blocked(q, k, v, q_segment_ids, kv_segment_ids, kv_bias, *, dtype):
    local = lambda *arguments: blocked(*arguments, dtype)  # noqa: E731
    return _on_shards(local, q, k, v, q_segment_ids, kv_segment_ids, kv_bias)


def _splash(q, k, v, q_segment_ids, kv_segment_ids, *, dtype, interpret):
    """jax's own splash attention on each shard."""
    # Splash does not scale: done in float32, before the cast.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(dtype)
    k, v = k.astype(dtype), v.astype(dtype)
    local = functools.partial(_splash_shard, interpret=interpret)
    return _on_shards(local, q, k, v, q_segment_ids, kv_segment_ids).astype(jnp.float32)


def _splash_shard(q, k, v, q_segment_ids, kv_segment_ids, _, *, interpret):
    # Imported here: Pallas costs a second that only TPUs need to pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, q_len, heads, _ = q.shape
    kv_len = k.shape[1]
    q_block, kv_block = _block(q_len), _block(kv_len)
    if q_segment_ids is None and (q_len % q_block or kv_len % kv_block):
        q_segment_ids = jnp.zeros((batch, q_len), jnp.int32)
        kv_segment_ids = jnp.zeros((batch, kv_len), jnp.int32)
    q, q_segment_ids = _fill(q, q_segment_ids, multiple=q_block)
    k, _ = _fill(k, kv_segment_ids, multiple=kv_block)
    v, kv_segment_ids = _fill(v, kv_segment_ids, multiple=kv_block)
    ids = None if q_segment_ids is None else splash.SegmentIds(q_segment_ids, kv_segment_ids)
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[1], k.shape[1]))] * heads)
    kernel = splash.make_splash_mha(
        mask,
        block_sizes=splash.BlockSizes(
            block_q=q_block,
            block_kv=kv_block,
            block_q_dkv=q_block,
            block_kv_dkv=kv_block,
            # Two kernels for the gradient: the fused one keeps a partial dq per block of keys.
            block_q_dq=q_block,
            block_kv_dq=kv_block,
        ),
        residual_checkpoint_name=RESIDUALS,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)[:, :q_len]


def _block(length: int) -> int:
    """Block size for `length` tokens: a multiple of the TPU's 128 lanes, at most 512."""
    return min(_SPLASH_BLOCK, -(-length // _SPLASH_LANES) * _SPLASH_LANES)
