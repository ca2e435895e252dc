"""The method of prediction against steps that others measured and published.

Their programs are not ours, so these are predicted in closed form, by the same rates: matrix
products at `MATMUL` of peak, attention kernels by their cycles, elementwise work by bytes,
collectives by bytes over links. No figure is fitted to the steps. What is assumed of them: jax's
splash attention, in its default tiles of 512 x 512 on v5p and on v7x in those of 3024 x 2048 that
their configuration names for newer chips; every collective waited for by the video transformers,
and hidden by the language model, whose configuration asks the compiler for that.
"""

from typing import NamedTuple

from sora_jax import chips
from sora_jax.plan import collectives, kernels

# Of peak, what our own compiled 14B step reaches in matrix products with what is fused into them,
# by the compiler's cycles (v5p, 18,900 tokens a device).
MATMUL = 0.75
# Bytes over HBM of a layer's norms, modulation, rotations and copies, a token and channel, in the
# two forward and one backward passes of full rematerialisation: of the same program, 95 ms a layer.
ELEMENTWISE = 2700.0


class VideoStep(NamedTuple):
    """A measured step of a video transformer, full rematerialisation, split backward attention."""

    what: str
    source: str
    chip: str
    chips: int
    rows: float  # of `tokens` tokens, in one step
    context: int  # devices that share a row
    seconds: float
    tiles: float = 1.0  # of 512 x 512 in a grid step of their attention
    depth: int = 40
    width: int = 5120
    ffn: int = 13824
    head_dim: int = 128
    tokens: int = 75_600


class LanguageStep(NamedTuple):
    """A measured step of a language model with gated MLPs and causal attention.

    What is computed again: attention, and the two products into the MLP.

    Args:
      rows: of `tokens` tokens, on one chip.
      mfu: measured, by full squares of attention, as the source counts.
    """

    what: str
    source: str
    chip: str
    rows: int
    mfu: float
    depth: int
    width: int
    ffn: int
    kv_width: int  # of keys and values, each
    head_dim: int
    vocabulary: int
    tokens: int = 4096

    @property
    def linear(self) -> float:
        """Forward FLOPs of a row in one layer's products."""
        mixing = 2 * self.width + 2 * self.kv_width
        return 2.0 * self.tokens * self.width * (mixing + 3 * self.ffn)

    @property
    def readout(self) -> float:
        """Forward FLOPs of a row's logits."""
        return 2.0 * self.tokens * self.width * self.vocabulary

    @property
    def seconds(self) -> float:
        attention = 4.0 * self.tokens**2 * self.width
        forward = self.depth * (self.linear + attention) + self.readout
        return 3 * forward * self.rows / (self.mfu * _chip(self.chip).device_flops)


# Bytes over HBM of a layer's norms, rotations, gates and sums, a token and channel, in bfloat16:
# 41 of a forward pass with MLPs 3.5 times as wide, which is made twice and gone through backwards.
_GATED = 41 * 4

STEPS = (
    VideoStep(
        "Wan2.1-14B, 81 frames of 720p, batch 1 on 4 v5p chips",
        "MaxDiffusion",
        *("v5p", 4, 1, 4, 36.0),
    ),
    VideoStep(
        "Wan2.1-14B, 81 frames of 720p, batch 32 on 64 v7x chips",
        "MaxDiffusion",
        *("v7x", 64, 32, 4, 24.58, 3024 * 2048 / 512**2),
    ),
    LanguageStep(
        "Llama 2 70B, 4 rows of 4,096 tokens a chip, 64 v5p chips",
        "MaxText",
        *("v5p", 4, 0.65, 80, 8192, 28_672, 1024, 128, 32_000),
    ),
)


class Check(NamedTuple):
    predicted: float
    measured: float
    parts: dict[str, float]  # seconds

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def predict(step: VideoStep | LanguageStep) -> Check:
    """Seconds by part of a step."""
    parts = _language(step) if isinstance(step, LanguageStep) else _video(step)
    return Check(sum(parts.values()), step.seconds, parts)


def _chip(name: str) -> chips.Chip:
    return next(chip for chip in chips.CHIPS if chip.name == name)


def _language(step: LanguageStep) -> dict[str, float]:
    chip = _chip(step.chip)
    again = 2.0 * step.tokens * 2 * step.width * step.ffn
    products = step.depth * (3 * step.linear + again) + 3 * step.readout
    squares = step.depth * step.tokens**2 * step.width / 2  # of which the mask leaves half
    passes = _attention_passes(step.head_dim, chip, tiles=1.0)
    moved = _GATED * step.tokens * step.width * step.depth
    return {
        "matrix products": step.rows * products / (MATMUL * chip.device_flops),
        "attention": step.rows * squares / chip.device_flops * passes,
        "elementwise": step.rows * moved / chip.device_hbm_bandwidth,
    }


def _video(step: VideoStep) -> dict[str, float]:
    """Whole keys and values are gathered, and all collectives waited for."""
    chip = _chip(step.chip)
    devices = step.chips * chip.devices
    share = step.rows / devices
    t, d = step.tokens, step.width
    linear = 2 * t * d * (8 * d + 2 * step.ffn)  # q, k, v, out and cross-attention's q, out; MLP
    attention, passes = t * t * d, _attention_passes(step.head_dim, chip, tiles=step.tiles)
    layers = {
        "matrix products": 4 * linear * share / (MATMUL * chip.device_flops),
        "attention": attention * share / chip.device_flops * passes,
        "elementwise": ELEMENTWISE * t * d * share / chip.device_hbm_bandwidth,
        "collectives": _collectives(step, chip),
    }
    return {name: step.depth * value for name, value in layers.items()}


def _attention_passes(head_dim: int, chip: chips.Chip, *, tiles: float) -> float:
    """Operations over T^2 D, each over its kernel's share of peak: forward twice, then seven
    products in two kernels."""
    passes = (("splash_mha_fwd", 2 * 4), ("splash_mha_dq", 6), ("splash_mha_dkv", 8))
    return sum(
        operations / kernels.share_of_peak(name, chip, head_dim=head_dim, per_step=tiles)
        for name, operations in passes
    )


def _collectives(step: VideoStep, chip: chips.Chip) -> float:
    """Of one layer: K and V gathered twice, their gradients reduced, weights gathered twice and
    their gradients reduced, over two links."""
    link = 2 * chip.ici_link * collectives.LINK_EFFICIENCY / chip.devices
    rows = step.rows * step.context / (step.chips * chip.devices)  # of one group of `context`
    kv = 2 * step.tokens * step.width * rows
    weights = 2 * (8 * step.width**2 + 2 * step.width * step.ffn)
    cut = (step.context - 1) / step.context
    return cut * (4 * kv + 2 * 2 * kv + 2 * weights + 2 * weights) / link
