"""Queries and keys in one pass against the layers that they are made of, in Pallas' interpreter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import attention, layers, sharding
from sora_jax.dit import block, heads, model, rope
from sora_jax.dit.config import DiTConfig

E = 128  # channels of a head, which the kernel asks for
EPS = 1e-6


def inputs(*, b=2, n=300, k=3, alike=True):
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.normal(size=(b, n, k * E)), jnp.float32)
    norm = layers.RMSNorm(k * E, eps=EPS)
    norm.scale[...] = jnp.asarray(rng.normal(size=k * E), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 50, size=(1 if alike else b, n, 3)))
    pull = jnp.asarray(rng.normal(size=(b, n, k, E)), jnp.float32)
    return y, norm, rope.rotation(positions, E), pull


def both_ways(y, norm, rotation, pull, *, fused=None):
    """Value, and gradients of y and of the norm's scale."""
    graph, params = nnx.split(norm)

    @jax.jit
    def run(y, params):
        def split(y, params):
            return heads.split(
                y, nnx.merge(graph, params), rotation, num_heads=pull.shape[2], fused=fused
            )

        value, vjp = jax.vjp(split, y, params)
        return value, vjp(pull.astype(value.dtype))

    value, (dy, d_params) = run(y, params)
    return value, dy, *jax.tree.leaves(d_params)


def one_pass(dtype="float32", factor=1.0):
    return heads.Pass(factor, dtype, EPS, interpret=True)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("n, k, alike", [(300, 3, True), (256, 2, False), (257, 4, True)])
def test_one_pass_equals_the_layers(n, k, alike, turned):
    """Lengths that tiles do and do not divide: what lies behind the last token is NaN there."""
    y, norm, rotation, pull = inputs(n=n, k=k, alike=alike)
    arguments = (y, norm, rotation if turned else None, pull)
    expected = both_ways(*arguments)
    got = both_ways(*arguments, fused=one_pass())
    for x, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=3e-5)


def test_the_result_is_rounded_once():
    y, norm, rotation, pull = inputs()
    expected = both_ways(y, norm, rotation, pull)[0] * 0.3
    got = both_ways(y, norm, rotation, pull, fused=one_pass("bfloat16", factor=0.3))[0]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("n", [256, 260, 258])
def test_on_a_mesh_as_on_one_device(n):
    """Tokens that divide over the context axis, and some that do not; a batch over fsdp."""
    arguments = inputs(n=n, k=2, alike=False)
    expected = both_ways(*arguments, fused=one_pass())
    with sharding.use_mesh(sharding.make_mesh(fsdp=2, context=4)):
        got = both_ways(*arguments, fused=one_pass())
    for x, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=3e-5)


CONFIG = DiTConfig(
    in_channels=4,
    out_channels=4,
    depth=2,
    width=2 * E,
    num_heads=2,
    ffn_dim=64,
    text_dim=8,
    patch_size=(1, 1, 1),
    text_len=16,
    remat="full",
)


def as_on_a_tpu(monkeypatch):
    """The kernels of a TPU, interpreted; tiles of 128 tokens."""
    monkeypatch.setattr(heads, "is_fused", lambda *_, **__: True)
    monkeypatch.setattr(heads, "Pass", functools.partial(heads.Pass, interpret=True))
    attend = functools.partial(attention.attention, interpret=True)
    monkeypatch.setattr(block.attention, "attention", attend)
    monkeypatch.setattr(heads, "_TILE", 128)


def value_and_gradients(config, arguments, mesh=None, **keywords):
    """Of a model none of whose parameters is 0, as most are of a new one."""
    graph, params = nnx.split(model.DiT(config, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noised = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, noised)

    def loss(params):
        out = nnx.merge(graph, params)(*arguments, **keywords)
        return jnp.sum(jnp.sin(out)), out

    with sharding.use_mesh(mesh):
        grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    return out, *jax.tree.leaves(grads)


@pytest.mark.parametrize("timed", ["row", "tokens", "two texts"])
@pytest.mark.parametrize("context", [1, 4])
def test_a_transformer_with_the_kernels_equals_one_without(monkeypatch, context, timed):
    """1,022 tokens, which are filled up to 1,024; heads exchanged, and keys in rings."""
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(1, 2, 7, 73, 4)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(1, 7, 8)), jnp.float32)
    t = jnp.full((1,), 0.4) if timed == "row" else jnp.asarray(rng.uniform(size=(1, 1022)))
    arguments, keywords = (latents, t.astype(jnp.float32), text), {}
    if timed == "two texts":
        keywords = {
            "text_segment_ids": jnp.array([[0, 0, 0, 1, 1, 1, 1]]),
            "text_of_frames": jnp.array([[0, 1]]),
            "num_texts": 2,
        }
    expected = value_and_gradients(CONFIG, arguments, **keywords)
    as_on_a_tpu(monkeypatch)
    assert heads.spare_tokens(CONFIG, 1022) == 2
    mesh = sharding.make_mesh(fsdp=1, context=4, devices=jax.devices()[:4]) if context > 1 else None
    config = dataclasses.replace(CONFIG, attention="flash")
    got = value_and_gradients(config, arguments, mesh, **keywords)
    for x, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_off_tpus_no_tokens_are_added():
    assert heads.spare_tokens(CONFIG, 1022) == 0


def test_few_tokens_are_not_filled_up(monkeypatch):
    as_on_a_tpu(monkeypatch)
    assert heads.spare_tokens(CONFIG, 900) == 0  # 124 more, of which 9 would be the limit


def test_the_layout_is_that_of_each_shard(monkeypatch):
    """Asked of the whole array, the partitioner would gather it on every device."""
    as_on_a_tpu(monkeypatch)
    mesh = sharding.make_mesh(fsdp=2, context=4)
    x = jnp.arange(2 * 16 * 8.0).reshape(2, 16, 8)
    where = sharding.named(mesh, "batch", "tokens", None)
    with sharding.use_mesh(mesh):
        row_major = functools.partial(heads.row_major, config=CONFIG)
        compiled = jax.jit(row_major, in_shardings=where).lower(x).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_array_equal(compiled(jax.device_put(x, where)), x)
