"""Linear, embedding and norm layers whose parameters carry logical axes; no blocks.

Parameters, norms and the residual stream are float32. Matrix products take operands in a
compute dtype and accumulate in float32, in the backward pass too, so that bfloat16 runs on
the matrix units of TPUs, GPUs and CPUs alike. Results are float32, but for those of `Linear`
layers that are `rounded`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sora_jax import quantized, sharding
from sora_jax.quantized import QUANTIZED

Axes = Sequence[str | None]
GPUS = ("gpu", "cuda")  # names of their platform, by jax.default_backend and by devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def dot(
    x: jax.Array,
    w: jax.Array,
    dtype: str,
    axes: tuple[str | None, ...] = (),
    result: str = "float32",
) -> jax.Array:
    """x (..., i) @ w (i, o): operands cast to `dtype`, sums in float32, rounded to `result`.

    A custom gradient, because the transpose of a dot with float32 output would multiply a
    float32 cotangent with a low-precision operand, which no matrix unit does.

    Args:
      dtype: of the operands, or a name in QUANTIZED.
      axes: logical axes of `w`. With them a mesh gathers its shards after the cast, and the
        gradient, summed in float32, goes straight to the shards.
      result: dtype of the result, and to which the gradient of `x` is rounded.
    """
    return _dot_forward(x, w, dtype, axes, result)[0]


def _dot_forward(x, w, dtype, axes, result):
    held = "bfloat16" if dtype in QUANTIZED else dtype
    x_, w_ = x.astype(held), sharding.gather_weight(w.astype(held), *axes)
    if dtype in QUANTIZED:
        y = quantized.matmul(x_, w_, dtype).astype(result)
    else:
        y = jnp.matmul(x_, w_, preferred_element_type=result)
    return y, (x_, w_, jnp.zeros((), x.dtype), jnp.zeros((), w.dtype))


def _dot_backward(dtype, axes, result, residuals, dy):
    x, w, x_like, w_like = residuals
    dy = dy.astype(x.dtype)
    if dtype in QUANTIZED:
        dx = quantized.matmul_transposed(dy, w, dtype)
    else:
        dx = jnp.matmul(dy, w.T, preferred_element_type=result)
    dw = jnp.einsum("...i,...o->io", x, dy, preferred_element_type=jnp.float32)
    dw = sharding.scatter_weight(dw, *axes)
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype)


dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_vjp
def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y + bias in the dtype of `y`; the gradient of `bias` is summed in float32 all the same."""
    return y + _last(bias, y).astype(y.dtype)


def _add_bias_forward(y, bias):
    return _add_bias(y, bias), jnp.zeros((), bias.dtype)


