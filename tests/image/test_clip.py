"""The vision tower equals transformers'; goldens by tools/make_goldens_image.py."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from sora_jax.convert import folder, names
from sora_jax.convert.image import PREFIX, image_entries
from sora_jax.image.clip import CLIPVision, CLIPVisionConfig, preprocess, resize_matrix

GOLDEN = Path(__file__).parents[1] / "goldens" / "image.npz"
PICTURES = ("wide", "tall", "small")
SIZES = {"width": 24, "mlp_dim": 40, "depth": 3, "num_heads": 3, "image_size": 28, "patch_size": 7}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def tensors_of(golden, activation, prefix=""):
    start = f"{activation}:param:"
    found = {k.removeprefix(start): v for k, v in golden.items() if k.startswith(start)}
    return {prefix + key.removeprefix(PREFIX): value for key, value in found.items()}


def load(config, tensors, prefix=""):
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: CLIPVision(config, rngs=nnx.Rngs(0))), nnx.Param
    )
    params = names.load(
        abstract,
        image_entries(config, prefix=prefix),
        keys={key: value.shape for key, value in tensors.items()},
        read=tensors.__getitem__,
        source="golden",
    )
    return graph, params


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_equal_the_image_processors(golden, name):
    pixels = preprocess(golden[f"{name}:image"], size=28)
    np.testing.assert_allclose(pixels, golden[f"{name}:pixels"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_features_equal_transformers(golden, activation):
    config = CLIPVisionConfig(**SIZES, activation=activation)
    graph, params = load(config, tensors_of(golden, activation))
    pixels = np.stack([golden[f"{name}:pixels"] for name in PICTURES])
    features = jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, pixels)
    # Of values up to 7, which XLA of jax 0.12 rounds by 1.1e-5 otherwise.
    np.testing.assert_allclose(features, golden[f"{activation}:features"], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_files_with_and_without_the_prefix_are_recognised(golden, tmp_path, prefix):
    config = CLIPVisionConfig(**SIZES)
    tensors = tensors_of(golden, "gelu", prefix)
    tensors |= {"visual_projection.weight": np.ones((2, 24), np.float32)} if prefix else {}
    target = tmp_path / "image_encoder"
    folder.write_json(target / "config.json", config.to_dict())
    save_file(tensors, target / "model.safetensors")
    read, _, params = folder.load_component(tmp_path, "image")
    assert read == config
    exported = names.export(params, image_entries(config, prefix=""))
    for key, value in tensors_of(golden, "gelu").items():
        np.testing.assert_array_equal(exported[key], value, err_msg=key)


def test_config_survives_its_file():
    config = CLIPVisionConfig(**SIZES, activation="quick_gelu", eps=1e-6)
    assert CLIPVisionConfig.from_dict(config.to_dict()) == config
    assert CLIPVisionConfig().num_positions == 257


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "both must divide"),
        ({"patch_size": 9}, "both must divide"),
        ({"depth": 1}, "2 blocks or more"),
        ({"activation": "relu"}, "use gelu or quick_gelu"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CLIPVisionConfig(**(SIZES | changes))


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="'siglip'; supported: clip_vision_model"):
        CLIPVisionConfig.from_dict({"model_type": "siglip"})
    with pytest.raises(ValueError, match="lacks num_hidden_layers"):
        CLIPVisionConfig.from_dict({"model_type": "clip_vision_model", "hidden_size": 8})


@pytest.mark.parametrize("size, target", [(16, 8), (30, 14), (10, 16), (64, 64)])
def test_resize_matrices_are_pillows(size, target):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (size, 5), np.uint8)
    theirs = Image.fromarray(pixels).resize((5, target), Image.Resampling.BICUBIC)
    ours = np.clip(resize_matrix(size, target) @ pixels, 0, 255)
    assert np.abs(ours - np.asarray(theirs)).max() <= 0.51  # its rounding to bytes
