"""Names of a text encoder's tensors in transformers' T5EncoderModel and UMT5EncoderModel files."""

from collections.abc import Mapping

from sora_jax.convert.names import Entry
from sora_jax.text.t5 import T5Config

# The same table under two names; files hold either or both.
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")

_BLOCK = (
    ("layer.0.SelfAttention.q.weight", ("attention", "q", "kernel"), "linear"),
    ("layer.0.SelfAttention.k.weight", ("attention", "k", "kernel"), "linear"),
    ("layer.0.SelfAttention.v.weight", ("attention", "v", "kernel"), "linear"),
    ("layer.0.SelfAttention.o.weight", ("attention", "o", "kernel"), "linear"),
    ("layer.0.layer_norm.weight", ("attention_norm", "scale"), "same"),
    ("layer.1.DenseReluDense.wo.weight", ("mlp", "wo", "kernel"), "linear"),
    ("layer.1.layer_norm.weight", ("mlp_norm", "scale"), "same"),
)
_GATED = (
    ("layer.1.DenseReluDense.wi_0.weight", ("mlp", "wi_0", "kernel"), "linear"),
    ("layer.1.DenseReluDense.wi_1.weight", ("mlp", "wi_1", "kernel"), "linear"),
)
_UNGATED = (("layer.1.DenseReluDense.wi.weight", ("mlp", "wi_0", "kernel"), "linear"),)
_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


def text_entries(config: T5Config, *, embeddings: tuple[str, ...] = EMBEDDINGS) -> list[Entry]:
    """The name table of an encoder, `embeddings` being the names of its table of embeddings.

    With both names (the default) it is right for writing; `entries_held` is for reading.
    """
    block = _BLOCK + (_GATED if config.mlp == "gated-gelu" else _UNGATED)
    if config.per_layer_bias:
        block += ((_BIAS, ("attention", "relative_bias", "table"), "same"),)
    entries = [Entry(key, ("embed", "embedding")) for key in embeddings]
    entries += [
        Entry(f"encoder.block.{layer}.{key}", ("blocks", *path), layout, layer)
        for layer in range(config.depth)
        for key, path, layout in block
    ]
    if not config.per_layer_bias:
        entries.append(Entry(f"encoder.block.0.{_BIAS}", ("relative_bias", "table")))
    return [*entries, Entry("encoder.final_layer_norm.weight", ("norm", "scale"))]


def entries_held(
    config: T5Config, keys: Mapping[str, tuple[int, ...]]
) -> tuple[list[Entry], frozenset[str]]:
    """(name table for a file with `keys`, keys of it that stay unread).

    The embeddings go by the name that the file holds; a second name and the decoder of a full T5
    file are left alone.
    """
    held = [key for key in EMBEDDINGS if key in keys] or list(EMBEDDINGS[:1])
    unread = {key for key in keys if key.startswith("decoder.") or key == "lm_head.weight"}
    return text_entries(config, embeddings=(held[0],)), frozenset(unread.union(held[1:]))
