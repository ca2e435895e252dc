"""Causal 3-D convolutions on CPUs, put together of 2-D ones.

XLA's CPU backend has a fast path for 2-D convolutions only: a sum of them over the taps in time has
130 GFLOP/s forward and 106 backward with 64 channels on two cores, one in 3-D 31 and 21
(`tools/bench_conv.py`). With few channels, which leave its products short, one 2-D convolution of
the frames that the taps read, channel beside channel, is faster still. In bfloat16, and where there
are channels enough to pay for gathering them, it is a product with the gathered 3x3 neighbourhoods,
because CPUs have bfloat16 units for products and none for convolutions.
"""

import functools

import jax
import jax.numpy as jnp

from sora_jax.vae import plane_conv
from sora_jax.vae.plane_conv import plane_conv as convolve

# Channels, in and out, from which gathering neighbourhoods pays.
COLUMNS_CHANNELS = 128
# Channels up to which taps in time lie beside each other: 32 to 32 of 128x128 at 82 GFLOP/s, not
# 50; 64 to 64 of 64x64 at 63, not 81.
FOLDED_CHANNELS = 32


def taps(x, kernel, *, stride, padding):
    """Cross-correlation in float32, after the rounding to x's type; as `conv.conv3d`."""
    if _columns_pay(x, kernel, stride=stride, padding=padding):
        return _columns(x, kernel, before=padding[0][0])
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    count, (inputs, outputs) = kernel.shape[0], kernel.shape[3:]
    if inputs <= min(outputs, FOLDED_CHANNELS) and _is_foldable(x, kernel, stride):
        beside = _beside(_in_time(x, padding[0]), count)
        folded = kernel.transpose(1, 2, 0, 3, 4).reshape(*kernel.shape[1:3], -1, outputs)
        return convolve(beside, folded, stride[1:], padding[1:])
    s, (before, after) = stride[0], padding[0]
    length = (x.shape[1] + before + after - count) // s + 1
    # A tap that meets nothing but padding (a single image has two such) adds nothing.
    met = [i for i in range(count) if before - (length - 1) * s <= i < before + x.shape[1]]
    x = _in_time(x, padding[0])

    def one(tap):
        frames = x if count == s == 1 else x[:, tap : tap + (length - 1) * s + 1 : s]
        if kernel.shape[1:3] == stride[1:] == (1, 1) and padding[1:] == ((0, 0), (0, 0)):
            return frames @ kernel[tap, 0, 0][None, None, None]
        return convolve(frames, kernel[tap], stride[1:], padding[1:])

    return sum(one(tap) for tap in met)


def taps_backward(x, kernel, dy, *, stride, padding):
    """Both gradients of `taps`."""
    if _columns_pay(x, kernel, stride=stride, padding=padding):
        return _columns_backward(x, kernel, dy, before=padding[0][0])
    x, kernel, dy = (a.astype(jnp.float32) for a in (x, kernel, dy))
    if not (_is_foldable(x, kernel, stride) and plane_conv.on_one_device()):
        return jax.vjp(functools.partial(taps, stride=stride, padding=padding), x, kernel)[1](dy)
    mirrored = kernel[::-1, ::-1, ::-1].swapaxes(3, 4)
    mirrored_padding = tuple(
        (k - 1 - lo, k - 1 - hi) for k, (lo, hi) in zip(kernel.shape[:3], padding, strict=True)
    )
    dx = taps(dy, mirrored, stride=stride, padding=mirrored_padding)
    return dx, _kernel_gradient(x, kernel, dy, padding)


def _kernel_gradient(x, kernel, dy, padding):
    """That of a kernel of several taps, which are gathered on the side of the fewer channels."""
    count, *size, inputs, outputs = kernel.shape
    gradient = functools.partial(plane_conv.kernel_gradient, padding=padding[1:])
    if count * inputs <= FOLDED_CHANNELS:
        beside = _beside(_in_time(x, padding[0]), count)
        folded = gradient(beside, dy, (*size, count * inputs, outputs))
        return folded.reshape(*size, count, inputs, outputs).transpose(2, 0, 1, 3, 4)
    if outputs <= min(inputs, FOLDED_CHANNELS):
        # Frame n of x meets dy[n + before - i] through tap i.
        before, after = padding[0]
        beside = _beside(_in_time(dy, (count - 1 - before, count - 1 - after)), count)
        folded = gradient(x, beside, (*size, inputs, count * outputs))
        return folded.reshape(*size, inputs, count, outputs).transpose(3, 0, 1, 2, 4)[::-1]
    x, length = _in_time(x, padding[0]), dy.shape[1]
    return jnp.stack([gradient(x[:, i : i + length], dy, kernel.shape[1:]) for i in range(count)])


