"""Muon (Jordan et al. 2024): momentum whose singular values are all made about one.

The quintic Newton-Schulz iteration X <- (a I + b A + c A^2) X, A = X X^T, keeps A a polynomial of
the first one, so for a matrix that is not square it runs on the small Gram matrix alone and meets
the large one twice: at the start for A, at the end for X Q. For the kernels of a convolution (27
times as tall as wide) that is a quarter of the work.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

# Coefficients of Jordan et al. 2024: singular values in (0, 1] land between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Updates are scaled to this root mean square, that of Adam's, so that one learning rate serves
# both (Liu et al. 2025, arXiv:2502.16982, Eq. 4).
UPDATE_RMS = 0.2
# From this ratio of sides on, iterating on the Gram matrix in float32 takes less time than on the
# matrix in bfloat16: .3 to .8 of it at 4:1, but 1.8 times as much at 1:1, on two cores with AVX-512
# BF16.
GRAM_ASPECT = 2


class MuonState(NamedTuple):
    """The momentum, a tree like the parameters."""

    momentum: Any


def orthogonalize(x: Float[Array, "*stack m n"]) -> Float[Array, "*stack m n"]:
    """x with its singular values moved near 1, its singular vectors kept."""
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = x / jnp.maximum(norm, 1e-8)
    short, long = sorted(x.shape[-2:])
    if long < GRAM_ASPECT * short:
        return _iterate(x)
    if x.shape[-2] < x.shape[-1]:
        return _iterate_gram(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    return _iterate_gram(x)


def _iterate(x):
    """On x itself, which corrects the rounding of earlier steps: bfloat16 operands suffice."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = _product("...mk,...nk->...mn", x, x)
        factor = b * gram + c * _product("...mk,...nk->...mn", gram, gram)  # it is symmetric
        x = a * x + _product("...mk,...kn->...mn", factor, x)
    return x


def _product(equation, x, y):
    return jnp.einsum(
        equation,
        x.astype(jnp.bfloat16),
        y.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )


def _iterate_gram(x):
    """On the Gram matrix of a tall x.

    In full float32 on every device: rounding to bfloat16 or TF32 makes the Gram matrix indefinite,
    and each iteration would multiply that error by a^2 = 12.
    """
    a, b, c = COEFFICIENTS
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    gram = product(x.swapaxes(-1, -2), x)
    eye = jnp.broadcast_to(jnp.eye(x.shape[-1]), gram.shape)
    total = eye
    for i in range(ITERATIONS):
        factor = a * eye + b * gram + c * product(gram, gram)
        total = factor if i == 0 else product(total, factor)
        if i + 1 < ITERATIONS:
            gram = product(product(factor, gram), factor)
    return product(x, total)


def scale_by_muon(beta: float) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, of variables that are kernels (see `as_matrices`)."""

    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: beta * m + g, state.momentum, updates)
        nesterov = jax.tree.map(lambda m, g: beta * m + g, momentum, updates)
        return jax.tree.map(_direction, nesterov, is_leaf=_is_variable), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def _is_variable(leaf) -> bool:
    return isinstance(leaf, nnx.Variable)


def _direction(leaf):
    x = leaf.get_raw_value()
    if isinstance(x, optax.MaskedNode):  # another transform updates it
        return leaf
    matrices = as_matrices(leaf)
    scale = UPDATE_RMS * max(matrices.shape[-2:]) ** 0.5
    return leaf.replace((scale * orthogonalize(matrices)).reshape(x.shape))


def as_matrices(leaf: nnx.Variable) -> Float[Array, "*stack m n"]:
    """A kernel as matrices from all its own axes but the last to the last.

    Leading stack axes of scanned layers stay: each layer is a matrix of its own.
    """
    x = leaf.get_raw_value()
    stack = x.ndim - len(leaf.get_metadata()["axes"])
    return x.reshape(*x.shape[:stack], math.prod(x.shape[stack:-1]), x.shape[-1])
