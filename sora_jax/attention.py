"""One attention function; the only file that selects a kernel.

softmax(q k^T / sqrt(e) + bias) v, where a query sees the keys of its own segment id. A query
whose segment holds no key gets a finite, meaningless row: give such padding no loss weight.

On a mesh whose `context` axis cuts the tokens, heads and tokens change places around the kernel
(Ulysses: Jacobs et al. 2023, arXiv:2309.14509) as far as heads divide, and keys go round in rings
over the rest of the axis (ring_attention.py); nothing gathers keys whole.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sora_jax import cudnn_attention, layers, ring_attention, sharding
from sora_jax.blocked_attention import MASKED, Keys
from sora_jax.ring_attention import RESIDUALS, Kernel, Ring

IMPLEMENTATIONS = ("auto", "xla", "blocked", "cudnn", "flash", "reference")
CONTEXTS = ("auto", "ulysses", "ring")

# From this many queries on, whole logits cost more than tiles, on a TPU or GPU.
_TILES_MIN_TOKENS = 1024


def select(
    implementation: str,
    dtype: str,
    *,
    platform: str,
    head_dim: int,
    q_len: int,
    kv_bias: bool,
) -> str:
    """The kernel that will run: one of IMPLEMENTATIONS, but for "auto".

    - All but "cudnn" take everything and are what they say.
    - A `kv_bias` (cross-attention's weight of the padding) needs float32 logits, which cuDNN's
      masks do not give: it makes way for "blocked" or "xla" there.
    - "auto": "blocked" on CPUs. On a TPU "flash" from 1024 queries on. On a GPU cuDNN, for 16-bit
      operands and a head dimension that is a multiple of 8 up to 128; where it cannot, "blocked"
      from as many queries on. "xla" for what is left.

    Raises:
      ValueError: for an unknown name, or for cuDNN with operands that it has no kernel for.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention {implementation!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}."
        )
    cudnn_fits = dtype in ("bfloat16", "float16") and head_dim % 8 == 0 and head_dim <= 128
    many = q_len >= _TILES_MIN_TOKENS
    if implementation == "cudnn":
        if kv_bias:
            return "blocked" if many else "xla"
        if not cudnn_fits:
            raise ValueError(
                f"attention 'cudnn' has no kernel for {dtype} with head dimension {head_dim}; it "
                "takes bfloat16 and head dimensions that are multiples of 8 up to 128: use 'xla'."
            )
    if implementation != "auto":
        return implementation
    if platform == "cpu":
        return "blocked"
    if platform in layers.GPUS and cudnn_fits and not kv_bias:
        return "cudnn"
    if not many:
        return "xla"
    return "flash" if platform == "tpu" else "blocked"


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
    context: str = "auto",
    dtype: str = "float32",
    scaled: bool = False,
    runs: int | None = None,
    interpret: bool = False,
) -> Float[Array, "b n k e"]:
    """Scaled dot-product attention (Vaswani et al. 2017, Eq. 1); float32 result.

    Args:
      q_segment_ids: with `kv_segment_ids`, a query sees the keys whose id equals its own.
      kv_bias: added to every logit of a key: 0, log of a multiplicity, or MASKED. Not
        differentiated by callers.
      kv_axis: logical axis of the keys' tokens: "tokens" or "text_tokens".
      implementation: one of IMPLEMENTATIONS; see `select`.
      context: how tokens on several devices meet, one of CONTEXTS; see `Exchange`.
      dtype: of the operands of both matrix products; logits and softmax are float32.
      scaled: queries are times `query_scale` already, which those of "flash" alone may be.
      runs: queries and keys of each id in [0, runs) lie side by side, in the order of the ids,
        which are the same for both; other ids are padding. Kernels that can use it are faster.
      interpret: runs "flash" in Pallas' interpreter, for tests off TPU.

    Raises:
      ValueError: for what `select` or `exchange` rejects, segment ids on one side only, or
        queries scaled for a kernel that will not run.
    """
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError(
            "attention got segment ids for queries or keys only; give both or neither."
        )
    platform = sharding.platform()
    kernel = select(
        implementation,
        dtype,
        platform=platform,
        head_dim=q.shape[-1],
        q_len=q.shape[1],
        kv_bias=kv_bias is not None,
    )
    if scaled and kernel != "flash":
        raise ValueError(f"queries are scaled for 'flash', and {kernel!r} would run.")
    q = sharding.constrain(q, "batch", "tokens", "act_heads", None)
    k = sharding.constrain(k, "batch", kv_axis, "act_heads", None)
    v = sharding.constrain(v, "batch", kv_axis, "act_heads", None)
    if kernel in ("reference", "xla"):
        mask = _mask(q_segment_ids, kv_segment_ids)
        if kernel == "reference":
            out = _reference(q, k, v, mask, kv_bias)
        else:
            out = _xla(q, k, v, mask, kv_bias, dtype=dtype)
        out = checkpoint_name(out, RESIDUALS)
    else:
        keys = Keys(k.astype(dtype), v.astype(dtype), kv_segment_ids, kv_bias)
        part = Kernel(kernel, dtype, platform, interpret, runs=runs)
        if kernel == "cudnn":
            q = q.astype(dtype)
        elif not scaled:  # before they are rounded
            q = (q.astype(jnp.float32) * part.query_scale(q.shape[-1])).astype(dtype)
        out = _on_mesh(part, q, q_segment_ids, keys, kv_axis=kv_axis, context=context)
    return sharding.constrain(out.astype(jnp.float32), "batch", "tokens", "act_heads", None)


