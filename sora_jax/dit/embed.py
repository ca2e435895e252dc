"""Timestep and text embedders, and the key that stands for text padding; no blocks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sora_jax import attention, layers, sharding

# Wan was trained on timesteps in [0, 1000]; ours are in [0, 1].
TIMESTEPS = 1000.0
_MAX_PERIOD = 10000.0
_IMAGE_EPS = 1e-5  # of the norms around the image embedder; all others take the config's
_normal = layers.truncated_normal(0.02)


def sinusoidal(t: Float[Array, "*batch"], freq_dim: int) -> Float[Array, "*batch freq_dim"]:
    """[cos, sin] of 1000 t at geometric frequencies (Vaswani et al. 2017, section 3.5).

    The frequencies are computed in float32 on purpose: Wan's were, and at t = 1 an angle of
    1000 radians makes their rounding visible.
    """
    half = freq_dim // 2
    exponent = -math.log(_MAX_PERIOD) * np.arange(half, dtype=np.float32) / half
    frequencies = np.exp(exponent.astype(np.float32))
    angle = (t.astype(jnp.float32) * TIMESTEPS)[..., None] * frequencies.reshape(
        (1,) * t.ndim + (half,)
    )
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbed(nnx.Module):
    """Flow time to a vector of the model's width: sinusoids, linear, SiLU, linear; float32."""

    def __init__(self, freq_dim: int, width: int, *, rngs: nnx.Rngs):
        self.linear_1 = layers.Linear(
            freq_dim, width, axes=("time", "mlp"), init=_normal, rngs=rngs
        )
        self.linear_2 = layers.Linear(width, width, axes=("mlp", "embed"), init=_normal, rngs=rngs)
        self.freq_dim = freq_dim

    def __call__(self, t: Float[Array, "b n"]) -> Float[Array, "b n d"]:
        return self.linear_2(jax.nn.silu(self.linear_1(sinusoidal(t, self.freq_dim))))


class TextEmbed(nnx.Module):
    """Text encoder's output to the model's width: linear, GELU (tanh), linear."""

    def __init__(self, text_dim: int, width: int, *, rngs: nnx.Rngs, dtype: str = "float32"):
        self.linear_1 = layers.Linear(
            text_dim, width, axes=("embed", "mlp"), init=_normal, rngs=rngs, dtype=dtype
        )
        self.linear_2 = layers.Linear(
            width, width, axes=("mlp", "embed"), init=_normal, rngs=rngs, dtype=dtype
        )

    def __call__(self, text: Float[Array, "b l d_text"]) -> Float[Array, "b l d"]:
        y = jax.nn.gelu(self.linear_1(text), approximate=True)
        return sharding.constrain(self.linear_2(y), "batch", "text_tokens", "act_embed")


class ImageEmbed(nnx.Module):
    """Features of CLIP's vision tower to the model's width: norm, linear, GELU, linear, norm.

    With `positions` (first-and-last-frame models) the features of several images, each `positions
    / count` rows, are one sequence with a learned embedding of its positions.
    """

    def __init__(
        self,
        image_dim: int,
        width: int,
        *,
        positions: int | None = None,
        rngs: nnx.Rngs,
        dtype: str = "float32",
    ):
        linear = functools.partial(layers.Linear, image_dim, rngs=rngs, dtype=dtype)
        self.norm_in = layers.LayerNorm(image_dim, eps=_IMAGE_EPS)
        self.linear_1 = linear(image_dim, axes=("image", "mlp"))
        self.linear_2 = linear(width, axes=("mlp", "embed"))
        self.norm_out = layers.LayerNorm(width, eps=_IMAGE_EPS)
        self.positions = (
            None
            if positions is None
            else nnx.Param(jnp.zeros((positions, image_dim)), axes=(None, "norm"))
        )

    def __call__(self, image: Float[Array, "b i d_image"]) -> Float[Array, "b i d"]:
        """Raises ValueError for another number of rows than `positions`."""
        if self.positions is not None:
            if image.shape[1] != self.positions.shape[0]:
                raise ValueError(
                    f"image features have {image.shape[1]} rows, this model takes "
                    f"{self.positions.shape[0]}: those of its first and last frame together."
                )
            image = image + self.positions[...][None]
        y = jax.nn.gelu(self.linear_1(self.norm_in(image)), approximate=False)
        return self.norm_out(self.linear_2(y))


def append_zero_rows(
    text_emb: Float[Array, "b l d_text"], num_rows: int
) -> Float[Array, "b s d_text"]:
    """`text_emb` and `num_rows` rows of zeros: the padding keys, before the text embedder."""
    return jnp.pad(text_emb, ((0, 0), (0, num_rows), (0, 0)))


def whole_text(
    text_emb: Float[Array, "b l d_text"], text_mask: Bool[Array, "b l"], text_len: int
) -> Float[Array, "b text_len d_text"]:
    """`text_emb` with zeros as padding up to `text_len`, all of which is attended to, as by Wan."""
    text_emb = jnp.where(text_mask[..., None], text_emb, 0)
    return append_zero_rows(text_emb, text_len - text_emb.shape[1])


def padding_bias(
    text_mask: Bool[Array, "b l"],
    text_segment_ids: Int[Array, "b l"] | None,
    *,
    text_len: int,
    num_segments: int,
) -> Float[Array, "b s"]:
    """Logit bias of the l given keys and of `num_segments` padding keys after them.

    Wan attends, without a mask, to `text_len` rows of which the padding is zero before the
    embedder. n equal keys weigh as one whose logit is larger by log n, so one zero row with
    that bias replaces them, exactly: 0 for valid keys, MASKED for the others, and log(text_len
    - valid) for the padding key of each segment (MASKED where nothing is padded).
    """
    valid = text_mask[:, :, None]
    if text_segment_ids is not None:
        segments = jnp.arange(num_segments)[None, None, :]
        valid = valid & (text_segment_ids[:, :, None] == segments)
    padding = text_len - jnp.sum(valid, axis=1)
    given = jnp.where(text_mask, 0.0, attention.MASKED)
    zeros = jnp.where(padding > 0, jnp.log(jnp.maximum(padding, 1)), attention.MASKED)
    return jnp.concatenate([given, zeros], axis=1).astype(jnp.float32)
