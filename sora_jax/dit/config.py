"""Settings of the diffusion transformer, and their form in diffusers' config.json."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from sora_jax import attention, cudnn_attention
from sora_jax.quantized import QUANTIZED

DTYPES = ("float32", "bfloat16")
QK_NORM = "rms_norm_across_heads"

BLOCK_INPUT = "block_input"  # name of the residual stream as it enters a block
_policies = jax.checkpoint_policies


def _offload(*, keep: tuple[str, ...] = (), send: tuple[str, ...]):
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(keep),
        names_which_can_be_offloaded=list(send),
        offload_src="device",
        offload_dst="pinned_host",
    )


@functools.cache
def _name_primitive():
    return jax.make_jaxpr(lambda x: checkpoint_name(x, ""))(0.0).eqns[0].primitive


def _with_cudnn(policy):
    """`policy`, doing with results of cuDNN's attention what it does with those of our kernels."""

    def decide(primitive, *args, **params):
        if cudnn_attention.is_forward(primitive):
            return policy(_name_primitive(), *args, name=attention.RESIDUALS)
        return policy(primitive, *args, **params)

    return decide


# What a block keeps for its backward pass; the rest is computed again.
REMAT: dict[str, Any] = {
    "none": None,  # everything: no rematerialisation
    "full": _policies.nothing_saveable,  # the block's input
    "dots": _policies.dots_saveable,  # results of all matrix products, attention logits too
    "dots_no_batch": _policies.dots_with_no_batch_dims_saveable,  # of the linear layers
    # The input and what attention gave, with what its own backward pass needs of it.
    "attention_out": _with_cudnn(_policies.save_only_these_names(attention.RESIDUALS)),
    # Results of linear layers, and of attention: nothing large is multiplied again.
    "dots_no_batch_attention_out": _with_cudnn(
        _policies.save_from_both_policies(
            _policies.dots_with_no_batch_dims_saveable,
            _policies.save_only_these_names(attention.RESIDUALS),
        )
    ),
    # "full", and the input waits in the host's memory.
    "offload": _offload(send=(BLOCK_INPUT,)),
    # "attention_out" with the input in the host's memory, and with both there.
    "attention_out_offload_input": _with_cudnn(
        _offload(keep=(attention.RESIDUALS,), send=(BLOCK_INPUT,))
    ),
    "attention_out_offload": _with_cudnn(_offload(send=(BLOCK_INPUT, attention.RESIDUALS))),
}

