"""The shipped weights: small enough, complete, and more than a constant picture."""

import numpy as np
import pytest

import sora_jax

LIMIT = 60e6  # bytes


@pytest.fixture(scope="module")
def folder():
    return sora_jax.weights_folder("paperworld")


def test_weights_fit_in_the_repository_and_have_a_card(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    card = (folder / "README.md").read_text()
    for word in ("data", "steps", "hardware", "licence", "held-out"):
        assert word in card.lower()


def test_a_sentence_becomes_a_moving_picture_that_depends_on_the_seed(folder):
    pipe = sora_jax.load("paperworld")
    first, other = (pipe("a red ball rolls left", steps=8, seed=seed).frames for seed in (0, 1))
    assert first.shape == (17, 64, 64, 3)
    assert first.std() > 10  # more than one flat colour
    assert np.abs(np.diff(first.astype(int), axis=0)).mean() > 0.1
    assert np.abs(first.astype(int) - other).mean() > 1
