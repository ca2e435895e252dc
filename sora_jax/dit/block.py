"""One block of the diffusion transformer, and the attention and MLP that it is made of."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from sora_jax import attention, layers, sharding
from sora_jax.dit import heads
from sora_jax.dit.config import BLOCK_INPUT, DiTConfig
from sora_jax.dit.kv_cache import KV, KVCache

_zeros = nnx.initializers.zeros_init()


class Apart(NamedTuple):
    """Blocks whose self-attention keeps to segments of its own.

    Attributes:
      blocks: counted from 0; static.
      ids: the segment of every token there.
      runs: as `attention.attention` takes it.
      given: segments of tokens whose keys and values a `KVCache` takes, which are not in `ids`.
    """

    blocks: tuple[int, ...]
    ids: Int[Array, "b n"]
    runs: int | None = None
    given: Int[Array, "b g"] | None = None


class Pictures(NamedTuple):
    """Embedded image features, and in rows of several segments which of them each token sees.

    Attributes:
      ids: segment of each of the features; None: every token sees all.
      of_tokens: segment whose features a token sees.
    """

    rows: Float[Array, "b i d"]
    ids: Int[Array, "b i"] | None = None
    of_tokens: Int[Array, "b n"] | None = None


class Attention(nnx.Module):
    """Multi-head attention with q and k RMS-normalised over the full width.

    With `image`, the queries also attend to image tokens by keys and values of their own, and the
    two results are added before the output projection.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, out_init=None, image: bool = False):
        linear = functools.partial(
            layers.Linear,
            config.width,
            config.width,
            rngs=rngs,
            dtype=config.linear_dtype,
            rounded=True,
        )
        self.q = linear(axes=("embed", "heads"))
        self.k = linear(axes=("embed", "heads"))
        self.v = linear(axes=("embed", "heads"))
        self.out = linear(axes=("heads", "embed"), init=out_init)
        self.norm_q = layers.RMSNorm(config.width, eps=config.eps)
        self.norm_k = layers.RMSNorm(config.width, eps=config.eps)
        self.k_image = linear(axes=("embed", "heads")) if image else None
        self.v_image = linear(axes=("embed", "heads")) if image else None
        self.norm_k_image = layers.RMSNorm(config.width, eps=config.eps) if image else None
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b n d"],
        source: Float[Array, "b s d"],
        *,
        rotation: heads.Rotation | None = None,
        kv_bias: Float[Array, "b s"] | None = None,
        **kwargs: Any,
    ) -> Float[Array, "b n d"]:
        """Queries from `x`, keys and values from `source`; the rest is as in `attend`."""
        kv = self.keys_values(source, like=x, rotation=rotation, kv_bias=kv_bias)
        return self.attend(x, kv, rotation=rotation, kv_bias=kv_bias, **kwargs)

    def keys_values(
        self,
        source: Float[Array, "b s d"],
        *,
        like: Float[Array, "b n d"],
        rotation: heads.Rotation | None = None,
        kv_bias: Float[Array, "b s"] | None = None,
    ) -> KV:
        """Those of `source`, for queries from `like`; `rotation` is rope's cosines and sines."""
        _, fused = self._passes(like, rotation, kv_bias)
        k = heads.project(
            self.k, self.norm_k, source, rotation, num_heads=self.config.num_heads, fused=fused
        )
        return KV(k, self.v(source).reshape(*source.shape[:2], *k.shape[2:]))

    def attend(
        self,
        x: Float[Array, "b n d"],
        kv: KV,
        *,
        rotation: heads.Rotation | None = None,
        kv_axis: str = "tokens",
        q_segment_ids: Int[Array, "b n"] | None = None,
        kv_segment_ids: Int[Array, "b s"] | None = None,
        kv_bias: Float[Array, "b s"] | None = None,
        runs: int | None = None,
        image: Pictures | None = None,
    ) -> Float[Array, "b n d"]:
        """Queries from `x`, turned by `rotation`, see `kv`."""
        config = self.config
        fused, _ = self._passes(x, rotation, kv_bias)
        q = heads.project(self.q, self.norm_q, x, rotation, num_heads=config.num_heads, fused=fused)
        y = attention.attention(
            q,
            kv.keys,
            kv.values,
            q_segment_ids=q_segment_ids,
            kv_segment_ids=kv_segment_ids,
            kv_bias=kv_bias,
            kv_axis=kv_axis,
            implementation=config.attention,
            context=config.context,
            dtype=config.dtype,
            scaled=fused is not None,
            runs=runs,
        )
        if self.k_image is not None and image is not None:
            shape = (*image.rows.shape[:2], *kv.keys.shape[2:])
            y = y + attention.attention(
                q,
                self.norm_k_image(self.k_image(image.rows)).reshape(shape),
                self.v_image(image.rows).reshape(shape),
                q_segment_ids=image.of_tokens,
                kv_segment_ids=image.ids,
                kv_axis=kv_axis,
                implementation=config.attention,
                dtype=config.dtype,
                scaled=fused is not None,
            )
        return self.out(y.reshape(*x.shape[:2], -1))

    def _passes(self, x, rotation, kv_bias) -> tuple[heads.Pass | None, heads.Pass | None]:
        return heads.passes(
            self.config, x.shape[1], biased=kv_bias is not None, turned=rotation is not None
        )


