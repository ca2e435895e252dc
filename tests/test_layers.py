"""Matrix products and norms: values and gradients against plain jnp."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import layers, sharding


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def value_and_gradients(product, x, y):
    """product(x, y), and the gradients of its inner product with a fixed array."""
    out, pullback = jax.vjp(product, x, y)
    return out, *pullback(normal(*out.shape, seed=9).astype(out.dtype))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_dot_equals_matmul_with_its_gradients(shape):
    x, w = normal(*shape), normal(5, 7, seed=1)
    got = value_and_gradients(lambda x, w: layers.dot(x, w, "float32"), x, w)
    for a, b in zip(got, value_and_gradients(jnp.matmul, x, w), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


EQUATIONS = ["bqke,bske->bkqs", "bkqs,bske->bqke", "bi,io->bo"]
SIZES = dict(zip("bqskeio", (2, 3, 4, 2, 5, 6, 3), strict=True))


@pytest.mark.parametrize("equation", EQUATIONS)
def test_contract_equals_einsum_with_its_gradients(equation):
    shapes = [[SIZES[a] for a in term] for term in equation.split("->")[0].split(",")]
    x, y = (normal(*shape, seed=i) for i, shape in enumerate(shapes))
    got = value_and_gradients(lambda x, y: layers.contract(equation, x, y, "float32"), x, y)
    expected = value_and_gradients(lambda x, y: jnp.einsum(equation, x, y), x, y)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def relative_error(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_bfloat16_operands_keep_float32_results_and_gradients():
    """Rounding to 8 bits, 2^-9 at most for each operand; sums in float32 add nothing to it."""
    x, w = normal(64, 256), normal(256, 32, seed=1)
    got = value_and_gradients(lambda x, w: layers.dot(x, w, "bfloat16"), x, w)
    for a, b in zip(got, value_and_gradients(jnp.matmul, x, w), strict=True):
        assert a.dtype == jnp.float32
        assert 1e-4 < relative_error(a, b) < 2 * 2**-9


def test_results_may_be_rounded():
    """The sums that are rounded are float32's; so are those for the weights, which are not."""
    x, w, dy = normal(64, 256), normal(256, 32, seed=1), normal(64, 32, seed=2)
    y, pullback = jax.vjp(lambda x, w: layers.dot(x, w, "bfloat16", (), "bfloat16"), x, w)
    want, want_pullback = jax.vjp(lambda x, w: layers.dot(x, w, "bfloat16"), x, w)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, want.astype(jnp.bfloat16))
    (dx, dw), (want_dx, want_dw) = pullback(dy.astype(y.dtype)), want_pullback(dy)
    np.testing.assert_array_equal(dx, want_dx.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(dw, want_dw)


@pytest.mark.parametrize(
    "platform, dtype, expected",
    [
        ("gpu", "bfloat16", "bfloat16"),
        ("cuda", "int8", "bfloat16"),
        ("gpu", "float32", "float32"),
        ("tpu", "bfloat16", "float32"),
        ("cpu", "bfloat16", "float32"),
    ],
)
def test_rounded_layers_round_on_gpus_alone(monkeypatch, platform, dtype, expected):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    make = functools.partial(layers.Linear, 8, 4, axes=("embed", "mlp"), dtype=dtype)
    assert make(rngs=nnx.Rngs(0), rounded=True)(normal(2, 8)).dtype == expected
    assert make(rngs=nnx.Rngs(0))(normal(2, 8)).dtype == jnp.float32


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_gradients_of_rounded_biases_are_summed_in_float32(monkeypatch, held):
    """As traced: CPUs sum bfloat16 in float32 by themselves."""
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    linear = layers.Linear(
        2, 3, axes=("embed", "mlp"), rngs=nnx.Rngs(0), dtype="bfloat16", rounded=True
    )
    graph, params = nnx.split(linear, nnx.Param)
    params = jax.tree.map(lambda p: p.astype(held), params)
    x = jnp.zeros((2, 2048, 2))
    grad = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(x).astype(jnp.float32)))
    bias = grad(params)["bias"][...]
    assert bias.dtype == held
    np.testing.assert_array_equal(bias.astype(jnp.float32), 4096)
    assert re.findall(r"(\w+)\[3\] = reduce_sum", str(jax.make_jaxpr(grad)(params))) == ["f32"]


def test_gradients_have_the_dtypes_of_the_operands():
    x, w = normal(4, 8).astype(jnp.bfloat16), normal(8, 2)
    _, dx, dw = value_and_gradients(lambda x, w: layers.dot(x, w, "bfloat16"), x, w)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