# Our name -> diffusers' name and the default of its class (the 14B model's).
_DIFFUSERS = {
    "patch_size": ("patch_size", (1, 2, 2)),
    "in_channels": ("in_channels", 16),
    "out_channels": ("out_channels", 16),
    "depth": ("num_layers", 40),
    "num_heads": ("num_attention_heads", 40),
    "ffn_dim": ("ffn_dim", 13824),
    "freq_dim": ("freq_dim", 256),
    "text_dim": ("text_dim", 4096),
    "eps": ("eps", 1e-6),
    "cross_attn_norm": ("cross_attn_norm", True),
    "qk_norm": ("qk_norm", QK_NORM),
    "rope_max_seq_len": ("rope_max_seq_len", 1024),
    "image_dim": ("image_dim", None),
    "image_positions": ("pos_embed_seq_len", None),
}
_HEAD_DIM = ("attention_head_dim", 128)
_ADDED = "added_kv_proj_dim"  # the model's width where there is an image_dim, else null


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape and execution of a `DiT`; the defaults are Wan 2.1 1.3B's.

    Args:
      patch_size: latents in a token along (time, height, width).
      text_len: padded length of the text that the model was trained with; see
        `embed.padding_bias`.
      image_dim: width of the image features that cross-attention also sees, through keys and
        values of their own; None for models without (Wan 2.1's image-to-video model has 1280).
      image_positions: rows of image features with a learned position each (first-and-last-frame
        models); None is without.
      rope_max_seq_len: only kept for export: our rotary embedding has no table.
      dtype: of the operands of matrix products; parameters, residual stream, norms and
        modulation are float32.
      remat: a name in REMAT.
      unroll: blocks follow each other in the program in place of a loop over stacked ones: steps
        of small models are faster, and compile longer.
      quantization: "none", or 8-bit products in the blocks' linear layers: "int8" or "float8"; see
        `quantized`.
      attention: a name in `attention.IMPLEMENTATIONS`.
      context: a name in `attention.CONTEXTS`: how tokens meet that lie on several devices.

    Raises:
      ValueError: for a value out of range.
    """

    patch_size: Sequence[int] = (1, 2, 2)
    in_channels: int = 16
    out_channels: int = 16
    depth: int = 30
    width: int = 1536
    num_heads: int = 12
    ffn_dim: int = 8960
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    cross_attn_norm: bool = True
    qk_norm: str = QK_NORM
    rope_max_seq_len: int = 1024
    image_dim: int | None = None
    image_positions: int | None = None
    dtype: str = "float32"
    remat: str = "none"
    unroll: bool = False
    quantization: str = "none"
    attention: str = "auto"
    context: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if len(self.patch_size) != 3 or any(size < 1 for size in self.patch_size):
            raise ValueError(
                f"dit.patch_size {self.patch_size} must be three positive integers "
                "(time, height, width)."
            )
        for name in (
            *("in_channels", "out_channels", "depth", "width", "num_heads", "ffn_dim"),
            *("freq_dim", "text_dim", "text_len"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"dit.{name} {getattr(self, name)} must be at least 1.")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            step = 2 * self.num_heads
            below = max(self.width // step, 1) * step
            raise ValueError(
                f"dit.width {self.width} must be a multiple of 2 * num_heads = {step}; the "
                f"nearest are {below} and {below + step}."
            )
        if self.head_dim < 6:
            raise ValueError(
                f"dit.width / num_heads = {self.head_dim} must be at least 6, so that rotary "
                "embedding has a channel pair for time, height and width."
            )
        if self.image_positions is not None and self.image_dim is None:
            raise ValueError(
                f"dit.image_positions {self.image_positions} needs dit.image_dim; set it, or "
                "image_positions to None."
            )
        if self.freq_dim % 2:
            raise ValueError(f"dit.freq_dim {self.freq_dim} must be even (cosines and sines).")
        for name, allowed in (
            ("qk_norm", (QK_NORM,)),
            ("dtype", DTYPES),
            ("remat", tuple(REMAT)),
            ("quantization", ("none", *QUANTIZED)),
            ("attention", attention.IMPLEMENTATIONS),
            ("context", attention.CONTEXTS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"dit.{name} {getattr(self, name)!r} is unknown; use one of "
                    f"{', '.join(allowed)}."
                )

    @property
    def linear_dtype(self) -> str:
        """Of the blocks' linear layers, as `layers.dot` takes it."""
        return self.dtype if self.quantization == "none" else self.quantization

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides) -> "DiTConfig":
        """Reads diffusers' transformer config.json; `overrides` set our own fields.

        Keys that the file leaves out take the defaults of diffusers' class.

        Raises:
          ValueError: for unknown keys, or an image_dim without added_kv_proj_dim.
        """
        known = {name for name, _ in _DIFFUSERS.values()} | {_HEAD_DIM[0], _ADDED}
        unknown = sorted(key for key in values if key not in known and not key.startswith("_"))
        if unknown:
            raise ValueError(
                f"transformer config has unknown keys {', '.join(unknown)}; allowed: "
                f"{', '.join(sorted(known))}."
            )
        fields = {ours: values.get(name, default) for ours, (name, default) in _DIFFUSERS.items()}
        fields["out_channels"] = fields["out_channels"] or fields["in_channels"]
        fields["width"] = fields["num_heads"] * values.get(*_HEAD_DIM)
        added = None if fields["image_dim"] is None else fields["width"]
        if values.get(_ADDED) != added:
            raise ValueError(
                f"transformer config has image_dim {fields['image_dim']} and {_ADDED} "
                f"{values.get(_ADDED)}; with that image_dim it must be {added}."
            )
        return cls(**{**fields, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """diffusers' transformer config.json."""
        values = {name: getattr(self, ours) for ours, (name, _) in _DIFFUSERS.items()}
        values["patch_size"] = list(self.patch_size)
        return {
            "_class_name": "WanTransformer3DModel",
            **values,
            _HEAD_DIM[0]: self.head_dim,
            _ADDED: None if self.image_dim is None else self.width,
        }
