"""CLIP's vision tower (Radford et al. 2021, arXiv:2103.00020), as Wan's I2V models read images.

A vision transformer of pre-norm blocks; what the video transformer sees is the residual stream in
front of the last block, class token and patches, not the pooled vector of the last. The last block
and norm are loaded and kept, so that a checkpoint stays whole, but never run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, UInt8

from sora_jax import layers, sharding
from sora_jax.attention import attention

ACTIVATIONS = ("gelu", "quick_gelu")
# Of the pixels CLIP was trained on, in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Our field -> the name in a config.json of transformers.
_NAMES = {
    "width": "hidden_size",
    "mlp_dim": "intermediate_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of a tower; the defaults are ViT-H/14, which Wan 2.1's I2V models come with.

    Args:
      image_size: pixels on each side of the square it reads.
      patch_size: pixels on each side of one patch.
      activation: "gelu" (exact), or "quick_gelu", x sigmoid(1.702 x), of OpenAI's own towers.
      dtype: of the operands of matrix products. Not part of the file, nor is `attention`, the
        kernel: one of `attention.IMPLEMENTATIONS`.

    Raises:
      ValueError: for sizes that do not divide, or an unknown activation.
    """

    width: int = 1280
    mlp_dim: int = 5120
    depth: int = 32
    num_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    activation: str = "gelu"
    eps: float = 1e-5
    dtype: str = "float32"
    attention: str = "auto"

    def __post_init__(self):
        if self.width % self.num_heads or self.image_size % self.patch_size:
            raise ValueError(
                f"image encoder of width {self.width} with {self.num_heads} heads and images of "
                f"{self.image_size} with patches of {self.patch_size}: both must divide."
            )
        if self.depth < 2:
            raise ValueError(
                f"image encoder of depth {self.depth}: its features are those in front of the "
                "last block, so it needs 2 blocks or more."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"image encoder's activation {self.activation!r} is unknown; use "
                f"{' or '.join(ACTIVATIONS)}."
            )

    @property
    def num_positions(self) -> int:
        """Rows of the features: the class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPVisionConfig":
        """The config that an image encoder's config.json describes; unrelated keys are ignored.

        Raises:
          ValueError: for another model_type, or where sizes are missing.
        """
        kind = config.get("model_type")
        if kind != "clip_vision_model":
            raise ValueError(
                f"image encoder's model_type is {kind!r}; supported: clip_vision_model."
            )
        missing = [_NAMES[name] for name in ("width", "depth") if _NAMES[name] not in config]
        if missing:
            raise ValueError(f"image encoder's config.json lacks {', '.join(missing)}; add them.")
        return cls(**{ours: config[theirs] for ours, theirs in _NAMES.items() if theirs in config})

    def to_dict(self) -> dict[str, Any]:
        """The config.json from which transformers builds the same tower."""
        return {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "num_channels": 3,
            **{theirs: getattr(self, ours) for ours, theirs in _NAMES.items()},
        }


def preprocess(image: UInt8[np.ndarray, "H W 3"], *, size: int) -> Float[np.ndarray, "size size 3"]:
    """An RGB image as the tower takes it: shorter side to `size`, centre, CLIP's statistics."""
    from PIL import Image

    height, width = image.shape[:2]
    short, long = sorted((height, width))
    resized = (size, int(size * long / short))
    picture = Image.fromarray(image).resize(
        resized if width <= height else resized[::-1], Image.Resampling.BICUBIC
    )
    top, left = ((side - size) // 2 for side in (picture.height, picture.width))
    pixels = np.asarray(picture, np.float32)[top : top + size, left : left + size] / 255
    return (pixels - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)


def processor_config(size: int) -> dict[str, Any]:
    """The preprocessor_config.json by which transformers prepares pictures as `preprocess` does."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        **{"do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": size}},
        "resample": 3,  # bicubic
        **{"do_center_crop": True, "crop_size": {"height": size, "width": size}},
        **{"do_rescale": True, "rescale_factor": 1 / 255},
        **{"do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD)},
    }


def resize_matrix(size: int, target: int) -> Float[np.ndarray, "target size"]:
    """Resizes an axis as Pillow's BICUBIC does, before it rounds to bytes.

    The cubic kernel of Keys (1981) with a = -1/2, stretched over the pixels that one replaces.
    """
    step = size / target
    centres = (np.arange(target) + 0.5) * step - 0.5
    d = np.abs(np.arange(size) - centres[:, None]) / max(step, 1.0)
    near = (1.5 * d - 2.5) * d**2 + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = np.where(d < 1, near, np.where(d < 2, far, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


class Block(nnx.Module):
    """Self-attention, then MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        d = config.width

        def linear(size_in, size_out, axes):
            return layers.Linear(size_in, size_out, axes=axes, rngs=rngs, dtype=config.dtype)

        self.norm_attention = layers.LayerNorm(d, eps=config.eps)
        self.q, self.k, self.v = (linear(d, d, ("embed", "heads")) for _ in range(3))
        self.out = linear(d, d, ("heads", "embed"))
        self.norm_mlp = layers.LayerNorm(d, eps=config.eps)
        self.up = linear(d, config.mlp_dim, ("embed", "mlp"))
        self.down = linear(config.mlp_dim, d, ("mlp", "embed"))
        self.config = config

    def __call__(self, x: Float[Array, "b i d"]) -> Float[Array, "b i d"]:
        config, y = self.config, self.norm_attention(x)
        q, k, v = (
            rearrange(project(y), "b i (k e) -> b i k e", k=config.num_heads)
            for project in (self.q, self.k, self.v)
        )
        y = attention(
            *(q, k, v),
            kv_axis="text_tokens",
            implementation=config.attention,
            dtype=config.dtype,
        )
        x = x + self.out(rearrange(y, "b i k e -> b i (k e)"))
        y = self.up(self.norm_mlp(x))
        if config.activation == "gelu":
            y = jax.nn.gelu(y, approximate=False)
        else:
            y = y * jax.nn.sigmoid(1.702 * y)
        return sharding.constrain(x + self.down(y), "batch", None, "act_embed")


class CLIPVision(nnx.Module):
    """Images to the features in front of the last block."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        d = config.width
        self.patch_embed = layers.Linear(
            3 * config.patch_size**2, d, axes=("patch", "embed"), bias=False, rngs=rngs
        )
        self.class_embed = nnx.Param(jnp.zeros(d), axes=("norm",))
        self.positions = nnx.Param(jnp.zeros((config.num_positions, d)), axes=(None, "norm"))
        self.norm_in = layers.LayerNorm(d, eps=config.eps)
        self.blocks = jax.vmap(lambda r: Block(config, rngs=r))(rngs.split(config.depth))
        self.norm_out = layers.LayerNorm(d, eps=config.eps)
        self.config = config

    def __call__(self, image: Float[Array, "b s s 3"]) -> Float[Array, "b i d"]:
        """Features, the class token first, of images that `preprocess` made."""
        p = self.config.patch_size
        patches = rearrange(image, "b (y p) (x q) c -> b (y x) (p q c)", p=p, q=p)
        x = self.patch_embed(patches)
        first = jnp.broadcast_to(self.class_embed[...][None, None], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...][None]
        graph, params = nnx.split(self.blocks, nnx.Param)
        params = jax.tree.map(lambda leaf: leaf[:-1], params)
        x, _ = jax.lax.scan(lambda x, p: (nnx.merge(graph, p)(x), None), self.norm_in(x), params)
        return x
