"""The tiny pipeline that was trained for every task, and a clip of its size."""

import numpy as np
import pytest

import sora_jax


@pytest.fixture(scope="session")
def pipe(tasks_folder):
    return sora_jax.load(tasks_folder)


@pytest.fixture
def clip():
    return np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
