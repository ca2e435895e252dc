"""Hub ids through the hub's own library, offline: a filled cache is used, an empty one is told."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sora_jax.convert import hub

NAME, REVISION = "somebody/tiny-video", "0123456789abcdef0123456789abcdef01234567"


def load(cache: Path) -> subprocess.CompletedProcess:
    """Loads NAME in a process of its own: the library reads its settings when imported."""
    code = f"import sora_jax; print(sora_jax.load({NAME!r})('a ball', frames=1).frames.shape)"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_a_checkpoint_in_the_cache_is_found_by_its_id(pipeline_folder, tmp_path):
    repository = tmp_path / "models--somebody--tiny-video"
    shutil.copytree(pipeline_folder, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    done = load(tmp_path)
    assert done.stdout.strip() == "(1, 16, 16, 3)", done.stderr


def test_offline_without_it_says_what_is_missing(tmp_path):
    last = load(tmp_path).stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: {NAME}: not in the local cache ({tmp_path})")
    for file in hub.NEEDED:
        assert file in last


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("a/b", True),
        ("Wan-AI/Wan2.1-T2V-1.3B", True),
        ("a", False),
        ("a/b/c", False),
        ("/a/b", False),
    ],
)
def test_what_can_be_a_hub_id(name, answer):
    assert hub.is_hub_id(name) == answer


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not hub.is_hub_id("a/b")
