"""2-D convolution of every frame in float32, with the kernel's gradient as matrix products.

XLA's CPU backend computes that gradient as a convolution whose "channels" are the examples: with
32 channels at 13 to 16 GFLOP/s on two cores, where the forward pass has 50 and the products 42
(`tools/bench_conv.py --planes`). Used by `conv`, on CPUs only.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from sora_jax import sharding

Pair = tuple[int, int]
# Rows of a frame are cut into this many parts, if they can be: products of small results run on
# one core, a batch of them on all.
PARTS = 8
# XLA's own kernel gradient is the faster where both channel counts are multiples of this, but not
# from so many places on: at 64x64 from 64 to 128 channels 102 ms as products, and 325 its own.
FAST_CHANNELS, MANY_PLACES = 64, 64 * 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def plane_conv(x, kernel, stride: Pair, padding: tuple[Pair, Pair]):
    """x (b, t, h, w, i) by kernel (kh, kw, i, o), zeros padded: (b, t, h', w', o)."""
    return _conv(x, kernel, stride, padding)


def _conv(x, kernel, stride, padding):
    y = lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        kernel,
        stride,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _forward(x, kernel, stride, padding):
    return _conv(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, residuals, dy):
    x, kernel = residuals
    conv = functools.partial(_conv, stride=stride, padding=padding)
    (dx,) = jax.vjp(lambda x: conv(x, kernel), x)[1](dy)
    if stride == (1, 1):
        return dx, kernel_gradient(x, dy, kernel.shape, padding)
    return dx, _xla_kernel_gradient(x, dy, kernel.shape, stride, padding)


plane_conv.defvjp(_forward, _backward)


def kernel_gradient(x, dy, shape, padding):
    """Gradient of a kernel of `shape` (kh, kw, i, o), of stride 1."""
    fast = all(channels % FAST_CHANNELS == 0 for channels in shape[2:])
    if on_one_device() and not (fast and dy.shape[2] * dy.shape[3] < MANY_PLACES):
        return _products(x, dy, shape, padding)
    return _xla_kernel_gradient(x, dy, shape, (1, 1), padding)


def on_one_device() -> bool:
    """On a mesh the loop over frames would hold a collective in every turn."""
    mesh = sharding.current_mesh()
    return mesh is None or mesh.size == 1


def _xla_kernel_gradient(x, dy, shape, stride, padding):
    conv = functools.partial(_conv, stride=stride, padding=padding)
    return jax.vjp(lambda kernel: conv(x, kernel), jnp.zeros(shape))[1](dy)[0]


def _products(x, dy, shape, padding):
    """Frame by frame, each kernel row's gradient is one product of rows beside rows with dy."""
    kh, kw, inputs, outputs = shape
    _, _, h, w, _ = dy.shape
    x = jnp.pad(x, ((0, 0), (0, 0), *padding, (0, 0)))
    x, dy = (a.reshape(-1, *a.shape[2:]) for a in (x, dy))
    parts = max(n for n in range(1, PARTS + 1) if h % n == 0)

    def step(total, frame):
        x, dy = frame
        dy = dy.reshape(parts, h // parts * w, outputs)
        beside = jnp.concatenate([x[:, j : j + w] for j in range(kw)], axis=-1)

        def one(i):
            rows = beside[i : i + h].reshape(*dy.shape[:2], kw * inputs)
            return jnp.sum(jnp.einsum("pni,pno->pio", rows, dy), axis=0)

        return total + jnp.stack([one(i) for i in range(kh)]), None

    total = jnp.zeros((kh, kw * inputs, outputs))
    return lax.scan(step, total, (x, dy))[0].reshape(shape)
