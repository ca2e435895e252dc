"""The tiny pipeline as one that was trained for every task."""

import json
import shutil

import numpy as np
import pytest

import sora_jax
from sora_jax.diffusion.tasks import FRAME_TIMES, MASKS


@pytest.fixture(scope="session")
def tasks_folder(pipeline_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("tasks") / "tiny"
    shutil.copytree(pipeline_folder, target)
    path = target / "sampling.json"
    values = json.loads(path.read_text()) | {"tasks": [*MASKS, FRAME_TIMES], "frames": 9}
    path.write_text(json.dumps(values))
    return target


@pytest.fixture(scope="session")
def pipe(tasks_folder):
    return sora_jax.load(tasks_folder)


@pytest.fixture
def clip():
    return np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
