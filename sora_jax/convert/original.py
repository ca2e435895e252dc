"""The names of the official Wan files (which ComfyUI reads too), beside diffusers' names.

One rewriting of keys for each model, applied to the tables of `dit_entries` and `vae_entries`, so
that a tensor's place in our tree is written down once. Shapes are the same in both.
"""

import re
from collections.abc import Sequence

from sora_jax.convert.names import Entry
from sora_jax.vae.config import VAEConfig

# Single-file checkpoints of ComfyUI put this in front of every key of the transformer.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")

# (diffusers', official), each a whole dotted part or run of parts.
_DIT = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("proj_out", "head.head"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn2.add_k_proj", "cross_attn.k_img"),
    ("attn2.add_v_proj", "cross_attn.v_img"),
    ("attn2.norm_added_k", "cross_attn.norm_k_img"),
    ("attn1.to_", "self_attn."),
    ("attn2.to_", "cross_attn."),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),  # the affine norm before cross-attention
)
_RESIDUAL = (
    ("norm1", "residual.0"),
    ("conv1", "residual.2"),
    ("norm2", "residual.3"),
    ("conv2", "residual.6"),
    ("conv_shortcut", "shortcut"),
)
_VAE_ENDS = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "encoder.conv_in": "encoder.conv1",
    "decoder.conv_in": "decoder.conv1",
    "encoder.norm_out": "encoder.head.0",
    "decoder.norm_out": "decoder.head.0",
    "encoder.conv_out": "encoder.head.2",
    "decoder.conv_out": "decoder.head.2",
}
_TEXT_ENDS = {
    "shared.weight": "token_embedding.weight",
    "encoder.embed_tokens.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
}
_TEXT_LAYER = {
    "0.layer_norm": "norm1",
    **{f"0.SelfAttention.{part}": f"attn.{part}" for part in "qkvo"},
    "0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "1.layer_norm": "norm2",
    "1.DenseReluDense.wi_0": "ffn.gate.0",
    "1.DenseReluDense.wi_1": "ffn.fc1",
    "1.DenseReluDense.wo": "ffn.fc2",
}


def original_dit_entries(entries: Sequence[Entry]) -> list[Entry]:
    """`dit_entries` under the official names."""
    return [entry._replace(key=dit_key(entry.key)) for entry in entries]


def dit_key(key: str) -> str:
    """diffusers' name of a transformer tensor -> the official one."""
    if key == "scale_shift_table":
        return "head.modulation"
    if key.endswith(".scale_shift_table"):
        return key.removesuffix("scale_shift_table") + "modulation"
    for theirs, official in _DIT:
        if theirs in key:
            return key.replace(theirs, official, 1)
    return key


def original_vae_entries(entries: Sequence[Entry], config: VAEConfig) -> list[Entry]:
    """`vae_entries` under the official names."""
    return [entry._replace(key=vae_key(entry.key, config)) for entry in entries]


def vae_key(key: str, config: VAEConfig) -> str:
    """diffusers' name of a VAE tensor -> the official one.

    Wan 2.1 numbers all layers of a half in one list; 2.2 has a list of layers in every stage.
    """
    module, _, leaf = key.rpartition(".")
    if module in _VAE_ENDS:
        return f"{_VAE_ENDS[module]}.{leaf}"
    middle = re.fullmatch(r"(\w+)\.mid_block\.(resnets|attentions)\.(\d)\.(.+)", module)
    if middle:
        half, kind, index, rest = middle.groups()
        place = 1 if kind == "attentions" else 2 * int(index)
        return f"{half}.middle.{place}.{_layer(rest)}.{leaf}"
    if config.is_residual:
        match = re.fullmatch(
            r"(\w+)\.(?:down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(?:down|up)sampler)\.(.+)", module
        )
        half, stage, block, rest = match.groups()
        layers = "downsamples" if half == "encoder" else "upsamples"
        depth = config.num_res_blocks + (half == "decoder")
        index = depth if block is None else block
        return f"{half}.{layers}.{stage}.{layers}.{index}.{_layer(rest)}.{leaf}"
    encoder = re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", module)
    if encoder:
        return f"encoder.downsamples.{encoder[1]}.{_layer(encoder[2])}.{leaf}"
    decoder = re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", module)
    stage, kind, block, rest = decoder.groups()
    depth = config.num_res_blocks + 1  # of a decoder stage, whose upsampling is one more layer
    place = int(stage) * (depth + 1) + (int(block) if kind == "resnets" else depth)
    return f"decoder.upsamples.{place}.{_layer(rest)}.{leaf}"


def _layer(name: str) -> str:
    """A layer within its block."""
    return dict(_RESIDUAL).get(name, name)


def original_text_entries(entries: Sequence[Entry]) -> list[Entry]:
    """`text_entries` under the official names, the table of embeddings once."""
    renamed = [entry._replace(key=text_key(entry.key)) for entry in entries]
    return list({entry.key: entry for entry in renamed}.values())


def text_key(key: str) -> str:
    """transformers' name of a T5 encoder's tensor -> the official one of Wan's UMT5."""
    if key in _TEXT_ENDS:
        return _TEXT_ENDS[key]
    layer, rest = re.fullmatch(r"encoder\.block\.(\d+)\.layer\.(\d\..+)", key).groups()
    return f"blocks.{layer}.{_TEXT_LAYER[rest.removesuffix('.weight')]}.weight"


def strip_prefix(keys: Sequence[str]) -> str:
    """The prefix of `PREFIXES` that every one of `keys` has, or ""."""
    return next((p for p in PREFIXES if keys and all(key.startswith(p) for key in keys)), "")
