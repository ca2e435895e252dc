"""2-D convolution of every frame in float32, with the kernel's gradient as matrix products.

XLA's CPU backend computes that gradient as a convolution whose "channels" are the examples: of 17
frames of 128x128 from 32 to 96 channels in 375 ms on two cores, where the products take 75; of 9 of
32x32 from 128 to 128 in 12, where they take 10 (`tools/bench_conv.py --planes`). Used by `conv`, on
CPUs only.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from sora_jax import sharding

Pair = tuple[int, int]


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
    if on_one_device():
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
    """Frame by frame, each kernel row's gradient is one product of dy with rows beside rows.

    In that order: with dy, of the fewer columns, on the left it runs at 250 GFLOP/s, not 180.
    """
    kh, kw, inputs, outputs = shape
    _, _, h, w, _ = dy.shape
    x = jnp.pad(x, ((0, 0), (0, 0), *padding, (0, 0)))
    x, dy = (a.reshape(-1, *a.shape[2:]) for a in (x, dy))

    def step(total, frame):
        x, dy = frame
        dy = dy.reshape(h * w, outputs)
        beside = jnp.concatenate([x[:, j : j + w] for j in range(kw)], axis=-1)
        rows = (beside[i : i + h].reshape(h * w, kw * inputs) for i in range(kh))
        return total + jnp.stack([dy.T @ each for each in rows]), None

    total = jnp.zeros((kh, outputs, kw * inputs))
    return lax.scan(step, total, (x, dy))[0].swapaxes(1, 2).reshape(shape)