def _add_bias_backward(bias_like, dy):
    if dy.dtype != jnp.float32:
        # Else XLA leaves the rounding out for this sum, and writes float32 for all who read `dy`.
        dy = jax.lax.optimization_barrier(dy)
    summed = jnp.sum(dy, axis=tuple(range(dy.ndim - 1)), dtype=jnp.float32)
    return dy, summed.astype(bias_like.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(equation: str, x: jax.Array, y: jax.Array, dtype: str) -> jax.Array:
    """Einsum of two operands cast to `dtype`, with sums and result in float32, as `dot` is.

    No letter may stand in one term alone, so that each gradient is itself one einsum.
    """
    dtype = _contract_dtype(dtype)
    return jnp.einsum(
        equation, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
    )


_float32_only = contextvars.ContextVar("float32_only", default=False)


@contextlib.contextmanager
def float32_contractions():
    """What is traced inside contracts in float32, as CPUs must: for programs of every platform."""
    token = _float32_only.set(True)
    try:
        yield
    finally:
        _float32_only.reset(token)


def _contract_dtype(dtype: str) -> str:
    # XLA's CPU backend refuses some batched bfloat16 products with float32 results ("Unsupported
    # element type for DotThunk"), and gains nothing on those that it takes.
    return "float32" if _float32_only.get() or sharding.platform() == "cpu" else dtype


def _contract_forward(equation, x, y, dtype):
    dtype_ = _contract_dtype(dtype)
    x_, y_ = x.astype(dtype_), y.astype(dtype_)
    out = jnp.einsum(equation, x_, y_, preferred_element_type=jnp.float32)
    return out, (x_, y_, jnp.zeros((), x.dtype), jnp.zeros((), y.dtype))


def _contract_backward(equation, dtype, residuals, cotangent):
    x, y, x_like, y_like = residuals
    x_axes, y_axes, out_axes = equation.replace("->", ",").split(",")
    cotangent = cotangent.astype(x.dtype)
    dx = jnp.einsum(
        f"{out_axes},{y_axes}->{x_axes}", cotangent, y, preferred_element_type=jnp.float32
    )
    dy = jnp.einsum(
        f"{x_axes},{out_axes}->{y_axes}", x, cotangent, preferred_element_type=jnp.float32
    )
    return dx.astype(x_like.dtype), dy.astype(y_like.dtype)


contract.defvjp(_contract_forward, _contract_backward)


def truncated_normal(stddev: float):
    """Initialiser: normal cut at two standard deviations."""
    return nnx.initializers.truncated_normal(stddev)


class Linear(nnx.Module):
    """y = x @ kernel + bias.

    Args:
      axes: logical axes of the kernel, (input, output); the bias takes the output's.
      init: kernel initialiser; LeCun normal unless given.
      rounded: on GPUs the result has the dtype of 16-bit operands. They write a product's result
        to memory before anything else is done with it, so that float32 is twice the traffic, there
        and in the backward pass; TPUs convert within the product.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: Axes,
        rngs: nnx.Rngs,
        bias: bool = True,
        init=None,
        dtype: str = "float32",
        rounded: bool = False,
    ):
        init = nnx.initializers.lecun_normal() if init is None else init
        kernel = init(rngs.params(), (in_features, out_features), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=tuple(axes))
        self.bias = nnx.Param(jnp.zeros(out_features), axes=(axes[-1],)) if bias else None
        self.dtype, self.axes, self.rounded = dtype, tuple(axes), rounded

    def __call__(
        self, x: Float[Array, "*batch i"], *, order: Callable[[jax.Array], jax.Array] | None = None
    ) -> Float[Array, "*batch o"]:
        """`order` rearranges the output's channels, by doing so to the columns of the weights."""
        order = order or (lambda columns: columns)
        rounded = self.rounded and sharding.platform() in GPUS
        held = "bfloat16" if self.dtype in QUANTIZED else self.dtype
        result = held if rounded else "float32"
        y = dot(x, order(self.kernel[...]), self.dtype, self.axes, result)
        return y if self.bias is None else _add_bias(y, order(self.bias[...]))


class Embedding(nnx.Module):
    """Rows of a table, by id."""

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs, stddev: float = 1.0):
        table = stddev * jax.random.normal(rngs.params(), (vocab_size, width))
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        return self.embedding[...][ids]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (Ba et al. 2016), with or without parameters."""

    def __init__(self, width: int, *, eps: float = 1e-6, affine: bool = True):
        self.scale = nnx.Param(jnp.ones(width), axes=("norm",)) if affine else None
        self.bias = nnx.Param(jnp.zeros(width), axes=("norm",)) if affine else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        x = x.astype(jnp.float32)
        mean = jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
        y = (x - mean) * jax.lax.rsqrt(variance + self.eps)
        if self.scale is None:
            return y
        return y * _last(self.scale[...], y) + _last(self.bias[...], y)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(width), axes=("norm",))
        self.eps = eps

    def __call__(
        self, x: Float[Array, "*batch d"], *, order: Callable[[jax.Array], jax.Array] | None = None
    ) -> Float[Array, "*batch d"]:
        """`order` is that of the channels of `x`, as for `Linear`."""
        x = x.astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...]
        return y * _last(scale if order is None else order(scale), y)


def _last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """`vector` with leading axes, so that it broadcasts under rank_promotion="raise"."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
