"""Convolutions of the VAE: one function that picks the formulation, and the causal layer.

On accelerators a 3-D convolution is one `lax.conv_general_dilated`; XLA's CPU backend has a fast
path for 2-D convolutions only, of which `cpu_conv` puts it together.
"""

import contextlib
import contextvars
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from sora_jax import sharding
from sora_jax.vae import cpu_conv, space

Triple = tuple[int, int, int]
Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def conv3d(
    x: Float[Array, "b T H W i"],
    kernel: Float[Array, "kt kh kw i o"],
    *,
    stride: Triple = (1, 1, 1),
    padding: Padding = ((0, 0), (0, 0), (0, 0)),
    dtype: str = "float32",
) -> Float[Array, "b t h w o"]:
    """Cross-correlation over (time, height, width): operands in `dtype`, sums in float32.

    `padding` counts zeros before and after along each of the three axes; on a tile of a frame they
    are its neighbours' rows (`space`), and the stride divides the tile. The formulation follows
    the platform that the program is compiled for, not the one it is traced on.
    """
    x, padding = space.with_neighbours(x, padding)
    return _conv3d(x, kernel, stride, padding, dtype)


def conv_of_doubled(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "3 3 i o"], *, dtype: str = "float32"
) -> Float[Array, "b t H W o"]:
    """3x3 convolution of frames whose pixels are repeated twice along height and width."""

    def doubled(x):
        return jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)

    settings = {"stride": (1, 1, 1), "padding": ((0, 0), (1, 1), (1, 1))}
    if dtype != "float32" or space.is_tiled() or _two_dimensional.get():
        return conv3d(doubled(x), kernel[None], dtype=dtype, **settings)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=cpu_conv.of_doubled,
        default=lambda x, kernel: _single(doubled(x), kernel[None], **settings),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv3d(x, kernel, stride, padding, dtype):
    # The gradient is custom for the reason given at `layers.dot`: JAX's own transpose of a
    # convolution with float32 output does not take low-precision operands.
    return _forward(x.astype(dtype), kernel.astype(dtype), stride, padding)


def _conv3d_forward(x, kernel, stride, padding, dtype):
    x_, kernel_ = x.astype(dtype), kernel.astype(dtype)
    return _forward(x_, kernel_, stride, padding), (x_, kernel_)


def _conv3d_backward(stride, padding, dtype, residuals, dy):
    x, kernel = residuals
    dx, dkernel = lax.platform_dependent(
        x,
        kernel,
        dy.astype(dtype),
        cpu=functools.partial(cpu_conv.taps_backward, stride=stride, padding=padding),
        default=functools.partial(_single_backward, stride=stride, padding=padding),
    )
    return dx, dkernel


_conv3d.defvjp(_conv3d_forward, _conv3d_backward)


_two_dimensional = contextvars.ContextVar("two_dimensional", default=False)


@contextlib.contextmanager
def two_dimensional():
    """What is traced inside holds sums of 2-D convolutions, whatever the platform.

    For converters to other formats, which know neither branches by platform nor, some, 3-D
    convolutions whose channels come last.
    """
    token = _two_dimensional.set(True)
    try:
        yield
    finally:
        _two_dimensional.reset(token)


def _forward(x, kernel, stride, padding):
    if _two_dimensional.get():
        return cpu_conv.taps(x, kernel, stride=stride, padding=padding)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(cpu_conv.taps, stride=stride, padding=padding),
        default=functools.partial(_single, stride=stride, padding=padding),
    )


def _single(x, kernel, *, stride, padding):
    """One 3-D convolution: for GPUs and TPUs."""
    return lax.conv_general_dilated(
        x,
        kernel,
        stride,
        padding,
        dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
        preferred_element_type=jnp.float32,
    )


def _single_backward(x, kernel, dy, *, stride, padding):
    """Both gradients of `_single`, each one convolution with float32 sums.

    With y[n] = sum_k x[s n + k - lo] w[k] along an axis, dx is the convolution of dy, dilated
    by s, with the flipped kernel, and dw[k] that of x with dy, dilated by s, as the kernel.
    """
    dx_padding, dw_padding = [], []
    for size, taps, out, s, (lo, _) in zip(
        x.shape[1:4], kernel.shape[:3], dy.shape[1:4], stride, padding, strict=True
    ):
        span = (out - 1) * s
        dx_padding.append((taps - 1 - lo, size - 1 + lo - span))
        dw_padding.append((lo, taps + span - size - lo))  # negative: inputs that no output reads
    dx = lax.conv_general_dilated(
        dy,
        kernel[::-1, ::-1, ::-1],
        (1, 1, 1),
        dx_padding,
        lhs_dilation=stride,
        dimension_numbers=("NTHWC", "THWOI", "NTHWC"),
        preferred_element_type=jnp.float32,
    )
    dkernel = lax.conv_general_dilated(
        x,
        dy,
        (1, 1, 1),
        dw_padding,
        rhs_dilation=stride,
        dimension_numbers=("CTHWN", "ITHWO", "THWNC"),
        preferred_element_type=jnp.float32,
    )
    return dx, dkernel