class MLP(nnx.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(
            layers.Linear, rngs=rngs, dtype=config.linear_dtype, rounded=True
        )
        self.up = linear(config.width, config.ffn_dim, axes=("embed", "mlp"))
        self.down = linear(config.ffn_dim, config.width, axes=("mlp", "embed"))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        y = sharding.constrain(self.up(x), "batch", "tokens", "act_mlp")
        return self.down(jax.nn.gelu(y.astype(jnp.float32), approximate=True))


def to_tokens(
    values: Float[Array, "b times d"], membership: Float[Array, "b n times"] | None
) -> Float[Array, "b n_or_1 d"]:
    """What every segment has to each of its tokens, exactly; a product, for so is its gradient."""
    if membership is None:
        return values
    return jnp.einsum("bns,bsd->bnd", membership, values, precision="highest")


class DiTBlock(nnx.Module):
    """Self-attention, cross-attention, MLP; the identity at initialisation."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        norm = functools.partial(layers.LayerNorm, config.width, eps=config.eps)
        self.norm_self = norm(affine=False)
        self.self_attention = Attention(config, rngs=rngs)
        self.norm_cross = norm() if config.cross_attn_norm else None
        self.cross_attention = Attention(
            config, rngs=rngs, out_init=_zeros, image=config.image_dim is not None
        )
        self.norm_mlp = norm(affine=False)
        self.mlp = MLP(config, rngs=rngs)
        self.modulation = nnx.Param(jnp.zeros((6, config.width)), axes=("time", "norm"))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        text: Float[Array, "b s d"],
        *,
        modulation: Sequence[Float[Array, "b times d"]],
        rotation: tuple[jax.Array, jax.Array],
        text_bias: Float[Array, "b s"] | None,
        segment_ids: Int[Array, "b n"] | None = None,
        text_segment_ids: Int[Array, "b s"] | None = None,
        text_of_tokens: Int[Array, "b n"] | None = None,
        image: Pictures | None = None,
        membership: Float[Array, "b n times"] | None = None,
        num_segments: int = 1,
        apart: tuple[Apart, Bool[Array, ""]] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Array, "b n d"]:
        """The six of `modulation` are those of the row, its tokens, or with `membership` segments.

        They come apart, for of tokens they are as large as what a block keeps: six in one array
        would be written and read once more for every gradient. `apart` comes with whether this is
        one of its blocks; `cache` is this block's.
        """
        x = checkpoint_name(x, BLOCK_INPUT)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            to_tokens(part + own[None, None], membership)
            for part, own in zip(modulation, self.modulation[...], strict=True)
        )

        y = self.norm_self(x) * (1 + scale) + shift
        own = self.self_attention.keys_values(y, like=y, rotation=rotation)
        kv = own if cache is None else cache.seen(own, dtype=self.self_attention.config.dtype)

        def attend(y: jax.Array, ids=segment_ids, runs=num_segments, given=None):
            kv_ids = ids if cache is None else cache.ids(ids, given)
            if kv_ids is not ids:
                runs = None  # which are those of queries
            return self.self_attention.attend(
                y, kv, rotation=rotation, q_segment_ids=ids, kv_segment_ids=kv_ids, runs=runs
            )

        if apart is None:
            y = attend(y)
        else:
            (_, *others), is_apart = apart
            y = jax.lax.cond(is_apart, lambda y: attend(y, *others), attend, y)
        x = sharding.constrain(x + y * gate, "batch", "tokens", "act_embed")
        y = self.cross_attention(
            x if self.norm_cross is None else self.norm_cross(x),
            text,
            kv_axis="text_tokens",
            q_segment_ids=None if text_segment_ids is None else text_of_tokens,
            kv_segment_ids=text_segment_ids,
            kv_bias=text_bias,
            image=image,
        )
        x = x + y
        y = self.mlp(self.norm_mlp(x) * (1 + scale_mlp) + shift_mlp)
        return sharding.constrain(x + y * gate_mlp, "batch", "tokens", "act_embed")
