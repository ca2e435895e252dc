"""Tiles of attention: any cut of heads and queries gives the reference's values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import blocked_attention
from sora_jax.attention import attention
from sora_jax.blocked_attention import MASKED, Keys, _tile
from sora_jax.ring_attention import Kernel, attend


def blocked(q, k, v, q_ids=None, kv_ids=None, bias=None, dtype="float32"):
    q = q * Kernel("blocked", dtype, "cpu").query_scale(q.shape[-1])
    return attend(q, q_ids, Keys(k, v, kv_ids, bias), Kernel("blocked", dtype, "cpu"))


def arguments(b, n, s, h, e, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(b, n, h, e), (b, s, h, e), (b, s, h, e), (b, n, h, e)]
    return [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]


def value_and_grads(f, q, k, v, cotangent):
    @jax.jit
    def both(q, k, v, cotangent):
        out, vjp = jax.vjp(f, q, k, v)
        return (out, *vjp(cotangent))

    return both(q, k, v, cotangent)


@pytest.mark.parametrize("queries, tile_bytes", [(7, 1), (7, 10_000), (8, 4 * 8 * 13 * 2), (64, 1)])
@pytest.mark.parametrize("restricted", ["nothing", "segments", "bias", "both"])
def test_tiles_equal_reference(queries, tile_bytes, restricted, monkeypatch):
    monkeypatch.setattr(blocked_attention, "QUERIES", queries)
    monkeypatch.setattr(blocked_attention, "TILE_BYTES", tile_bytes)
    b, n, s, h, e = 2, 30, 13, 3, 8
    *qkv, cotangent = arguments(b, n, s, h, e)
    q_ids = kv_ids = bias = None
    if restricted in ("segments", "both"):
        q_ids = jnp.arange(n)[None] * 3 // n + jnp.arange(b)[:, None]
        kv_ids = jnp.arange(s)[None] * 3 // s + jnp.arange(b)[:, None]
    if restricted in ("bias", "both"):
        bias = jnp.zeros((b, s)).at[0, 3].set(np.log(3)).at[1, 5].set(MASKED)

    def tiled(q, k, v):
        return blocked(q, k, v, q_ids, kv_ids, bias)

    def reference(q, k, v):
        ids = {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}
        return attention(q, k, v, **ids, kv_bias=bias, implementation="reference")

    expected = value_and_grads(reference, *qkv, cotangent)
    for got, want in zip(value_and_grads(tiled, *qkv, cotangent), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()) + 1e-6)


@pytest.mark.parametrize("b, n, s, h, e", [(1, 40, 40, 1, 64), (1, 1, 1, 1, 1), (3, 5, 2, 2, 12)])
def test_bfloat16_runs_at_any_size(b, n, s, h, e, monkeypatch):
    """XLA's CPU backend refuses bfloat16 products whose transposes it has moved into them."""
    monkeypatch.setattr(blocked_attention, "QUERIES", 16)
    monkeypatch.setattr(blocked_attention, "TILE_BYTES", 1)
    *qkv, cotangent = arguments(b, n, s, h, e)
    grads = []
    for dtype in ("bfloat16", "float32"):
        f = lambda q, k, v, dtype=dtype: blocked(q, k, v, dtype=dtype).astype(jnp.float32)  # noqa: E731
        grads.append(value_and_grads(f, *qkv, cotangent))
    for got, want in zip(*grads, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=5e-2)


def test_gradients_have_the_inputs_dtype():
    out, *grads = value_and_grads(
        lambda *a: blocked(*a, dtype="bfloat16"), *arguments(1, 4, 4, 2, 8, jnp.bfloat16)
    )
    assert {x.dtype for x in (out, *grads)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("kernel_grad", [False, True])
def test_a_tile_is_all_that_exists_at_once(kernel_grad, monkeypatch):
    """2,048 queries and keys of 4 heads have 64 MB of logits; a tile has 1 MB."""
    b, n, h, e = 1, 2048, 4, 16
    monkeypatch.setattr(blocked_attention, "QUERIES", 128)
    monkeypatch.setattr(blocked_attention, "TILE_BYTES", 1_000_000)
    f = blocked
    if kernel_grad:
        f = jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2))
    memory = jax.jit(f).lower(*arguments(b, n, n, h, e)[:3]).compile().memory_analysis()
    assert memory.temp_size_in_bytes < (24e6 if kernel_grad else 8e6)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((16, 144, 4, 64), (64, 144)),  # all heads in one
        ((1, 2304, 6, 64), (1, 576)),
        ((1, 600, 6, 64), (6, 300)),  # equal halves, not 576 and 24
    ],
)
def test_tile(shape, expected):
    assert _tile(shape, shape[1], 576, 6_000_000) == expected
