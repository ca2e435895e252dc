"""Floating-point operations of one forward pass, counted from the config."""

import math
from typing import NamedTuple

from sora_jax.dit.config import DiTConfig


class Flops(NamedTuple):
    """Forward operations by part, a multiplication and an addition counting as two."""

    projections: float  # self-attention's q, k, v and output
    attention: float  # self-attention's two products over pairs of tokens
    cross: float  # cross-attention, projections included
    mlp: float
    embed: float  # patch, time and text embedders, and the head

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def training(self) -> float:
        """Forward and backward: the backward pass multiplies twice as much. No remat."""
        return 3 * self.total


def flops(config: DiTConfig, *, tokens: int, text_tokens: int, image_rows: int = 0) -> Flops:
    """Operations for one example of `tokens` video and `text_tokens` text tokens.

    Matrix products only; one timestep per example. Without `embed` and times 3 it is the
    3 L (8 T D^2 + 4 T D F + 4 T^2 D + 4 T D^2 + 4 S D^2 + 4 T S D) by which peers count a
    training step: L depth, T tokens, S text tokens, D width, F ffn_dim.

    Args:
      image_rows: rows of image features that cross-attention sees too.
    """
    n, s, d, i = float(tokens), float(text_tokens), float(config.width), float(image_rows)
    image = config.image_dim or 0
    patch = math.prod(config.patch_size)
    return Flops(
        projections=config.depth * 8 * n * d * d,
        attention=config.depth * 4 * n * n * d,
        cross=config.depth * (4 * n * d * d + 4 * (s + i) * d * d + 4 * n * (s + i) * d),
        mlp=config.depth * 4 * n * d * config.ffn_dim,
        embed=(
            2 * n * d * patch * (config.in_channels + config.out_channels)
            + 2 * d * (config.freq_dim + 7 * d)
            + 2 * s * d * (config.text_dim + d)
            + 2 * i * image * (image + d)
        ),
    )
