"""The encoder equals transformers' T5 and UMT5, and keeps what its docstrings promise."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import sharding
from sora_jax.convert import names
from sora_jax.convert.text import entries_held, text_entries
from sora_jax.text.t5 import RelativeBias, T5Config, T5Encoder, position_buckets

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
SMALL = T5Config(width=24, head_dim=6, mlp_dim=32, depth=3, num_heads=3, vocab_size=40)
SHARED = dataclasses.replace(SMALL, per_layer_bias=False)
GOLDEN_CONFIG = dataclasses.replace(SMALL, num_buckets=8, max_distance=12)
GOLDEN_CONFIGS = {
    "umt5": GOLDEN_CONFIG,
    "t5_gated": dataclasses.replace(GOLDEN_CONFIG, per_layer_bias=False),
    "t5_relu": dataclasses.replace(GOLDEN_CONFIG, per_layer_bias=False, mlp="relu"),
}


def make(config, seed=0):
    return T5Encoder(config, rngs=nnx.Rngs(seed))


def read_golden(name):
    with np.load(GOLDENS / f"text_{name}.npz") as golden:
        arrays = dict(golden)
    tensors = {k.removeprefix("param:"): v for k, v in arrays.items() if k.startswith("param:")}
    return arrays, tensors


def from_golden(config, tensors):
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(config)), nnx.Param)
    keys = {key: value.shape for key, value in tensors.items()}
    entries, optional = entries_held(config, keys)
    params = names.load(
        abstract,
        entries,
        keys=keys,
        read=tensors.__getitem__,
        source="golden",
        optional=optional,
    )
    return nnx.merge(graph, params)


def some_text(rows=2, length=20, seed=0):
    ids = jax.random.randint(jax.random.key(seed), (rows, length), 3, 40)
    return ids, jnp.ones((rows, length), bool)


@pytest.mark.parametrize("name", GOLDEN_CONFIGS)
def test_encoder_equals_transformers(name):
    golden, tensors = read_golden(name)
    model = from_golden(GOLDEN_CONFIGS[name], tensors)
    output = jax.jit(model.__call__)(jnp.asarray(golden["ids"]), jnp.asarray(golden["mask"]))
    np.testing.assert_allclose(output, golden["output"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GOLDEN_CONFIGS)
def test_export_returns_the_very_tensors_of_the_file(name):
    _, tensors = read_golden(name)
    config = GOLDEN_CONFIGS[name]
    params = nnx.state(from_golden(config, tensors), nnx.Param)
    exported = names.export(params, text_entries(config))
    assert exported.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=key)
        assert exported[key].flags.c_contiguous


def test_buckets_equal_transformers():
    with np.load(GOLDENS / "text_buckets.npz") as golden:
        for num_buckets, max_distance in ((32, 128), (8, 12), (64, 256)):
            ours = position_buckets(
                golden["relative"], num_buckets=num_buckets, max_distance=max_distance
            )
            np.testing.assert_array_equal(ours, golden[f"{num_buckets}_{max_distance}"])


@pytest.mark.parametrize("length", [1, 2, 31, 150])
def test_bias_matrix_equals_lookup_of_every_pair(length):
    bias = RelativeBias(SMALL, rngs=nnx.Rngs(0))
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    buckets = position_buckets(relative, num_buckets=32, max_distance=128)
    expected = np.asarray(bias.table[...])[buckets].transpose(2, 0, 1)[None]
    np.testing.assert_array_equal(bias(length), expected)


@pytest.mark.parametrize("config", [SMALL, SHARED])
def test_padding_does_not_change_valid_rows(config):
    model = make(config)
    ids, mask = some_text()
    padded_ids = jnp.pad(ids, ((0, 0), (0, 12)), constant_values=7)
    padded_mask = jnp.pad(mask, ((0, 0), (0, 12)))
    padded = model(padded_ids, padded_mask)
    np.testing.assert_allclose(padded[:, :20], model(ids, mask), atol=2e-6, rtol=0)
    assert jnp.isfinite(padded).all()


@pytest.mark.parametrize("config", [SMALL, SHARED])
def test_packed_texts_equal_separate_ones(config):
    model = make(config)
    ids, mask = some_text()
    separate = model(ids, mask)
    packed = model(
        ids.reshape(1, -1), mask.reshape(1, -1), segment_ids=jnp.repeat(jnp.arange(2), 20)[None]
    )
    np.testing.assert_allclose(packed.reshape(separate.shape), separate, atol=2e-6, rtol=0)


def test_a_text_without_tokens_stays_finite():
    ids, mask = some_text(rows=1)
    assert jnp.isfinite(make(SMALL)(ids, jnp.zeros_like(mask))).all()


@pytest.mark.parametrize("config", [SMALL, SHARED])
def test_scan_equals_loop(config):
    model = make(config)
    ids, mask = some_text()
    mask = mask.at[1, 11:].set(False)
    shared_bias = None if config.per_layer_bias else model.relative_bias(20)
    graph, params = nnx.split(model.blocks, nnx.Param)
    x = model.embed(ids)
    for i in range(config.depth):
        block = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], params))
        x = block(x, mask[:, None, None, :], shared_bias=shared_bias)
    np.testing.assert_allclose(model(ids, mask), model.norm(x), atol=2e-6, rtol=0)


def test_layers_are_initialised_differently():
    kernel = make(SMALL).blocks.attention.q.kernel[...]
    assert float(jnp.abs(kernel[0] - kernel[1]).min()) > 0


def test_bfloat16_is_close_to_float32():
    ids, mask = some_text()
    model = make(SMALL)
    coarse = make(dataclasses.replace(SMALL, dtype="bfloat16"))
    exact, rough = model(ids, mask), coarse(ids, mask)
    assert rough.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((exact - rough) ** 2)))
    assert 1e-5 < error < 0.02  # rms of the output is 1; equal would mean dtype is not used


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_reach_every_parameter_and_are_finite(dtype):
    ids, mask = some_text()
    mask = mask.at[1, 11:].set(False)
    for config in (SMALL, dataclasses.replace(SHARED, mlp="relu")):
        model = make(dataclasses.replace(config, dtype=dtype))
        graph, params = nnx.split(model, nnx.Param)

        def loss(params, graph=graph):
            return jnp.sum(jnp.where(mask[..., None], nnx.merge(graph, params)(ids, mask), 0) ** 3)

        gradients = jax.jit(jax.grad(loss))(params)
        for path, leaf in nnx.to_flat_state(gradients):
            assert jnp.isfinite(leaf[...]).all(), path
            assert float(jnp.abs(leaf[...]).max()) > 0, path


def test_initial_activations_keep_their_size():
    config = T5Config(width=192, depth=8)
    model = make(config)
    ids = jax.random.randint(jax.random.key(1), (4, 64), 3, 384)
    mask = jnp.ones((4, 64), bool)
    graph, params = nnx.split(model.blocks, nnx.Param)
    layer = jax.jit(lambda x, params: nnx.merge(graph, params)(x, mask[:, None, None, :]))
    x = model.embed(ids)
    for i in range(config.depth):
        x = layer(x, jax.tree.map(lambda p, i=i: p[i], params))
    assert 1 < float(jnp.std(x)) < 4
    output = model.norm(x)
    assert abs(float(jnp.sqrt(jnp.mean(output**2))) - 1) < 1e-3
    # Tokens must stay apart, or the transformer that reads them sees one prompt everywhere.
    assert float(jnp.std(output, axis=1).mean()) > 0.5


def test_eight_devices_equal_one():
    ids, mask = some_text(rows=8, length=16)
    config = dataclasses.replace(SMALL, width=32, head_dim=8, num_heads=2)
    graph, params = nnx.split(make(config), nnx.Param)

    def run(params, ids, mask):
        return nnx.merge(graph, params)(ids, mask)

    expected = jax.jit(run)(params, ids, mask)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, sharding.tree_shardings(params, mesh))
    assert len(placed["blocks"]["attention"]["q"]["kernel"][...].sharding.device_set) == 8
    with sharding.use_mesh(mesh):
        batch = sharding.named(mesh, "batch", "text_tokens")
        output = jax.jit(run)(placed, jax.device_put(ids, batch), jax.device_put(mask, batch))
    np.testing.assert_allclose(output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", GOLDEN_CONFIGS.values())
def test_config_survives_the_json_of_transformers(config):
    written = config.to_dict()
    assert written["architectures"] == [
        "UMT5EncoderModel" if config.per_layer_bias else "T5EncoderModel"
    ]
    assert T5Config.from_dict(written) == config


def test_published_umt5_xxl_config_is_understood():
    published = {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "d_ff": 10240,
        "d_kv": 64,
        "d_model": 4096,
        "dense_act_fn": "gelu_new",
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "num_decoder_layers": 24,
        "num_heads": 64,
        "num_layers": 24,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "vocab_size": 256384,
    }
    config = T5Config.from_dict(published, dtype="bfloat16")
    assert (config.width, config.depth, config.per_layer_bias) == (4096, 24, True)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "text.width is 0"),
        ({"num_buckets": 10}, "use 8 or 12"),
        ({"max_distance": 8}, "more than num_buckets / 4 = 8"),
        ({"mlp": "silu"}, "allowed: gated-gelu, relu"),
        ({"dtype": "float16"}, "allowed: float32, bfloat16"),
    ],
)
def test_config_out_of_range_gets_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "clip_text_model"}, "supported: umt5, t5"),
        ({"model_type": "t5", "vocab_size": 8, "d_model": 8, "d_kv": 8, "num_heads": 1}, "d_ff"),
        (SMALL.to_dict() | {"feed_forward_proj": "gated-silu"}, "allowed: gated-gelu, relu"),
    ],
)
def test_foreign_config_files_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        T5Config.from_dict(config)


def test_buckets_cover_their_range_once_distances_suffice():
    buckets = position_buckets(np.arange(-200, 201), num_buckets=32, max_distance=128)
    # Bucket 16 (distance 0 ahead) cannot occur: distance 0 counts as behind.
    assert set(buckets.tolist()) == set(range(32)) - {16}
