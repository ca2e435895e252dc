"""Every format keeps pixels, time and metadata, and appears whole or not at all."""

import struct

import numpy as np
import pytest
from PIL import Image

from sora_jax import video_io

FORMATS = ("mp4", "webm", "gif", "webp", "png")
METADATA = {
    "prompt": 'a "red" ball rolls left; ü 球 \\ \n' * 12,
    "seed": 7,
    "steps": 30,
    "sizes": [64, 64],
    "guidance": 4.5,
}


def moving_ball(num_frames=17, height=64, width=80):
    """A disc over a gradient; it rests for three frames, which codecs like to merge."""
    y, x = np.mgrid[:height, :width]
    frames = []
    for i in range(num_frames):
        centre = 12 + 3 * (i if i < 6 else max(6, i - 2))
        disc = (x - centre) ** 2 + (y - height * 0.6) ** 2 < 80
        colours = [(220, 60 + y), (40, 90 + x // 2), (50, 140 + y // 2)]
        frames.append(np.stack([np.where(disc, a, b) for a, b in colours], -1))
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def psnr(a, b):
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize(
    ("suffix", "least"),
    [("png", np.inf), ("webp", np.inf), ("gif", 40), ("mp4", 32), ("webm", 31)],
)
def test_round_trip_keeps_pixels_frames_and_rate(tmp_path, suffix, least):
    frames = moving_ball()
    path = video_io.write_video(tmp_path / f"ball.{suffix}", frames, fps=8)
    clip = video_io.read_video(path)
    assert clip.frames.shape == frames.shape
    assert clip.fps == 8
    assert psnr(clip.frames, frames) >= least


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_colours_are_unbiased_through_yuv(tmp_path, suffix):
    grey = np.full((4, 64, 64, 3), 150, np.uint8)
    grey[..., 0] += np.arange(64, dtype=np.uint8)
    path = video_io.write_video(tmp_path / f"grey.{suffix}", grey, fps=8)
    difference = video_io.read_video(path).frames.astype(float) - grey
    assert np.abs(difference.mean((0, 1, 2))).max() < 0.5


@pytest.mark.parametrize("suffix", FORMATS)
def test_metadata_comes_back_the_same(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    video_io.write_video(path, moving_ball(3), fps=8, metadata=METADATA)
    assert video_io.read_metadata(path) == METADATA
    assert video_io.read_video(path).frames.shape[0] == 3
    video_io.write_video(path, moving_ball(3), fps=8)
    assert video_io.read_metadata(path) == {}


@pytest.mark.parametrize("stem", ["a:b", "http:x", "file:x", "%03d"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_name_is_never_a_protocol_nor_a_pattern(tmp_path, monkeypatch, suffix, stem):
    monkeypatch.chdir(tmp_path)  # behind a folder no colon ends a protocol
    name = f"{stem}.{suffix}"
    frames = moving_ball(3, 16, 16)
    video_io.write_video(name, frames, fps=8, metadata=METADATA)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert video_io.probe(name).num_frames == 3
    assert video_io.read_video(name).frames.shape == frames.shape
    assert video_io.read_metadata(name) == METADATA
    (tmp_path / name).write_bytes(b"not a video" * 50)
    for read in (video_io.probe, video_io.read_metadata):
        with pytest.raises(ValueError) as error:
            read(name)
        assert str(error.value).startswith(f"{name}: ")


@pytest.mark.parametrize("suffix", FORMATS)
def test_same_frames_give_the_same_bytes(tmp_path, suffix):
    first = video_io.write_video(tmp_path / f"a.{suffix}", moving_ball(5), fps=8, metadata=METADATA)
    again = video_io.write_video(tmp_path / f"b.{suffix}", moving_ball(5), fps=8, metadata=METADATA)
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("suffix", FORMATS)
def test_one_frame_and_odd_sizes(tmp_path, suffix):
    frame = moving_ball(1, 33, 47)
    path = video_io.write_video(tmp_path / f"x.{suffix}", frame, fps=8, metadata=METADATA)
    back = video_io.read_video(path).frames[:, :33, :47]
    assert back.shape == frame.shape
    assert psnr(back, frame) > 28
    assert video_io.read_metadata(path) == METADATA


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_other_programs_see_a_looping_animation(tmp_path, suffix):
    path = video_io.write_video(tmp_path / f"x.{suffix}", moving_ball(), fps=12.5)
    with Image.open(path) as image:
        image.load()
        assert (image.n_frames, image.info["loop"]) == (17, 0)
        assert image.info["duration"] == 80


def test_large_webp_is_lossy_and_close(tmp_path):
    frames = moving_ball(6, 432, 432)
    path = video_io.write_video(tmp_path / "x.webp", frames, fps=8)
    assert psnr(video_io.read_video(path).frames, frames) > 38
    assert path.stat().st_size < frames.size / 50


def test_mp4_index_comes_first_and_plays_in_browsers(tmp_path):
    path = video_io.write_video(tmp_path / "x.mp4", moving_ball(), fps=30000 / 1001)
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert b"avc1" in data
    assert video_io.probe(path).fps == pytest.approx(30000 / 1001)


@pytest.mark.parametrize("error", [RuntimeError("disk on fire"), KeyboardInterrupt()])
@pytest.mark.parametrize("suffix", FORMATS)
def test_failure_leaves_the_directory_as_it_was(tmp_path, monkeypatch, suffix, error):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(b"what was there before")

    def fail(*args, **kwargs):
        raise error

    if suffix in ("mp4", "webm"):
        convert, calls = video_io.write._yuv_frame, []

        def fail_at_third(frame, index):
            calls.append(index)
            return fail() if len(calls) == 3 else convert(frame, index)

        monkeypatch.setattr(video_io.write, "_yuv_frame", fail_at_third)
    elif suffix == "gif":
        monkeypatch.setattr(video_io.containers, "gif_with_comment", fail)
    else:
        monkeypatch.setattr(video_io.paths.os, "replace", fail)
    with pytest.raises(type(error)):
        video_io.write_video(path, moving_ball(5), fps=8, metadata=METADATA)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"what was there before"


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_frames_reach_the_disk_while_later_ones_are_made(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (9, 96, 128, 3), dtype=np.uint8)
    sizes = []

    def parts():
        for _ in range(12):
            found = [path.stat().st_size for path in tmp_path.iterdir()]
            sizes.append(sum(found))
            yield noise

    video_io.write_video(tmp_path / f"film.{suffix}", parts(), fps=8)
    assert len(set(sizes)) > 2  # nothing, some, more


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_unknown_extension_lists_the_allowed_ones(tmp_path):
    with pytest.raises(ValueError) as error:
        video_io.check_output_path(tmp_path / "x.avi")
    assert ".avi" in one_line(error)
    assert all(f".{suffix}" in one_line(error) for suffix in FORMATS)
    with pytest.raises(ValueError, match="no extension"):
        video_io.check_output_path(tmp_path / "x")
    assert video_io.check_output_path(str(tmp_path / "X.MP4")) == tmp_path / "X.MP4"


def test_bad_directories_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not exist"):
        video_io.check_output_path(tmp_path / "nowhere" / "x.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, not a directory"):
        video_io.check_output_path(tmp_path / "file" / "x.mp4")
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        video_io.check_output_path(tmp_path / "dir.mp4")
    # Root may write anywhere, but for file systems that hold no files.
    with pytest.raises(ValueError, match=r"/proc/x.mp4: no file can be made in /proc \("):
        video_io.check_output_path("/proc/x.mp4")
    with pytest.raises(ValueError, match=r"x.mp4: File name too long; use a shorter one"):
        video_io.check_output_path(tmp_path / ("x" * 300 + ".mp4"))

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(video_io.paths.Path, "write_bytes", refused)
    with pytest.raises(ValueError, match=r"\(Permission denied\); choose another directory"):
        video_io.check_output_path(tmp_path / "x.mp4")


def test_a_failure_to_write_names_the_file_and_nothing_after_it(tmp_path):
    path = tmp_path / ("ü" * 120 + ".npy")  # 244 bytes, to which a temporary name may not add
    with video_io.atomic_path(path) as temporary:
        temporary.write_bytes(b"first")
    with pytest.raises(OSError, match="No space left") as error, video_io.atomic_path(path):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(path) and path.read_bytes() == b"first"
    with pytest.raises(FileNotFoundError) as error, video_io.atomic_path(path):
        (tmp_path / "another").read_bytes()  # which is read while this one is written
    assert error.value.filename == str(tmp_path / "another")
    gone = tmp_path / "folder" / "x.npy"
    with pytest.raises(FileNotFoundError) as error, video_io.atomic_path(gone) as temporary:
        temporary.write_bytes(b"")
    assert error.value.filename == str(gone)


@pytest.mark.parametrize("fps", [120000 / 1001, 100.123, 0.001, 240])
def test_png_tells_any_rate_in_its_sixteen_bits(tmp_path, fps):
    data = video_io.write_video(tmp_path / "x.png", moving_ball(2), fps=fps).read_bytes()
    delay, second = struct.unpack_from(">HH", data, data.index(b"fcTL") + 4 + 20)
    assert second / delay == pytest.approx(fps, rel=1e-5)


@pytest.mark.parametrize(
    ("frames", "fps", "suffix", "names"),
    [
        (moving_ball(2), 0, "mp4", "fps 0"),
        (moving_ball(2), 0.001, "gif", "at least 0.002"),
        (moving_ball(2), 0.0001, "png", "at least 0.001"),
        (moving_ball(2), float("nan"), "mp4", "fps nan"),
        (moving_ball(2), 60, "gif", "at most 50"),
        (moving_ball(2)[:0], 8, "mp4", "nothing to write"),
    ],
)
def test_bad_frames_and_rates_are_refused(tmp_path, frames, fps, suffix, names):
    with pytest.raises(ValueError, match=names) as error:
        video_io.write_video(tmp_path / f"x.{suffix}", frames, fps=fps)
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_metadata_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="metadata"):
        video_io.write_video(tmp_path / "x.png", moving_ball(1), fps=8, metadata={"a": {1, 2}})
    assert not list(tmp_path.iterdir())
