"""Patches are halved as the tool says: four alike are embedded, and answered, as one was."""

import jax
import numpy as np
import pytest
from flax import nnx

from sora_jax.convert import rewrite
from sora_jax.dit.model import DiT, DiTConfig

CONFIG = DiTConfig(
    depth=2, width=48, num_heads=2, ffn_dim=32, in_channels=3, out_channels=3, text_dim=8
)


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("halve_patches")


@pytest.fixture(scope="module")
def params():
    params = nnx.split(DiT(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)[1]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, draw)


def test_four_tokens_alike_are_embedded_and_answered_as_one(tool, params):
    old = rewrite.from_params("dit", CONFIG, params)
    new = tool.halve(old)
    assert new.config.patch_size == (1, 1, 1)
    key = "patch_embedding.weight"
    latent = np.random.default_rng(0).standard_normal(3)
    patch = np.broadcast_to(latent[:, None, None, None], (3, 1, 2, 2))
    assert new.read(key).shape == new.shapes[key] == (48, 3, 1, 1, 1)
    one = np.einsum("ocfhw,cfhw->o", old.read(key), patch)
    np.testing.assert_allclose(new.read(key)[..., 0, 0, 0] @ latent, one, rtol=1e-5)
    hidden = np.random.default_rng(1).standard_normal(48)
    answer = old.read("proj_out.weight") @ hidden + old.read("proj_out.bias")
    answers = answer.reshape(4, 3)  # by place, then channel
    mean = new.read("proj_out.weight") @ hidden + new.read("proj_out.bias")
    np.testing.assert_allclose(mean, answers.mean(axis=0), rtol=1e-5)
    kept = "blocks.0.attn1.to_v.weight"
    np.testing.assert_array_equal(new.read(kept), old.read(kept))


def test_only_rows_and_columns_are_turned_by_other_pairs(tool, params):
    order = tool.channels(2, 24)
    assert sorted(order) == list(range(48))
    # 24 channels a head: 8 of time, 8 of rows, 8 of columns.
    np.testing.assert_array_equal(order[:8], np.arange(8))
    np.testing.assert_array_equal(order[8:16], [14, 15, 8, 9, 10, 11, 12, 13])
    np.testing.assert_array_equal(order[24:], order[:24] + 24)
    old = rewrite.from_params("dit", CONFIG, params)
    new = tool.halve(old)
    for key in ("to_q.weight", "to_k.bias", "norm_q.weight", "norm_k.weight"):
        key = f"blocks.1.attn1.{key}"
        np.testing.assert_array_equal(new.read(key), old.read(key)[order])


def test_what_it_writes_is_loaded_and_other_patches_are_refused(tool, params):
    new = tool.halve(rewrite.from_params("dit", CONFIG, params))
    model = nnx.eval_shape(lambda: DiT(new.config, rngs=nnx.Rngs(0)))
    written = rewrite.from_params("dit", new.config, nnx.split(model, nnx.Param)[1])
    assert written.shapes == new.shapes
    with pytest.raises(ValueError, match="patches of \\(1, 1, 1\\) latents"):
        tool.halve(new)