def of_doubled(x, kernel):
    """As `conv.conv_of_doubled`: four convolutions of 2x2, 4/9 of the products.

    Of the three rows that a row of the result reads two are one row of x: the upper result of two
    reads the row above once and its own twice, the lower its own twice and the one below.
    """
    b, t, h, w, _ = x.shape
    rows = []
    for of_rows, above in zip(_of_doubled_rows(kernel), ((1, 0), (0, 1)), strict=True):
        columns = [
            convolve(x, both.swapaxes(0, 1), (1, 1), (above, beside))
            for both, beside in zip(
                _of_doubled_rows(of_rows.swapaxes(0, 1)), ((1, 0), (0, 1)), strict=True
            )
        ]
        rows.append(jnp.stack(columns, axis=4).reshape(b, t, h, 2 * w, -1))
    return jnp.stack(rows, axis=3).reshape(b, t, 2 * h, 2 * w, -1)


def _of_doubled_rows(kernel):
    """Kernels of two rows for the upper and the lower of two results."""
    first, middle, last = kernel
    return jnp.stack([first, middle + last]), jnp.stack([first + middle, last])


def _is_foldable(x, kernel, stride) -> bool:
    """Several taps in time and an extent in space, at every place, of several frames."""
    return kernel.shape[0] > 1 and kernel.shape[1] > 1 and stride == (1, 1, 1) and x.shape[1] > 2


def _in_time(x, padding):
    """Zeros before and after."""
    return x if padding == (0, 0) else jnp.pad(x, ((0, 0), padding, *((0, 0),) * 3))


def _beside(x, count):
    """(b, t, h, w, c) to (b, t - count + 1, h, w, count c): each frame with those that follow."""
    length = x.shape[1] - count + 1
    return jnp.concatenate([x[:, i : i + length] for i in range(count)], axis=-1)


def _columns_pay(x, kernel, *, stride, padding) -> bool:
    """Whether `_columns` can stand in for `_taps`, and is the faster."""
    return (
        x.dtype == jnp.bfloat16
        and min(kernel.shape[3:]) >= COLUMNS_CHANNELS
        and (stride, kernel.shape[1:3], padding[1:]) == ((1, 1, 1), (3, 3), ((1, 1), (1, 1)))
        and padding[0][1] == 0
    )


def _neighbourhoods(x):
    """(b, t, h, w, c) to (b, t, h, w, 9 c): each position with its eight neighbours, in rows."""
    _, _, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate(
        [x[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1
    )


def _tap_ranges(frames: int, taps: int, *, before: int):
    """(tap, inputs, outputs): which frames a time tap reads and which it adds to."""
    length = frames + before - taps + 1
    for tap in range(taps):
        first, last = max(0, before - tap), length
        if first < last:  # else the tap meets nothing but the padding in front
            yield tap, slice(first + tap - before, last + tap - before), slice(first, last)


def _columns(x, kernel, *, before):
    """A sum over time taps of products with neighbourhoods; `before` frames of zeros in front."""
    taps, _, _, inputs, outputs = kernel.shape
    flat = kernel.reshape(taps, 9 * inputs, outputs)
    columns = _neighbourhoods(x)
    y = jnp.zeros((x.shape[0], x.shape[1] + before - taps + 1, *x.shape[2:4], outputs))
    for tap, read, written in _tap_ranges(x.shape[1], taps, before=before):
        product = jnp.matmul(columns[:, read], flat[tap], preferred_element_type=jnp.float32)
        y = y.at[:, written].add(product)
    return y


def _columns_backward(x, kernel, dy, *, before):
    """Both gradients of `_columns`: that by x is a convolution with the mirrored kernel."""
    taps, _, _, inputs, outputs = kernel.shape
    mirrored = kernel[:, ::-1, ::-1].swapaxes(3, 4).reshape(taps, 9 * outputs, inputs)
    columns, dy_columns = _neighbourhoods(x), _neighbourhoods(dy)
    dx = jnp.zeros(x.shape)
    dkernel = [jnp.zeros((9 * inputs, outputs))] * taps
    for tap, read, written in _tap_ranges(x.shape[1], taps, before=before):
        product = jnp.matmul(
            dy_columns[:, written], mirrored[tap], preferred_element_type=jnp.float32
        )
        dx = dx.at[:, read].add(product)
        dkernel[tap] = jnp.einsum(
            "bthwi,bthwo->io", columns[:, read], dy[:, written], preferred_element_type=jnp.float32
        )
    return dx, jnp.stack(dkernel).reshape(kernel.shape)