def test_linear_is_kernel_and_bias():
    linear = layers.Linear(5, 7, axes=("embed", "mlp"), rngs=nnx.Rngs(0))
    linear.bias[...] = normal(7, seed=2)
    x = normal(2, 3, 5)
    expected = np.asarray(x) @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])
    np.testing.assert_allclose(linear(x), expected, rtol=1e-5, atol=1e-5)
    assert linear.kernel.get_metadata()["axes"] == ("embed", "mlp")
    assert linear.bias.get_metadata()["axes"] == ("mlp",)


def test_linear_without_bias_has_none():
    linear = layers.Linear(5, 7, axes=("embed", "mlp"), rngs=nnx.Rngs(0), bias=False)
    assert len(jax.tree.leaves(nnx.split(linear, nnx.Param)[1])) == 1
    np.testing.assert_array_equal(linear(jnp.zeros((2, 5))), 0)


def test_linear_starts_with_the_variance_of_its_input():
    linear = layers.Linear(400, 300, axes=("embed", "mlp"), rngs=nnx.Rngs(0))
    assert abs(float(jnp.std(linear(normal(200, 400)))) - 1) < 0.02


def test_embedding_looks_rows_up():
    table = layers.Embedding(11, 4, rngs=nnx.Rngs(0), stddev=0.5)
    ids = jnp.array([[3, 0], [10, 3]])
    np.testing.assert_array_equal(table(ids), np.asarray(table.embedding[...])[np.asarray(ids)])


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_its_formula(affine):
    norm = layers.LayerNorm(6, eps=1e-3, affine=affine)
    x = 3 * normal(2, 4, 6) + 1
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    if affine:
        norm.scale[...], norm.bias[...] = normal(6, seed=1), normal(6, seed=2)
        expected = expected * norm.scale[...][None, None] + norm.bias[...][None, None]
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-5)


def test_rms_norm_is_its_formula():
    norm = layers.RMSNorm(6, eps=1e-3)
    norm.scale[...] = normal(6, seed=1)
    x = 3 * normal(2, 4, 6) + 1
    expected = x / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(norm(x), expected * norm.scale[...][None, None], rtol=1e-5)


@pytest.mark.parametrize("norm", [layers.LayerNorm, layers.RMSNorm])
def test_norms_of_bfloat16_are_computed_in_float32(norm):
    x = normal(2, 256).astype(jnp.bfloat16)
    got = norm(256)(x)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, norm(256)(x.astype(jnp.float32)))


def test_programs_for_every_platform_contract_in_float32(monkeypatch):
    # The platform of the mesh, for that of a plan is not here.
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    x, y = normal(2, 3, 4), normal(2, 4, 5)

    def traced():
        product = lambda x, y: layers.contract("bij,bjk->bik", x, y, "bfloat16")  # noqa: E731
        return str(jax.make_jaxpr(product)(x, y))

    assert "bf16" in traced()
    with layers.float32_contractions():
        assert "bf16" not in traced()
    assert "bf16" in traced()


@pytest.mark.parametrize("name, tolerance", [("int8", 0.02), ("float8", 0.05)])
def test_eight_bit_products_stay_near_float32(name, tolerance):
    rng = np.random.default_rng(0)
    # Rows of other sizes, which one scale for all would round to nothing.
    x = rng.standard_normal((2, 24, 64), np.float32) * np.geomspace(1e-3, 1e3, 24)[None, :, None]
    w = rng.standard_normal((64, 32), np.float32)
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    y, vjp = jax.vjp(lambda x, w: layers.dot(x, w, name), x, w)
    want, want_vjp = jax.vjp(lambda x, w: layers.dot(x, w, "float32"), x, w)
    cotangent = jnp.asarray(rng.standard_normal(y.shape, np.float32))
    scaled = jnp.abs(y - want) / jnp.linalg.norm(x, axis=-1, keepdims=True)
    assert float((scaled / jnp.linalg.norm(w, axis=0)[None, None]).max()) < tolerance
    for got, expected in zip(vjp(cotangent), want_vjp(cotangent), strict=True):
        error = jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)
        assert 1e-4 < error < 2 * tolerance
    text = jax.jit(lambda x, w: layers.dot(x, w, name)).lower(x, w).as_text()
    assert ("xi8>" if name == "int8" else "xf8E4M3FN>") in text
