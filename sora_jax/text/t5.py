"""T5-family text encoder: T5 1.0, T5 1.1 and UMT5, in the arithmetic of their published weights.

Pre-norm blocks on a float32 residual stream, x + attention(norm(x)) then x + mlp(norm(x)), and
a final norm. Positions enter only through a learned bias on the attention logits, one value
per head and bucket of relative position (Raffel et al. 2020, arXiv:1910.10683, section 2.1).
Logits are not divided by sqrt(head_dim): the initialisation of the query carries that factor.
T5 shares the bias of the first layer among all layers; UMT5 (Chung et al. 2023,
arXiv:2304.09151) learns one per layer.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sora_jax import layers, sharding
from sora_jax.types import TextEmb, TextIds, TextMask

MLPS = ("gated-gelu", "relu")
DTYPES = ("float32", "bfloat16")

# Our field -> the name in a config.json of transformers.
_NAMES = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "depth": "num_layers",
    "num_heads": "num_heads",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "mlp": "feed_forward_proj",
    "eps": "layer_norm_epsilon",
    "init_factor": "initializer_factor",
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder; the defaults make a small one over bytes, trained from scratch.

    Args:
      head_dim: per head; num_heads * head_dim need not equal width.
      num_buckets: buckets of relative position, half for each direction.
      max_distance: tokens; all longer distances share the last bucket.
      mlp: "gated-gelu" (T5 1.1, UMT5; the tanh form of GELU) or "relu" (T5 1.0).
      per_layer_bias: True for UMT5; False for T5, whose layers share one bias.
      init_factor: multiplies every initial standard deviation, and nothing else.
      dtype: of the operands of matrix products; sums, norms and softmax are float32.
      remat: recompute each layer in the backward pass. Not part of the file, nor is dtype.

    Raises:
      ValueError: for sizes out of range or unknown names.
    """

    vocab_size: int = 384
    width: int = 256
    head_dim: int = 64
    mlp_dim: int = 640
    depth: int = 4
    num_heads: int = 4
    num_buckets: int = 32
    max_distance: int = 128
    mlp: str = "gated-gelu"
    per_layer_bias: bool = True
    eps: float = 1e-6
    init_factor: float = 1.0
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "width", "head_dim", "mlp_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"text.{name} is {getattr(self, name)}; allowed are 1 and more.")
        if self.num_buckets < 4 or self.num_buckets % 4:
            low = max(4, self.num_buckets // 4 * 4)
            raise ValueError(
                f"text.num_buckets is {self.num_buckets}; allowed are multiples of 4: "
                f"use {low} or {low + 4}."
            )
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"text.max_distance is {self.max_distance}; allowed is more than num_buckets / 4 "
                f"= {self.num_buckets // 4}."
            )
        for name, allowed in (("mlp", MLPS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"text.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}."
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, dtype: str = "float32") -> "T5Config":
        """The config that a text encoder's config.json describes; unrelated keys are ignored.

        Raises:
          ValueError: for another model_type, or where sizes are missing.
        """
        kind = config.get("model_type")
        if kind not in ("umt5", "t5"):
            raise ValueError(
                f"text encoder's model_type is {kind!r}; supported: umt5, t5; name another folder."
            )
        required = ("vocab_size", "width", "head_dim", "mlp_dim", "depth", "num_heads")
        missing = [_NAMES[name] for name in required if _NAMES[name] not in config]
        if missing:
            raise ValueError(f"text encoder's config.json lacks {', '.join(missing)}; add them.")
        fields = {ours: config[theirs] for ours, theirs in _NAMES.items() if theirs in config}
        # Files of T5 1.0 predate the key.
        fields.setdefault("mlp", "relu" if kind == "t5" else "gated-gelu")
        return cls(**fields, per_layer_bias=kind == "umt5", dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        """The config.json from which transformers builds the same encoder."""
        kind = "umt5" if self.per_layer_bias else "t5"
        return {
            "architectures": [f"{kind.upper()}EncoderModel"],
            "model_type": kind,
            **{theirs: getattr(self, ours) for ours, theirs in _NAMES.items()},
            # No dropout here: without this, a model left in train mode would add some.
            "dropout_rate": 0.0,
            "is_encoder_decoder": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }


def position_buckets(
    relative: Int[np.ndarray, "*shape"], *, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "*shape"]:
    """Bucket of each relative position (key minus query), in [0, num_buckets).

    Keys behind the query take the first half of the buckets, keys ahead the second. In a half,
    the first h/2 = num_buckets / 4 distances have a bucket each, and distance n further away
    has h/2 + floor(h/2 * log(n / (h/2)) / log(max_distance / (h/2))), h - 1 at most.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.abs(relative)
    # float32 step by step, as the published weights were trained: it decides boundary cases.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    scaled = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + scaled.astype(np.int32), half - 1)
    bucket = np.where(distance < exact, distance, far) + np.where(relative > 0, half, 0)
    return bucket.astype(np.int32)


class RelativeBias(nnx.Module):
    """A learned addition to the attention logits, by head and bucket of relative position."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        stddev = config.init_factor * config.width**-0.5
        shape = (config.num_buckets, config.num_heads)
        table = stddev * jax.random.normal(rngs.params(), shape)
        self.table = nnx.Param(table, axes=("buckets", "heads"))
        self.max_distance = config.max_distance

    def __call__(self, length: int) -> Float[Array, "1 k q l"]:
        table = self.table[...].astype(jnp.float32)
        # Position 0 .. length-1, then -length .. -1: row i of the result is this row, rotated
        # right by i. Reading it over and over with a stride one short of its length does that
        # without a gather, whose gradient (a scatter of length^2 values) would be slow.
        relative = np.fft.fftfreq(2 * length, 1 / (2 * length)).round().astype(np.int32)
        buckets = position_buckets(
            relative, num_buckets=table.shape[0], max_distance=self.max_distance
        )
        select = jax.nn.one_hot(buckets, table.shape[0])
        row = jnp.einsum("rz,zk->kr", select, table, precision="highest")
        rows = jnp.tile(row, (1, length))[:, : length * (2 * length - 1)]
        return rows.reshape(1, table.shape[1], length, 2 * length - 1)[..., :length]


class Attention(nnx.Module):
    """Self-attention without a logit scale, in which a bias stands for positions."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        inner = config.num_heads * config.head_dim

        def linear(size_in, size_out, axes, stddev):
            return layers.Linear(
                size_in,
                size_out,
                axes=axes,
                rngs=rngs,
                bias=False,
                init=nnx.initializers.normal(config.init_factor * stddev),
                dtype=config.dtype,
            )

        in_axes, out_axes = ("embed", "heads"), ("heads", "embed")
        self.q = linear(config.width, inner, in_axes, (config.width * config.head_dim) ** -0.5)
        self.k = linear(config.width, inner, in_axes, config.width**-0.5)
        self.v = linear(config.width, inner, in_axes, config.width**-0.5)
        self.o = linear(inner, config.width, out_axes, inner**-0.5)
        self.relative_bias = RelativeBias(config, rngs=rngs) if config.per_layer_bias else None
        self.num_heads = config.num_heads
        self.dtype = config.dtype

    def __call__(
        self,
        x: Float[Array, "b l d"],
        allowed: Bool[Array, "b 1 q l"],
        *,
        shared_bias: Float[Array, "1 k l l"] | None = None,
    ) -> Float[Array, "b l d"]:
        def heads(projected):
            split = projected.reshape(*projected.shape[:2], self.num_heads, -1)
            split = sharding.constrain(split, "batch", "text_tokens", "act_heads", None)
            return split.swapaxes(1, 2)  # heads first: products without transposes on CPUs

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        bias = shared_bias if self.relative_bias is None else self.relative_bias(x.shape[1])
        logits = layers.contract("bkqe,bkle->bkql", q, k, self.dtype)
        logits = jnp.where(allowed, logits + bias, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1)
        y = layers.contract("bkql,bkle->bkqe", weights, v, self.dtype).swapaxes(1, 2)
        return self.o(y.reshape(*y.shape[:2], -1))


class MLP(nnx.Module):
    """wo(gelu(wi_0 x) * wi_1 x), or wo(relu(wi_0 x)) without a gate (T5 1.0)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        def linear(size_in, size_out, axes):
            return layers.Linear(
                size_in,
                size_out,
                axes=axes,
                rngs=rngs,
                bias=False,
                init=nnx.initializers.normal(config.init_factor * size_in**-0.5),
                dtype=config.dtype,
            )

        gated = config.mlp == "gated-gelu"
        self.wi_0 = linear(config.width, config.mlp_dim, ("embed", "mlp"))
        self.wi_1 = linear(config.width, config.mlp_dim, ("embed", "mlp")) if gated else None
        self.wo = linear(config.mlp_dim, config.width, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        if self.wi_1 is None:
            hidden = jax.nn.relu(self.wi_0(x))
        else:
            hidden = jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x)
        return self.wo(sharding.constrain(hidden, "batch", "text_tokens", "act_mlp"))


class Block(nnx.Module):
    """One layer: attention, then MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.attention_norm = layers.RMSNorm(config.width, eps=config.eps)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = layers.RMSNorm(config.width, eps=config.eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        allowed: Bool[Array, "b 1 q l"],
        *,
        shared_bias: Float[Array, "1 k l l"] | None = None,
    ) -> Float[Array, "b l d"]:
        x = x + self.attention(self.attention_norm(x), allowed, shared_bias=shared_bias)
        x = x + self.mlp(self.mlp_norm(x))
        return sharding.constrain(x, "batch", "text_tokens", "act_embed")


class T5Encoder(nnx.Module):
    """Token ids to float32 embeddings.

    Initialised as T5 is, with normal distributions: embeddings of deviation 1; k, v, o and
    the MLP of fan-in^-1/2; q smaller by head_dim^-1/2, in place of a logit scale; norms 1.
    So the first logits have deviation 1 and the output, behind its norm, rms 1.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = layers.Embedding(
            config.vocab_size, config.width, rngs=rngs, stddev=config.init_factor
        )
        self.relative_bias = None if config.per_layer_bias else RelativeBias(config, rngs=rngs)
        self.blocks = jax.vmap(lambda rngs: Block(config, rngs=rngs))(rngs.split(config.depth))
        self.norm = layers.RMSNorm(config.width, eps=config.eps)

    def __call__(
        self, ids: TextIds, mask: TextMask, *, segment_ids: Int[Array, "b l"] | None = None
    ) -> TextEmb:
        """Embeddings of `ids`.

        Padding changes no valid row; rows of padding hold values without meaning.

        Args:
          mask: True on real tokens; no token attends to the others.
          segment_ids: of texts packed into one row, each without gaps: tokens attend within
            their own segment only.
        """
        allowed = mask[:, None, None, :]
        if segment_ids is not None:
            same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
            allowed = allowed & same
        shared_bias = None if self.relative_bias is None else self.relative_bias(ids.shape[1])
        x = self.embed(ids).astype(jnp.float32)
        x = sharding.constrain(x, "batch", "text_tokens", "act_embed")
        graph, params = nnx.split(self.blocks, nnx.Param)

        def layer(x, params):
            return nnx.merge(graph, params)(x, allowed, shared_bias=shared_bias), None

        if self.config.remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        x, _ = jax.lax.scan(layer, x, params)
        return self.norm(x)
