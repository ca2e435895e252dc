"""Name table between `DiT` and diffusers' WanTransformer3DModel."""

from sora_jax.convert.names import Entry
from sora_jax.dit.config import DiTConfig

# Ours -> diffusers', for linear layers.
_EMBEDDERS = {
    ("time_embed", "linear_1"): "condition_embedder.time_embedder.linear_1",
    ("time_embed", "linear_2"): "condition_embedder.time_embedder.linear_2",
    ("time_proj",): "condition_embedder.time_proj",
    ("text_embed", "linear_1"): "condition_embedder.text_embedder.linear_1",
    ("text_embed", "linear_2"): "condition_embedder.text_embedder.linear_2",
    ("proj_out",): "proj_out",
}
_BLOCK_LINEARS = {
    ("self_attention", "q"): "attn1.to_q",
    ("self_attention", "k"): "attn1.to_k",
    ("self_attention", "v"): "attn1.to_v",
    ("self_attention", "out"): "attn1.to_out.0",
    ("cross_attention", "q"): "attn2.to_q",
    ("cross_attention", "k"): "attn2.to_k",
    ("cross_attention", "v"): "attn2.to_v",
    ("cross_attention", "out"): "attn2.to_out.0",
    ("mlp", "up"): "ffn.net.0.proj",
    ("mlp", "down"): "ffn.net.2",
}
_BLOCK_NORMS = {
    ("self_attention", "norm_q"): "attn1.norm_q",
    ("self_attention", "norm_k"): "attn1.norm_k",
    ("cross_attention", "norm_q"): "attn2.norm_q",
    ("cross_attention", "norm_k"): "attn2.norm_k",
}


def dit_entries(config: DiTConfig) -> list[Entry]:
    """One entry for every tensor of a transformer file in diffusers' names."""
    d, patch = config.width, (config.width, config.in_channels, *config.patch_size)
    entries = [
        Entry("patch_embedding.weight", ("patch_embed", "kernel"), "patch", shape=patch),
        Entry("patch_embedding.bias", ("patch_embed", "bias")),
        Entry("scale_shift_table", ("modulation_out",), "vector", shape=(1, 2, d)),
    ]
    for path, key in _EMBEDDERS.items():
        entries += _linear(path, key)
    if config.image_dim is not None:
        entries += _image_entries(config)
    for i in range(config.depth):
        prefix, key = ("blocks",), f"blocks.{i}"
        entries.append(
            Entry(
                f"{key}.scale_shift_table", ("blocks", "modulation"), "vector", i, shape=(1, 6, d)
            )
        )
        for path, name in _BLOCK_LINEARS.items():
            entries += _linear(prefix + path, f"{key}.{name}", index=i)
        for path, name in _BLOCK_NORMS.items():
            entries.append(Entry(f"{key}.{name}.weight", (*prefix, *path, "scale"), index=i))
        if config.image_dim is not None:
            path = (*prefix, "cross_attention")
            entries += _linear((*path, "k_image"), f"{key}.attn2.add_k_proj", index=i)
            entries += _linear((*path, "v_image"), f"{key}.attn2.add_v_proj", index=i)
            norm = f"{key}.attn2.norm_added_k.weight"
            entries.append(Entry(norm, (*path, "norm_k_image", "scale"), index=i))
        if config.cross_attn_norm:
            path = (*prefix, "norm_cross")
            entries.append(Entry(f"{key}.norm2.weight", (*path, "scale"), index=i))
            entries.append(Entry(f"{key}.norm2.bias", (*path, "bias"), index=i))
    return entries


def _image_entries(config: DiTConfig) -> list[Entry]:
    prefix = "condition_embedder.image_embedder"
    entries = [
        *_linear(("image_embed", "linear_1"), f"{prefix}.ff.net.0.proj"),
        *_linear(("image_embed", "linear_2"), f"{prefix}.ff.net.2"),
    ]
    for ours, theirs in (("norm_in", "norm1"), ("norm_out", "norm2")):
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            entries.append(Entry(f"{prefix}.{theirs}.{name}", ("image_embed", ours, leaf)))
    if config.image_positions is not None:
        shape = (1, config.image_positions, config.image_dim)
        path = ("image_embed", "positions")
        entries.append(Entry(f"{prefix}.pos_embed", path, "vector", shape=shape))
    return entries


def _linear(path: tuple[str, ...], key: str, *, index: int | None = None) -> list[Entry]:
    return [
        Entry(f"{key}.weight", (*path, "kernel"), "linear", index),
        Entry(f"{key}.bias", (*path, "bias"), index=index),
    ]
