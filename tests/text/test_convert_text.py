"""The name table of the text encoder: tied embeddings, decoders left unread, errors."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from sora_jax.convert import names
from sora_jax.convert.text import EMBEDDINGS, entries_held, text_entries
from sora_jax.text.t5 import T5Config, T5Encoder

TINY = T5Config(vocab_size=12, width=8, head_dim=4, mlp_dim=8, depth=2, num_heads=2)


def abstract(config):
    model = nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0)))
    return nnx.state(model, nnx.Param)


def load(config, tensors):
    keys = {key: value.shape for key, value in tensors.items()}
    entries, optional = entries_held(config, keys)
    return names.load(
        abstract(config),
        entries,
        keys=keys,
        read=tensors.__getitem__,
        source="file",
        optional=optional,
    )


def export_text(params, config):
    return names.export(params, text_entries(config))


@pytest.fixture
def tensors():
    model = T5Encoder(TINY, rngs=nnx.Rngs(0))
    return export_text(nnx.state(model, nnx.Param), TINY)


@pytest.mark.parametrize("held", [EMBEDDINGS[:1], EMBEDDINGS[1:], EMBEDDINGS])
def test_embeddings_are_read_under_either_name(tensors, held):
    kept = {k: v for k, v in tensors.items() if k in held or k not in EMBEDDINGS}
    again = export_text(load(TINY, kept), TINY)
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)


def test_missing_embeddings_are_named(tensors):
    kept = {k: v for k, v in tensors.items() if k not in EMBEDDINGS}
    with pytest.raises(ValueError, match=r"1 missing: shared\.weight"):
        load(TINY, kept)


def test_decoder_of_a_full_t5_file_is_left_alone(tensors):
    extra = {"decoder.final_layer_norm.weight": np.ones(8), "lm_head.weight": np.ones((12, 8))}
    load(TINY, tensors | extra)


def test_layer_too_many_is_refused(tensors):
    key = "encoder.block.2.layer.0.layer_norm.weight"
    with pytest.raises(ValueError, match=rf"1 unknown: {key}"):
        load(TINY, tensors | {key: np.ones(8, np.float32)})


def test_shared_bias_stands_in_the_first_layer_only():
    keys = [e.key for e in text_entries(dataclasses.replace(TINY, per_layer_bias=False))]
    bias = [key for key in keys if "relative_attention_bias" in key]
    assert bias == ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
