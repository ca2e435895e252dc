"""Names of an image encoder's tensors in transformers' CLIPVisionModel files."""

from sora_jax.convert.names import Entry
from sora_jax.image.clip import CLIPVisionConfig

PREFIX = "vision_model."
# Of larger CLIP files, or recomputed: never read.
UNREAD = frozenset({f"{PREFIX}embeddings.position_ids", "visual_projection.weight"})
_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_NORMS = {"norm_attention": "layer_norm1", "norm_mlp": "layer_norm2"}


def image_entries(config: CLIPVisionConfig, *, prefix: str = PREFIX) -> list[Entry]:
    """One entry for every tensor; transformers 5 writes files without the prefix."""
    patch = (config.width, 3, config.patch_size, config.patch_size)
    entries = [
        Entry("embeddings.class_embedding", ("class_embed",)),
        Entry("embeddings.position_embedding.weight", ("positions",)),
        Entry(
            "embeddings.patch_embedding.weight", ("patch_embed", "kernel"), "patch2d", shape=patch
        ),
        *_norm("pre_layrnorm", ("norm_in",)),  # their spelling
        *_norm("post_layernorm", ("norm_out",)),
    ]
    for i in range(config.depth):
        key = f"encoder.layers.{i}"
        for ours, theirs in _LINEARS.items():
            path = ("blocks", ours)
            entries.append(Entry(f"{key}.{theirs}.weight", (*path, "kernel"), "linear", i))
            entries.append(Entry(f"{key}.{theirs}.bias", (*path, "bias"), index=i))
        for ours, theirs in _NORMS.items():
            entries += _norm(f"{key}.{theirs}", ("blocks", ours), index=i)
    return [entry._replace(key=prefix + entry.key) for entry in entries]


def _norm(key: str, path: tuple[str, ...], *, index: int | None = None) -> list[Entry]:
    return [
        Entry(f"{key}.weight", (*path, "scale"), index=index),
        Entry(f"{key}.bias", (*path, "bias"), index=index),
    ]
