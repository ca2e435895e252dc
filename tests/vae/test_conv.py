"""Both formulations of the convolution, and their gradients, are the same function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.vae import conv, cpu_conv

NONE = (0, 0)
KERNELS = {
    "causal": (3, 3, 3),
    "halve time": (3, 1, 1),
    "halve space": (1, 3, 3),
    "pointwise": (1, 1, 1),
}
SETTINGS = {
    "causal": {"stride": (1, 1, 1), "padding": ((2, 0), (1, 1), (1, 1))},
    "halve time": {"stride": (2, 1, 1), "padding": (NONE, NONE, NONE)},
    "halve space": {"stride": (1, 2, 2), "padding": (NONE, (0, 1), (0, 1))},
    "pointwise": {"stride": (1, 1, 1), "padding": (NONE, NONE, NONE)},
}


def operands(kernel, *, frames=5):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, frames, 6, 4, 3))
    return x, jax.random.normal(keys[1], (*kernel, 3, 5))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("frames", [5, 6])
def test_formulations_agree(name, frames):
    settings = SETTINGS[name]
    x, w = operands(KERNELS[name], frames=frames)
    single = functools.partial(conv._single, **settings)
    y, pullback = jax.vjp(single, x, w)
    dy = jax.random.normal(jax.random.key(1), y.shape)
    ours, our_pullback = jax.vjp(functools.partial(conv.conv3d, **settings), x, w)
    np.testing.assert_allclose(ours, y, atol=1e-5)
    explicit = conv._single_backward(x, w, dy, **settings)
    for expected, a, b in zip(pullback(dy), our_pullback(dy), explicit, strict=True):
        np.testing.assert_allclose(a, expected, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(b, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("time", [(2, 0), (0, 0), (1, 1)], ids=["causal", "carried", "same"])
@pytest.mark.parametrize("channels", [(3, 12), (12, 12), (12, 3), (33, 34)])
def test_taps_beside_each_other_are_the_convolution(channels, time):
    settings = {"stride": (1, 1, 1), "padding": (time, (1, 1), (1, 1))}
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 5, 6, 4, channels[0]))
    w = jax.random.normal(keys[1], (3, 3, 3, *channels))
    y, pullback = jax.vjp(functools.partial(conv._single, **settings), x, w)
    np.testing.assert_allclose(cpu_conv.taps(x, w, **settings), y, rtol=1e-5, atol=1e-4)
    dy = jax.random.normal(keys[2], y.shape)
    ours = cpu_conv.taps_backward(x, w, dy, **settings)
    for got, expected in zip(ours, pullback(dy), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-4)


def test_doubled_frames_are_convolved_without_being_made():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 3, 5, 4, 6))
    w = jax.random.normal(keys[1], (3, 3, 6, 7))

    def plainly(x, w):
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return conv._single(x, w[None], stride=(1, 1, 1), padding=(NONE, (1, 1), (1, 1)))

    y, pullback = jax.vjp(plainly, x, w)
    ours, our_pullback = jax.vjp(conv.conv_of_doubled, x, w)
    np.testing.assert_allclose(ours, y, atol=1e-5)
    dy = jax.random.normal(keys[2], y.shape)
    for got, expected in zip(our_pullback(dy), pullback(dy), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
    lowered = jax.jit(conv.conv_of_doubled).lower(x, w).compile().as_text()
    assert "f32[2,3,10,8,6]" not in lowered and "f32[6,10,8,6]" not in lowered


def test_bfloat16_rounds_operands_only():
    settings = SETTINGS["causal"]
    x, w = operands((3, 3, 3))
    low = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w)]
    expected, pullback = jax.vjp(functools.partial(conv._single, **settings), *low)
    y, our_pullback = jax.vjp(functools.partial(conv.conv3d, dtype="bfloat16", **settings), x, w)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, atol=1e-4)
    dy = jnp.round(jax.random.normal(jax.random.key(1), y.shape) * 8)  # exact in bfloat16
    for a, b in zip(our_pullback(dy), pullback(dy), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


def test_accelerators_get_one_convolution_and_cpu_none_in_3d():
    x, w = operands((3, 3, 3))

    def loss(x, w):
        return jnp.sum(conv.conv3d(x, w, dtype="bfloat16", **SETTINGS["causal"]))

    def convolutions(platform):
        exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1))), platforms=[platform])(x, w)
        lines = exported.mlir_module().splitlines()
        return [line for line in lines if "stablehlo.convolution" in line]

    def in_3d(line):
        return "0, 1, 2" in line

    assert convolutions("cpu") and not any(map(in_3d, convolutions("cpu")))
    for platform in ("tpu", "cuda"):
        lines = convolutions(platform)
        assert len(lines) == 2 and all(map(in_3d, lines))
        assert all(line.count("bf16>") == 2 and line.count("f32>") == 1 for line in lines)


@pytest.mark.parametrize(
    ("frames", "taps", "before"), [(1, 3, 2), (2, 3, 2), (5, 3, 2), (5, 3, 0), (1, 1, 0), (3, 1, 0)]
)
def test_products_with_neighbourhoods_are_the_convolution(frames, taps, before):
    keys = jax.random.split(jax.random.key(0), 3)
    low = jnp.bfloat16
    x = jax.random.normal(keys[0], (2, frames, 3, 4, 128)).astype(low)
    w = jax.random.normal(keys[1], (taps, 3, 3, 128, 130)).astype(low)
    settings = {"stride": (1, 1, 1), "padding": ((before, 0), (1, 1), (1, 1))}
    assert cpu_conv._columns_pay(x, w, **settings)
    single = functools.partial(conv._single, **settings)
    expected, pullback = jax.vjp(single, x.astype(jnp.float32), w.astype(jnp.float32))
    np.testing.assert_allclose(cpu_conv.taps(x, w, **settings), expected, rtol=1e-5, atol=2e-4)
    dy = jax.random.normal(keys[2], expected.shape).astype(low)
    gradients = cpu_conv.taps_backward(x, w, dy, **settings)
    for ours, theirs in zip(gradients, pullback(dy.astype(jnp.float32)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-4)


def test_two_dimensional_traces_the_same_function_without_branches():
    x, w = operands((3, 3, 3))

    def traced():
        # A function of its own each time: a cached trace would answer for the other.
        return jax.make_jaxpr(lambda x, w: conv.conv3d(x, w, **SETTINGS["causal"]))(x, w)

    outside = traced()
    with conv.two_dimensional():
        inside = traced()
    assert "platform_index" in str(outside) and "platform_index" not in str(inside)
    (y,), (z,) = (jax.core.eval_jaxpr(t.jaxpr, t.consts, x, w) for t in (outside, inside))
    np.testing.assert_allclose(y, z, atol=1e-5)