class Exchange(NamedTuple):
    """How queries and keys cut over `size` devices of the context axis meet.

    Groups of `ulysses` neighbours exchange heads for tokens; `ring` groups pass keys round.
    """

    ulysses: int = 1
    ring: int = 1

    @property
    def size(self) -> int:
        return self.ulysses * self.ring


def exchange(context: str, *, size: int, heads: int) -> Exchange:
    """The exchange over `size` devices that have `heads` heads each.

    "auto" takes Ulysses as far as heads divide, for it moves least, and rings over the rest.

    Raises:
      ValueError: for an unknown name, or too few heads for "ulysses" alone.
    """
    if context not in CONTEXTS:
        raise ValueError(f"context {context!r} is unknown; use one of {', '.join(CONTEXTS)}.")
    if context == "ulysses" and heads % size:
        fitting = [d for d in range(1, heads + 1) if heads % d == 0]
        raise ValueError(
            f"dit.context 'ulysses' cuts {heads} heads (of each tensor shard) over mesh.context "
            f"{size}, which does not divide them; use mesh.context of {fitting}, or 'auto'."
        )
    ulysses = 1 if context == "ring" else math.gcd(heads, size)
    return Exchange(ulysses, size // ulysses)


def _on_mesh(kernel: Kernel, q, q_ids, keys: Keys, *, kv_axis: str, context: str):
    """`kernel` on each shard of the mesh, of queries and keys with heads whole or cut."""
    mesh = sharding.current_mesh()
    if mesh is None or mesh.size == 1:
        return _local(kernel, q, q_ids, keys)
    axis = sharding.CONTEXT
    whole_text = kv_axis != "tokens"
    names = {
        "q": ("batch", "tokens", "act_heads", None),
        "k": ("batch", None if whole_text else "tokens", "act_heads", None),
        "q_ids": ("batch", "tokens"),
        "ids": ("batch", None if whole_text else "tokens"),
    }
    spec = lambda name, x: None if x is None else sharding.fitted(mesh, x.shape, *names[name])  # noqa: E731
    specs = (
        spec("q", q),
        spec("q_ids", q_ids),
        Keys(spec("k", keys.k), spec("k", keys.v), spec("ids", keys.ids), spec("ids", keys.bias)),
    )
    heads = q.shape[2] // sharding.shards_of(mesh, specs[0], 2)
    cut = sharding.shards_of(mesh, specs[0], 1)
    # Not cut where tokens do not divide over the axis: each device has them all.
    way = Exchange() if whole_text else exchange(context, size=cut, heads=heads)
    if kernel.name == "cudnn" and way.ring > 1:
        kernel = Kernel("blocked", kernel.dtype, kernel.platform)  # cuDNN tells no sums
        q = (q.astype(jnp.float32) * kernel.query_scale(q.shape[-1])).astype(q.dtype)
    ring = Ring(axis, way.size, way.ring)

    def local(q, q_ids, keys):
        if way.ulysses > 1:
            groups = [list(range(i, i + way.ulysses)) for i in range(0, way.size, way.ulysses)]
            swap = functools.partial(
                jax.lax.all_to_all, axis_name=axis, axis_index_groups=groups, tiled=True
            )
            whole = functools.partial(swap, split_axis=2, concat_axis=1)
            gather = functools.partial(
                jax.lax.all_gather, axis_name=axis, axis=1, axis_index_groups=groups, tiled=True
            )
            ids, bias = jax.tree.map(gather, (keys.ids, keys.bias))
            q, q_ids = whole(q), jax.tree.map(gather, q_ids)
            keys = Keys(whole(keys.k), whole(keys.v), ids, bias)
        out = _local(kernel, q, q_ids, keys, ring)
        if way.ulysses > 1:
            out = swap(out, split_axis=1, concat_axis=2)
        return out

    # The partitioner can neither see into a Pallas call nor cut a loop over tiles: without
    # shard_map it would gather all.
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(
        q, q_ids, keys
    )


def _local(kernel: Kernel, q, q_ids, keys: Keys, ring: Ring = ring_attention.ALONE):
    if kernel.name == "cudnn":
        # Not named: what its backward pass needs is kept by `cudnn_attention.is_forward`.
        return cudnn_attention.attend(q, keys.k, keys.v, q_ids, keys.ids, runs=kernel.runs)
    return ring_attention.attend(q, q_ids, keys, kernel, ring)


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
