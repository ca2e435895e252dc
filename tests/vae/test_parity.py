"""The VAE equals diffusers' AutoencoderKLWan (goldens: tools/make_goldens_vae.py)."""

import json
import pathlib

import jax
import numpy as np
import pytest

from sora_jax.convert import vae as convert
from sora_jax.vae.config import VAEConfig

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
NAMES = ("wan21", "wan22", "small")


def load(name):
    golden = np.load(GOLDENS / f"vae_{name}.npz")
    tensors = {key[6:]: golden[key] for key in golden.files if key.startswith("param/")}
    config = VAEConfig.from_dict(json.loads(str(golden["config"])))
    return convert.load_vae_tensors(config, tensors), tensors, golden


@pytest.mark.parametrize("name", NAMES)
def test_encode_equals_diffusers(name):
    vae, _, golden = load(name)
    moments = jax.jit(lambda vae, x: vae.encode_moments(x))(vae, golden["video"])
    np.testing.assert_allclose(moments.mean, golden["mean"], atol=1e-5)
    np.testing.assert_allclose(moments.logvar, golden["logvar"], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_decode_of_normalised_latents_equals_diffusers(name):
    vae, _, golden = load(name)
    video = jax.jit(lambda vae, z: vae.decode(z))(vae, golden["latents"])
    np.testing.assert_allclose(video, golden["decoded"], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_export_gives_back_the_file_bit_for_bit(name):
    vae, tensors, _ = load(name)
    exported = convert.export_vae(vae)
    assert exported.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(exported[key], value)
        assert exported[key].flags.c_contiguous


@pytest.mark.parametrize("name", NAMES)
def test_config_survives_the_file_format(name):
    config = load(name)[0].config
    assert VAEConfig.from_dict(config.to_dict()) == config
