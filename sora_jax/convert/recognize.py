"""Which model a file of weights is, and its settings, from tensor names and shapes alone.

Files with the official names come without a config. Every setting that shapes decide is read from
them; what they cannot tell (heads of the transformer, statistics of the VAE's latents) is what all
published models of that shape have.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sora_jax.convert import original
from sora_jax.convert.dit import dit_entries
from sora_jax.convert.image import PREFIX as IMAGE_PREFIX
from sora_jax.convert.image import image_entries
from sora_jax.convert.names import Entry
from sora_jax.convert.text import EMBEDDINGS, text_entries
from sora_jax.convert.vae import vae_entries
from sora_jax.convert.weights import Weights
from sora_jax.dit.config import DiTConfig
from sora_jax.image.clip import CLIPVisionConfig
from sora_jax.text.t5 import T5Config
from sora_jax.vae.config import LATENT_STATISTICS, VAEConfig

HEAD_DIM = 128  # of every published Wan transformer
IMAGE_HEAD_DIM = 80  # of the one image encoder that Wan's models use, ViT-H/14
Shapes = Mapping[str, tuple[int, ...]]


class Naming(NamedTuple):
    """How a component's tensors are named in some kind of file.

    `mark` is a tensor that every such file has and no other kind; `entries` makes the table for a
    config; `config` reads the settings from shapes.
    """

    component: str
    names: str
    mark: str
    entries: Callable[[Any], list[Entry]]
    config: Callable[[Shapes], Any]


def _depth(shapes: Shapes, pattern: str) -> int:
    found = {int(m[1]) for key in shapes if (m := re.match(pattern, key))}
    return max(found, default=-1) + 1


def _dit_config(shapes: Shapes, name: Callable[[str], str] = lambda key: key) -> DiTConfig:
    def shape(key: str) -> tuple[int, ...]:
        return shapes[name(key)]

    width, in_channels, *patch = shape("patch_embedding.weight")
    image = "condition_embedder.image_embedder"
    image_key, positions_key = name(f"{image}.norm1.weight"), name(f"{image}.pos_embed")
    if width % HEAD_DIM:
        raise ValueError(
            f"a transformer of width {width} without a config.json: published ones have heads of "
            f"{HEAD_DIM}; put its config.json (of diffusers) beside it, which tells the heads."
        )
    return DiTConfig(
        patch_size=tuple(patch),
        in_channels=in_channels,
        out_channels=shape("proj_out.weight")[0] // math.prod(patch),
        depth=_depth(shapes, r"blocks\.(\d+)\."),
        width=width,
        num_heads=width // HEAD_DIM,
        ffn_dim=shape("blocks.0.ffn.net.0.proj.weight")[0],
        freq_dim=shape("condition_embedder.time_embedder.linear_1.weight")[1],
        text_dim=shape("condition_embedder.text_embedder.linear_1.weight")[1],
        cross_attn_norm=name("blocks.0.norm2.weight") in shapes,
        image_dim=shapes[image_key][0] if image_key in shapes else None,
        image_positions=shapes[positions_key][1] if positions_key in shapes else None,
    )


def _original_vae_config(shapes: Shapes) -> VAEConfig:
    base, in_channels = shapes["encoder.conv1.weight"][:2]
    z_dim = shapes["conv2.weight"][0]
    residual = "encoder.downsamples.0.downsamples.0.residual.0.gamma" in shapes
    widths, time = [], []  # of each stage; whether it halves time
    if residual:
        stages = _depth(shapes, r"encoder\.downsamples\.(\d+)\.")
        for i in range(stages):
            stage = f"encoder.downsamples.{i}.downsamples"
            widths.append(shapes[f"{stage}.0.residual.2.weight"][0])
            time.append(any(k.startswith(f"{stage}.") and ".time_conv." in k for k in shapes))
        stage = r"encoder\.downsamples\.0\.downsamples\.(\d+)\.residual\."
        blocks = _depth(shapes, stage)
    else:
        layers = _depth(shapes, r"encoder\.downsamples\.(\d+)\.")
        ends = [i for i in range(layers) if f"encoder.downsamples.{i}.resample.1.weight" in shapes]
        blocks = ends[0] if ends else layers
        for end in [*ends, layers]:
            widths.append(shapes[f"encoder.downsamples.{end - 1}.residual.2.weight"][0])
            time.append(f"encoder.downsamples.{end}.time_conv.weight" in shapes)
    decoder = shapes["decoder.head.2.weight"][1]
    statistics = LATENT_STATISTICS.get(z_dim)
    if statistics is None:
        known = " and ".join(map(str, LATENT_STATISTICS))
        raise ValueError(
            f"a VAE of {z_dim} channels without a config.json: the statistics of its latents are "
            f"known for {known} channels; put its config.json (of diffusers) beside it."
        )
    return VAEConfig(
        base_dim=base,
        decoder_base_dim=None if decoder == base else decoder,
        z_dim=z_dim,
        dim_mult=tuple(width // base for width in widths),
        num_res_blocks=blocks,
        temporal_downsample=tuple(time[:-1]),
        latents_mean=statistics.mean,
        latents_std=statistics.std,
        is_residual=residual,
        in_channels=in_channels,
        out_channels=in_channels,
        patch_size=None if in_channels == 3 else math.isqrt(in_channels // 3),
    )


def _text_config(shapes: Shapes) -> T5Config:
    layer = "encoder.block.{}.layer.0.SelfAttention"
    embedding = next(key for key in EMBEDDINGS if key in shapes)
    bias = f"{layer}.relative_attention_bias.weight"
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes
    up = "wi_0" if gated else "wi"
    return _t5(
        shapes,
        embedding=embedding,
        bias=bias.format(0),
        q=f"{layer.format(0)}.q.weight",
        up=f"encoder.block.0.layer.1.DenseReluDense.{up}.weight",
        depth=_depth(shapes, r"encoder\.block\.(\d+)\."),
        mlp="gated-gelu" if gated else "relu",
        per_layer_bias=bias.format(1) in shapes,
    )


def _original_text_config(shapes: Shapes) -> T5Config:
    return _t5(
        shapes,
        embedding="token_embedding.weight",
        bias="blocks.0.pos_embedding.embedding.weight",
        q="blocks.0.attn.q.weight",
        up="blocks.0.ffn.fc1.weight",
        depth=_depth(shapes, r"blocks\.(\d+)\."),
    )


def _t5(shapes: Shapes, *, embedding: str, bias: str, q: str, up: str, **rest) -> T5Config:
    vocab, width = shapes[embedding]
    buckets, heads = shapes[bias]
    return T5Config(
        vocab_size=vocab,
        width=width,
        num_heads=heads,
        head_dim=shapes[q][0] // heads,
        mlp_dim=shapes[up][0],
        num_buckets=buckets,
        **rest,
    )


def _image_config(shapes: Shapes, prefix: str) -> CLIPVisionConfig:
    width, _, patch, _ = shapes[f"{prefix}embeddings.patch_embedding.weight"]
    positions = shapes[f"{prefix}embeddings.position_embedding.weight"][0]
    return CLIPVisionConfig(
        width=width,
        mlp_dim=shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        depth=_depth(shapes, rf"{re.escape(prefix)}encoder\.layers\.(\d+)\."),
        num_heads=width // IMAGE_HEAD_DIM,
        image_size=patch * math.isqrt(positions - 1),
        patch_size=patch,
    )


def _single_text_entries(config: T5Config) -> list[Entry]:
    return original.original_text_entries(text_entries(config))


NAMINGS = (
    Naming("dit", "diffusers", "blocks.0.attn1.to_q.weight", dit_entries, _dit_config),
    Naming(
        "dit",
        "official",
        "blocks.0.self_attn.q.weight",
        lambda config: original.original_dit_entries(dit_entries(config)),
        lambda shapes: _dit_config(shapes, original.dit_key),
    ),
    Naming("vae", "diffusers", "encoder.conv_in.weight", vae_entries, lambda shapes: None),
    Naming(
        "vae",
        "official",
        "encoder.conv1.weight",
        lambda config: original.original_vae_entries(vae_entries(config), config),
        _original_vae_config,
    ),
    Naming(
        "text",
        "diffusers",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        text_entries,
        _text_config,
    ),
    Naming(
        "image",
        "diffusers",
        f"{IMAGE_PREFIX}encoder.layers.0.self_attn.q_proj.weight",
        image_entries,
        lambda shapes: _image_config(shapes, IMAGE_PREFIX),
    ),
    Naming(
        "image",
        "transformers 5",
        "encoder.layers.0.self_attn.q_proj.weight",
        lambda config: image_entries(config, prefix=""),
        lambda shapes: _image_config(shapes, ""),
    ),
    Naming(
        "text",
        "official",
        "blocks.0.attn.q.weight",
        _single_text_entries,
        _original_text_config,
    ),
)


def recognize(weights: Weights) -> tuple[Naming, Weights]:
    """The naming of `weights`, and the weights without ComfyUI's prefix.

    Raises:
      ValueError: they are no model that is known here; names some of their tensors.
    """
    weights = weights.strip(original.strip_prefix(list(weights.shapes)))
    found = [naming for naming in NAMINGS if naming.mark in weights.shapes]
    if len(found) == 1:
        return found[0], weights
    if found:
        kinds = " and ".join(f"{naming.component} ({naming.names} names)" for naming in found)
        raise ValueError(f"{weights.source}: holds tensors of {kinds}; keep those of one model.")
    some = ", ".join(sorted(weights.shapes)[:3]) or "none"
    raise ValueError(
        f"{weights.source}: not a Wan transformer, Wan VAE, T5 encoder or CLIP image encoder in "
        f"official or diffusers names; its tensors: {some}, ..."
    )