def _whole(kernel: nnx.Param) -> jax.Array:
    """A kernel gathered from its shards."""
    return sharding.gather_weight(kernel[...], *kernel.get_metadata()["axes"])


class Carry:
    """Frames that causal layers hand from one chunk of a clip to the next, in call order.

    One object serves one pass of the encoder or decoder: layers take what they kept from the
    chunk before, `taken`, and leave what the next chunk needs in `kept`. Made from None it stands
    for the start of a clip, where everything before is zeros.
    """

    def __init__(self, kept: Sequence[jax.Array] | None = None):
        self.first = kept is None
        self.taken = kept
        self._previous = iter(kept or ())
        self.kept: list[jax.Array] = []

    def extend(self, x: jax.Array, frames: int) -> jax.Array:
        """`x` with the `frames` frames before it in front; keeps its last ones."""
        if self.first:
            before = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
        else:
            before = next(self._previous)
        x = jnp.concatenate([before, x], axis=1)
        self.kept.append(x[:, x.shape[1] - frames :])
        return x


def inflated_init(key, shape, dtype=jnp.float32):
    """LeCun normal on the newest time tap, zeros on the earlier ones.

    A fresh VAE then treats a clip as single images, as one inflated from an image VAE does: it can
    learn from images first, which cost a frame each, and then learn what motion adds.
    """
    newest = nnx.initializers.lecun_normal()(key, (1, *shape[1:]), dtype)
    return jnp.concatenate([jnp.zeros((shape[0] - 1, *shape[1:]), dtype), newest])


class CausalConv3d(nnx.Module):
    """3-D convolution that sees no later frame; height and width are padded to "same".

    Args:
      size: kernel size (time, height, width), odd in height and width.
      init: kernel initialiser; `inflated_init` unless given.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        size: Triple,
        rngs: nnx.Rngs,
        stride: Triple = (1, 1, 1),
        init=None,
        dtype: str = "float32",
    ):
        init = inflated_init if init is None else init
        kernel = init(rngs.params(), (*size, in_channels, out_channels), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=(None, None, None, "conv_in", "conv_out"))
        self.bias = nnx.Param(jnp.zeros(out_channels), axes=("bias",))
        self.stride = stride
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "b t h w i"], carry: Carry | None = None, *, causal: bool = True
    ) -> Float[Array, "b T h w o"]:
        """Convolves; a `carry` continues the chunk before, and `causal=False` pads no time."""
        taps, *spatial = self.kernel.shape[:3]
        front = taps - 1 if causal else 0
        if carry is not None and front:
            x, front = carry.extend(x, front), 0
        padding = ((front, 0), *((k // 2, k // 2) for k in spatial))
        kernel = _whole(self.kernel)
        y = conv3d(x, kernel, stride=self.stride, padding=padding, dtype=self.dtype)
        return y + self.bias[...].reshape(1, 1, 1, 1, -1)


class FrameConv(nnx.Module):
    """2-D convolution of each frame, with explicit zero padding."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        size: int,
        rngs: nnx.Rngs,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        init=None,
        dtype: str = "float32",
    ):
        init = nnx.initializers.lecun_normal() if init is None else init
        kernel = init(rngs.params(), (size, size, in_channels, out_channels), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=(None, None, "conv_in", "conv_out"))
        self.bias = nnx.Param(jnp.zeros(out_channels), axes=("bias",))
        self.stride = (1, stride, stride)
        self.padding = ((0, 0), padding, padding)
        self.dtype = dtype

    def of_doubled(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t H W o"]:
        """Convolves frames of twice the height and width, each pixel four times; size 3 alone."""
        y = conv_of_doubled(x, _whole(self.kernel), dtype=self.dtype)
        return y + self.bias[...].reshape(1, 1, 1, 1, -1)

    def __call__(self, x: Float[Array, "b t H W i"]) -> Float[Array, "b t h w o"]:
        y = conv3d(
            x,
            _whole(self.kernel)[None],
            stride=self.stride,
            padding=self.padding,
            dtype=self.dtype,
        )
        return y + self.bias[...].reshape(1, 1, 1, 1, -1)
