"""Every tensor of every published Wan model, by name and shape, from configs alone.

Nothing is allocated. Key lists by tools/make_goldens_keys.py from diffusers and transformers.
"""

import json
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `configs`, which is not installed

from configs import wan
from sora_jax.convert import folder, names, official
from sora_jax.image.clip import CLIPVisionConfig
from sora_jax.text.t5 import T5Config
from sora_jax.train.dit_stage import dit_config
from sora_jax.vae.config import VAEConfig

KEYS = json.loads((Path(__file__).parent.parent / "goldens/wan_keys.json").read_text())


def vae_config(c) -> VAEConfig:
    channels = 3 * c.vae.patch_size**2
    fields = c.vae.to_dict() | {"decoder_base_dim": c.vae.decoder_base_dim or None}
    return VAEConfig(**fields, in_channels=channels, out_channels=channels)


def check(name: str, config, golden: dict):
    _, abstract = folder.abstract_params(name, config)
    flat = names.flat_params(abstract)
    entries = folder.COMPONENTS[name].entries(config)
    shapes = {}
    for entry in entries:
        ours = flat[entry.path].shape if entry.index is None else flat[entry.path].shape[1:]
        shapes[entry.key] = list(names.file_shape(entry, ours))
    expected = {
        key.replace("*", str(i)): shape
        for key, shape in golden["keys"].items()
        for i in (range(config.depth) if "*" in key else [0])
    }
    assert len(expected) == golden["tensors"]
    assert shapes == expected
    assert {entry.path for entry in entries} == set(flat)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == golden["parameters"]


@pytest.mark.parametrize("variant", wan.VARIANTS)
def test_transformer(variant):
    c = wan.get_config(variant)
    config = dit_config(c.dit, vae_config(c).z_dim, c.text.width)
    check("dit", config, KEYS[variant])
    assert json.loads(json.dumps(config.to_dict()))["num_layers"] == c.dit.depth


@pytest.mark.parametrize(
    ("variant", "family"),
    [
        ("t2v_1.3b", official.T2V),
        ("t2v_14b", official.T2V),
        ("i2v_14b", official.I2V),
        ("flf2v_14b", official.FLF2V),
        ("ti2v_5b", official.TI2V_5B),
        ("t2v_a14b", official.T2V_A14B),
        ("i2v_a14b", official.I2V_A14B),
    ],
)
def test_family_follows_from_shapes(variant, family):
    c = wan.get_config(variant)
    vae = vae_config(c)
    dit = dit_config(c.dit, vae.z_dim, c.text.width)
    assert official.family(dit, vae, experts=variant.endswith("a14b")) == family


@pytest.mark.parametrize(("variant", "name"), [("t2v_1.3b", "vae_2.1"), ("ti2v_5b", "vae_2.2")])
def test_vae(variant, name):
    check("vae", vae_config(wan.get_config(variant)), KEYS[name])


def test_text_encoder():
    config = T5Config(**wan.get_config().text.to_dict())
    check("text", config, KEYS["umt5_xxl"])
    assert KEYS["umt5_xxl"]["tensors"] == 243


def test_image_encoder():
    check("image", CLIPVisionConfig(), KEYS["clip_vit_h"])


def test_an_unknown_variant_is_told():
    with pytest.raises(ValueError, match=r"unknown variant '7b'; use one of t2v_1.3b, t2v_14b"):
        wan.get_config("7b")
