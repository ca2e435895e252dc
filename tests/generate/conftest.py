"""The tiny pipeline that was trained for every task, and a clip of its size."""

import numpy as np
import pytest

import sora_jax


@pytest.fixture(scope="session")
def pipe(tasks_folder):
    return sora_jax.load(tasks_folder)


@pytest.fixture
def guided_at(pipe, monkeypatch) -> list[tuple[float, float]]:
    """Times between which guidance acted in every window that was denoised since."""
    seen, denoise = [], type(pipe.denoise).__call__

    def spy(self, noise, request, *args, **options):
        seen.append(request.guidance_interval)
        return denoise(self, noise, request, *args, **options)

    monkeypatch.setattr(type(pipe.denoise), "__call__", spy)
    return seen


@pytest.fixture
def clip():
    return np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
