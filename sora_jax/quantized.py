"""Matrix products of 8-bit operands, through qwix; the gradient of the weight stays in bfloat16.

Rows of the left operand and columns of the right one have a scale each (largest magnitude). Forward
and the gradient of the input are 8-bit: int8 in both, or float8 of four bits' exponent forward and
of five backward (Micikevicius et al. 2022, arXiv:2209.05433).
"""

import jax
import jax.numpy as jnp

# Name -> types of (activations and weights, gradients of the output).
QUANTIZED = {"int8": ("int8", "int8"), "float8": ("float8_e4m3fn", "float8_e5m2")}


def matmul(x: jax.Array, w: jax.Array, name: str) -> jax.Array:
    """x (..., i) @ w (i, o) in float32."""
    kind = QUANTIZED[name][0]
    return _product(x, w, contracted=0, types=(kind, kind))


def matmul_transposed(dy: jax.Array, w: jax.Array, name: str) -> jax.Array:
    """dy (..., o) @ w (i, o)^T in float32: the gradient of `matmul`'s input."""
    kind, gradient = QUANTIZED[name]
    return _product(dy, w, contracted=1, types=(gradient, kind))


def _product(x, w, *, contracted: int, types: tuple[str, str]):
    try:
        import qwix
    except ModuleNotFoundError:
        raise ValueError(
            "dit.quantization needs qwix: pip install 'sora_jax[quantize]', or set it to 'none'."
        ) from None
    rows = tuple(range(x.ndim - 1))
    x = qwix.quantize(x.astype(jnp.float32), types[0], channelwise_axes=rows)
    w = qwix.quantize(w.astype(jnp.float32), types[1], channelwise_axes=(1 - contracted,))
    axes = (((len(rows),), (contracted,)), ((), ()))
    return qwix.dot_general(x, w, axes, preferred_element_type=jnp.float32)
