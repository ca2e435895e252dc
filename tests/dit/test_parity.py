"""The model equals diffusers' WanTransformer3DModel; goldens by tools/make_goldens_dit.py."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.convert import names
from sora_jax.convert.dit import dit_entries
from sora_jax.dit.config import DiTConfig
from sora_jax.dit.model import DiT

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens/dit.npz"


def golden(case):
    with np.load(GOLDENS) as file:
        arrays = {key: file[key] for key in file.files}
    weights = "scalar" if case == "per_token" else case
    tensors = {
        key.split("params/")[1]: value
        for key, value in arrays.items()
        if key.startswith(f"{weights}/params/")
    }
    config = DiTConfig.from_dict(json.loads(str(arrays[f"{case}/config"])))
    inputs = {k: arrays[f"{case}/{k}"] for k in INPUTS}
    return config, tensors, inputs | {"image_emb": arrays.get(f"{case}/image_emb")}


INPUTS = ("latents", "t", "text_emb", "text_mask", "velocity")


def load(config, tensors):
    abstract = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(abstract, nnx.Param)
    params = names.load(
        params,
        dit_entries(config),
        keys={key: value.shape for key, value in tensors.items()},
        read=tensors.__getitem__,
        source="golden",
    )
    return nnx.merge(graph, params)


@pytest.mark.parametrize("case", ["scalar", "per_token", "other_patch", "image", "first_last"])
def test_velocity_equals_diffusers(case):
    config, tensors, io = golden(case)
    model = load(config, tensors)
    image = None if io["image_emb"] is None else jnp.asarray(io["image_emb"])
    velocity = jax.jit(lambda x, t, text, mask: model(x, t, text, text_mask=mask, image_emb=image))(
        *(jnp.asarray(io[k]) for k in INPUTS[:4])
    )
    assert np.abs(io["velocity"]).max() > 1
    np.testing.assert_allclose(velocity, io["velocity"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["scalar", "other_patch", "image", "first_last"])
def test_export_returns_the_file(case):
    config, tensors, _ = golden(case)
    exported = names.export(nnx.state(load(config, tensors), nnx.Param), dit_entries(config))
    assert set(exported) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=key)
