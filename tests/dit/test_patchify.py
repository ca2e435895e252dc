import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.dit import patchify


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_unpatchify_inverts_patchify(patch_size):
    latents = jax.random.normal(jax.random.key(0), (2, 4, 6, 12, 5))
    grid = patchify.grid(4, 6, 12, patch_size=patch_size)
    tokens = patchify.patchify(latents, patch_size)
    assert tokens.shape == (2, np.prod(grid), np.prod(patch_size) * 5)
    np.testing.assert_array_equal(patchify.unpatchify(tokens, patch_size, grid=grid), latents)


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 1, 3)])
def test_tokens_side_by_side_are_those_of_all_channels(patch_size):
    latents = jax.random.normal(jax.random.key(0), (2, 4, 6, 12, 5))
    parts = (patchify.patchify(x, patch_size) for x in (latents[..., :3], latents[..., 3:]))
    joined = patchify.beside(*parts, patch_size)
    np.testing.assert_array_equal(joined, patchify.patchify(latents, patch_size))


def test_token_i_is_the_patch_at_position_i():
    latents = jnp.arange(2 * 4 * 6, dtype=jnp.float32).reshape(1, 2, 4, 6, 1)
    tokens = patchify.patchify(latents, (1, 2, 2))
    positions = np.asarray(patchify.positions(2, 2, 3))
    for token, (f, h, w) in zip(tokens[0], positions, strict=True):
        patch = latents[0, f, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2, 0]
        np.testing.assert_array_equal(token, patch.reshape(-1))


def test_untiled_latents_are_refused_with_the_nearest_sizes():
    with pytest.raises(ValueError, match=r"\(3, 4, 6\) and \(3, 6, 6\)"):
        patchify.patchify(jnp.zeros((1, 3, 5, 6, 4)), (1, 2, 2))
