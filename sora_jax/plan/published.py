"""The method of prediction against steps that others measured and published.

Their programs are not ours, so these are predicted in closed form, by the same rates: matrix
products at `MATMUL` of peak, attention kernels by their cycles, elementwise work by bytes,
collectives by bytes over links. No figure is fitted to the steps. What is assumed of them: jax's
splash attention, in its default tiles of 512 x 512 on v5p and on v7x in those of 3024 x 2048 that
their configuration names for newer chips, and every collective waited for.
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


class Published(NamedTuple):
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


STEPS = (
    Published(
        "Wan2.1-14B, 81 frames of 720p, batch 1 on 4 v5p chips",
        "MaxDiffusion",
        *("v5p", 4, 1, 4, 36.0),
    ),
    Published(
        "Wan2.1-14B, 81 frames of 720p, batch 32 on 64 v7x chips",
        "MaxDiffusion",
        *("v7x", 64, 32, 4, 24.58, 3024 * 2048 / 512**2),
    ),
)


class Check(NamedTuple):
    predicted: float
    measured: float
    parts: dict[str, float]  # seconds

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def predict(step: Published) -> Check:
    """Seconds by part of a step with whole keys and values gathered, all collectives waited for."""
    chip = next(c for c in chips.CHIPS if c.name == step.chip)
    devices = step.chips * chip.devices
    share = step.rows / devices
    t, d = step.tokens, step.width
    linear = 2 * t * d * (8 * d + 2 * step.ffn)  # q, k, v, out and cross-attention's q, out; MLP
    attention = t * t * d
    layers = {
        "matrix products": 4 * linear * share / (MATMUL * chip.device_flops),
        "attention": attention * share / chip.device_flops * _attention_passes(step, chip),
        "elementwise": ELEMENTWISE * t * d * share / chip.device_hbm_bandwidth,
        "collectives": _collectives(step, chip),
    }
    parts = {name: step.depth * value for name, value in layers.items()}
    return Check(sum(parts.values()), step.seconds, parts)


def _attention_passes(step: Published, chip: chips.Chip) -> float:
    """Operations over T^2 D, each over its kernel's share of peak: forward twice, then seven
    products in two kernels."""
    passes = (("splash_mha_fwd", 2 * 4), ("splash_mha_dq", 6), ("splash_mha_dkv", 8))
    return sum(
        operations / kernels.share_of_peak(name, chip, head_dim=step.head_dim, per_step=step.tiles)
        for name, operations in passes
    )


def _collectives(step: Published, chip: chips.Chip) -> float:
    """Of one layer: K and V gathered twice, their gradients reduced, weights gathered twice and
    their gradients reduced, over two links."""
    link = 2 * chip.ici_link * collectives.LINK_EFFICIENCY / chip.devices
    rows = step.rows * step.context / (step.chips * chip.devices)  # of one group of `context`
    kv = 2 * step.tokens * step.width * rows
    weights = 2 * (8 * step.width**2 + 2 * step.width * step.ffn)
    cut = (step.context - 1) / step.context
    return cut * (4 * kv + 2 * 2 * kv + 2 * weights + 2 * weights) / link
