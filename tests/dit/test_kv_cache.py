"""Keys and values that are kept give what a whole evaluation gives, where it can be known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import sharding
from sora_jax.dit.kv_cache import KVCache
from tests.dit.test_model import TINY, inputs, normal, random_model

GIVEN = np.array([0, 1, 2, 3, 5, 7, 8, 11])  # of 3 x 2 x 2 tokens: a frame, and some of the others
REST = np.setdiff1d(np.arange(12), GIVEN)


def evaluate(model, latents, t, text_emb, *, taken=None, mesh=None, **kwargs):
    """(velocity by tokens (b, n, p), what was stored)."""
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    def run(params, latents, t, text_emb, given, rest, taken):
        cache = KVCache(given, rest, taken=taken)
        velocity = nnx.merge(graph, params)(latents, t, text_emb, cache=cache, **kwargs)
        return velocity, cache.stored

    with sharding.use_mesh(mesh):
        velocity, stored = run(params, latents, t, text_emb, GIVEN, REST, taken)
    b, f, h, w, c = velocity.shape
    by_patch = np.asarray(velocity).reshape(b, f, h // 2, 2, w // 2, 2, c)
    return by_patch.swapaxes(3, 4).reshape(b, f * h * w // 4, 4 * c), stored


def own_time(t):
    """As given tokens have it: 0 for them, their example's for the rest."""
    return jnp.broadcast_to(t[:, None], (2, 12)).at[:, GIVEN].set(0.0)


def noised(latents):
    """Other noise in the tokens that are not given."""
    noise = normal(*latents.shape, seed=9)
    given = np.isin(np.arange(12), GIVEN).reshape(3, 2, 2).repeat(2, 1).repeat(2, 2)
    return jnp.where(given[None, ..., None], latents, noise)


@pytest.mark.parametrize("unroll", [False, True])
def test_what_is_stored_gives_the_rest_what_they_had(unroll):
    model, (latents, t, text_emb) = random_model(dataclasses.replace(TINY, unroll=unroll)), inputs()
    whole, stored = evaluate(model, latents, own_time(t), text_emb)
    assert stored.keys.shape == (TINY.depth, 2, len(GIVEN), TINY.num_heads, TINY.head_dim)
    # Whatever stands where tokens are given: they are not worked on.
    empty = jnp.where(noised(latents) == latents, 0.0, latents)
    rest, none = evaluate(model, empty, own_time(t), text_emb, taken=stored)
    np.testing.assert_allclose(rest[:, REST], whole[:, REST], atol=1e-5)
    assert not rest[:, GIVEN].any() and none is None
    wrong, _ = evaluate(
        model, empty, own_time(t), text_emb, taken=jax.tree.map(jnp.zeros_like, stored)
    )
    assert np.abs(wrong - rest).max() > 1e-2


def test_the_first_block_of_given_tokens_sees_nobody():
    """So what is stored of a model of one block is right for any noise, and of two it is not."""
    latents, t, text_emb = inputs()
    for depth in (1, 2):
        model = random_model(dataclasses.replace(TINY, depth=depth))
        _, stored = evaluate(model, latents, own_time(t), text_emb)
        other = noised(latents), own_time(0.5 * t), text_emb
        whole, rest = evaluate(model, *other)[0], evaluate(model, *other, taken=stored)[0]
        error = np.abs(rest - whole)[:, REST].max()
        assert error < 1e-5 if depth == 1 else 1e-3 < error < 0.5 * np.abs(whole).max()


def test_texts_of_frames_and_frames_apart_are_those_of_the_rest():
    model, (latents, t, text_emb) = random_model(), inputs()
    kwargs = {
        "text_of_frames": jnp.array([[0, 1, 1], [0, 0, 1]]),
        "text_segment_ids": jnp.array([[0, 0, 1, 1, 1]] * 2),
        "num_texts": 2,
    }
    plain = None
    for apart in (None, ((1,), jnp.array([[True], [False]]))):
        more = kwargs | {"frames_apart": apart}
        whole, stored = evaluate(model, latents, own_time(t), text_emb, **more)
        rest, _ = evaluate(model, latents, own_time(t), text_emb, taken=stored, **more)
        np.testing.assert_allclose(rest[:, REST], whole[:, REST], atol=1e-5)
        plain = whole if plain is None else plain
    assert np.abs(whole - plain)[0, REST].max() > 1e-3


@pytest.mark.parametrize("context", ["auto", "ring"])
def test_devices_that_share_the_tokens_give_the_same(context):
    """Of the four tokens that go on as of all twelve, with some that fill up."""
    model, (latents, t, text_emb) = (
        random_model(dataclasses.replace(TINY, context=context)),
        inputs(),
    )
    mesh = sharding.make_mesh(fsdp=1, context=8)
    alone, stored = evaluate(model, latents, own_time(t), text_emb)
    whole, kept = evaluate(model, latents, own_time(t), text_emb, mesh=mesh)
    np.testing.assert_allclose(whole, alone, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, stored)
    for part in kept:  # each holds its share
        assert part.sharding.shard_shape(part.shape)[2] == len(GIVEN) // 8
    rest, _ = evaluate(model, latents, own_time(t), text_emb, taken=kept, mesh=mesh)
    np.testing.assert_allclose(rest[:, REST], alone[:, REST], atol=1e-5)
