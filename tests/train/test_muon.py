"""Muon's orthogonalisation against optax's, and against its fixed points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import _muon as optax_muon

from sora_jax.train.muon import COEFFICIENTS, orthogonalize

# The shapes on both sides of GRAM_ASPECT, where rounding differs.
ROUNDING = [((2, 24, 24), 2e-2), ((2, 24, 40), 2e-2), ((2, 16, 64), 2e-5), ((2, 64, 16), 2e-5)]


def matrices(shape, condition=30.0):
    """Random singular vectors; singular values from 1 down to 1 / condition."""
    x = np.random.default_rng(0).standard_normal(shape)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    values = np.geomspace(1, 1 / condition, u.shape[-1])
    return jnp.asarray((u * values) @ vt, jnp.float32)


@pytest.mark.parametrize("shape, tolerance", ROUNDING)
def test_equals_optax(shape, tolerance):
    x = matrices(shape)
    expected = jax.vmap(
        lambda m: optax_muon.orthogonalize_via_newton_schulz(m, jnp.asarray(COEFFICIENTS))
    )(x)
    np.testing.assert_allclose(jax.jit(orthogonalize)(x), expected, atol=tolerance)


@pytest.mark.parametrize("shape", [shape for shape, _ in ROUNDING])
def test_singular_values_end_near_one_and_vectors_stay(shape):
    x = matrices(shape)
    out = np.asarray(orthogonalize(x), np.float64)
    u, _, vt = np.linalg.svd(np.asarray(x), full_matrices=False)
    core = np.einsum("bmk,bmn,bln->bkl", u, out, vt)
    values = np.diagonal(core, axis1=1, axis2=2)
    assert values.min() > 0.65 and values.max() < 1.25
    off_diagonal = core - values[:, :, None] * np.eye(values.shape[1])
    assert np.abs(off_diagonal).max() < 0.03


def test_zero_stays_zero():
    for shape in ((4, 4), (4, 16)):
        assert not np.any(orthogonalize(jnp.zeros(shape)))
