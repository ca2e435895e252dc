"""Files with the official names, alone: recognised, loaded, and equal to the official modules.

Goldens by tools/make_goldens_official.py.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from sora_jax.convert import folder, names, original
from sora_jax.vae.config import WAN21_MEAN, WAN22_STD
from tests.convert.by_name import tensor

GOLDENS = Path(__file__).parent.parent / "goldens/official.npz"
COMPONENTS = {"dit": "dit", "vae21": "vae", "vae22": "vae", "text": "text"}


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as file:
        arrays = {key: file[key] for key in file.files}
    cases = {name: {} for name in COMPONENTS}
    for key, value in arrays.items():
        case, name = key.split("/")
        cases[case][name] = json.loads(str(value)) if name == "shapes" else jnp.asarray(value)
    return cases


def write(path: Path, shapes, *, prefix="") -> Path:
    save_file({prefix + key: tensor(key, shape) for key, shape in shapes.items()}, path)
    return path


@pytest.fixture
def model(goldens, tmp_path):
    """Loads a case from a single file; returns (config, module, its golden)."""

    def load(case, **options):
        path = write(tmp_path / "some_model.safetensors", goldens[case]["shapes"], **options)
        config, graphdef, params = folder.load_component(path, COMPONENTS[case])
        return config, nnx.merge(graphdef, params), goldens[case]

    return load


@pytest.mark.parametrize("prefix", ["", *original.PREFIXES])
def test_transformer(model, prefix):
    config, dit, golden = model("dit", prefix=prefix)
    assert (config.width, config.num_heads, config.depth, config.ffn_dim) == (128, 1, 2, 48)
    velocity = jax.jit(dit)(golden["latents"], golden["t"], golden["text_emb"])
    assert np.abs(golden["velocity"]).max() > 0.5
    np.testing.assert_allclose(velocity, golden["velocity"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["vae21", "vae22"])
def test_vae(model, case):
    config, vae, golden = model(case)
    assert config.dim_mult == (1, 2, 4, 4) and config.temporal_downsample == (False, True, True)
    assert config.num_res_blocks == 1 and config.is_residual == (case == "vae22")
    video = golden["video"]
    if case == "vae21":
        assert config.latents_mean == WAN21_MEAN and config.patch_size is None
    else:  # the official module takes pixels that are folded already
        assert config.latents_std == WAN22_STD and config.decoder_base_dim == 12

    @jax.jit
    def run(video):
        mean = vae.encode_moments(video).mean
        return mean, vae.decode_raw(vae.normalize(mean))

    mean, recon = run(video)
    np.testing.assert_allclose(mean, golden["mean"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(recon, golden["recon"], atol=1e-5, rtol=1e-5)


def test_text_encoder(model):
    config, text, golden = model("text")
    assert (config.vocab_size, config.width, config.head_dim, config.mlp_dim) == (60, 16, 12, 32)
    mask = golden["mask"]
    text_emb = jax.jit(text)(golden["ids"], mask)
    np.testing.assert_allclose(text_emb[mask], golden["text_emb"][mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", COMPONENTS)
def test_export_under_official_names_returns_the_file(goldens, tmp_path, case):
    shapes = goldens[case]["shapes"]
    path = write(tmp_path / "model.safetensors", shapes)
    config, naming, _ = folder.find_component(path, COMPONENTS[case])
    params = folder.load_component(path, COMPONENTS[case])[2]
    exported = names.export(params, naming.entries(config))
    assert set(exported) == set(shapes)
    for key, shape in shapes.items():
        np.testing.assert_array_equal(exported[key], tensor(key, shape), err_msg=key)


def test_files_side_by_side_are_told_apart(goldens, tmp_path):
    for case, place in (("dit", "."), ("vae21", "vae"), ("text", "text_encoders")):
        (tmp_path / place).mkdir(exist_ok=True)
        write(tmp_path / place / f"{case}.safetensors", goldens[case]["shapes"])
    for component in ("dit", "vae", "text"):
        assert folder.find_component(tmp_path, component)[1].component == component
    write(tmp_path / "another.safetensors", goldens["dit"]["shapes"])
    with pytest.raises(ValueError, match=r"needs one transformer.*another.*dit") as error:
        folder.find_component(tmp_path, "dit")
    assert "\n" not in str(error.value)


def test_what_a_file_lacks_is_told(goldens, tmp_path):
    shapes = dict(goldens["dit"]["shapes"])
    path = write(tmp_path / "dit.safetensors", shapes)
    with pytest.raises(ValueError, match=r"needs one VAE, .* found: none"):
        folder.load_component(path, "vae")
    del shapes["blocks.1.ffn.0.bias"]
    shapes |= {"blocks.0.extra": [3], "head.head.bias": [5]}
    write(path, shapes)
    with pytest.raises(ValueError) as error:
        folder.load_component(path, "dit")
    for words in (
        "1 missing: blocks.1.ffn.0.bias",
        "1 unknown: blocks.0.extra",
        "1 of another shape: head.head.bias (5,) (expected (16,))",
    ):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"a": [1], "b": [2]}, "not a Wan transformer, Wan VAE, T5 encoder or CLIP .* a, b"),
        (
            {"blocks.0.self_attn.q.weight": [1], "encoder.conv1.weight": [1]},
            "tensors of dit .official names. and vae .official names.",
        ),
    ],
)
def test_files_of_no_or_two_models_are_refused(tmp_path, shapes, words):
    path = write(tmp_path / "model.safetensors", shapes)
    with pytest.raises(ValueError, match=words):
        folder.find_component(path, "dit")
