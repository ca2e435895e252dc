import io
from fractions import Fraction

import av
import numpy as np
import pytest

from sora_jax.data import records
from sora_jax.data.build.encode import ClipEncoder, clip_frames, fitted_size, png_bytes
from sora_jax.data.build.filters import Crop
from sora_jax.data.build.media import Media
from sora_jax.data.build.settings import ResizeSettings, WriteSettings


def encode(frames, rate=Fraction(10), **settings):
    encoder = ClipEncoder(frames.shape[1:3], rate, WriteSettings(**settings))
    for frame in frames:
        encoder.add(frame)
    return encoder.finish()


def packets(data):
    with av.open(io.BytesIO(data)) as container:
        return [p for p in container.demux(video=0) if p.size]


@pytest.mark.parametrize("seed", range(30))
def test_sizes_fit_the_budget_keep_the_shape_and_never_grow(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(x) for x in rng.integers(64, 2000, 2))
    multiple = int(rng.choice([2, 8, 16]))
    budget = int(rng.integers(128 * 128, 1024 * 1024))
    h, w = fitted_size(height, width, ResizeSettings(max_pixels=budget, multiple=multiple))
    assert h % multiple == w % multiple == 0
    assert h <= height and w <= width and h * w <= budget
    # Of the picture, at most what a multiple of each side takes is cut off.
    shown = min(h / height, w / width) / max(h / height, w / width)
    grain = (1 - multiple / h) * (1 - multiple / w)
    assert shown >= grain
    # And a good part of the budget, or of the picture, is used.
    assert h * w >= 0.85 * grain * min(budget, height * width)


def test_sizes_of_known_pictures():
    budget = ResizeSettings(max_pixels=512 * 512)
    assert fitted_size(720, 1280, budget) == (384, 672)
    assert fitted_size(512, 512, budget) == (512, 512)
    assert fitted_size(49, 65, budget) == (48, 64)
    assert fitted_size(49, 65, None) == (48, 64)
    with pytest.raises(ValueError, match=r"too small \(64x10; each side at least 16\)"):
        fitted_size(10, 64, budget)


def test_a_clip_has_a_key_frame_every_gop_and_nowhere_else(moving):
    frames = np.concatenate([moving(11, seed=0), moving(10, seed=1)])  # a cut at frame 11
    found = packets(encode(frames, gop=4))
    keys = sorted(round(float(p.pts * p.time_base) * 10) for p in found if p.is_keyframe)
    assert keys == [0, 4, 8, 12, 16, 20]
    with av.open(io.BytesIO(encode(frames))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames, stream.start_time) == (10, 21, 0)


def test_the_same_frames_give_the_same_bytes_without_date_or_muxer(moving):
    frames = moving(12)
    data = encode(frames)
    assert data == encode(frames)
    at = data.index(b"mvhd") + 8
    assert data[at : at + 8] == bytes(8)  # when it was made and changed
    assert b"Lavf" not in data


def test_colours_and_contents_survive(moving):
    flat = np.full((4, 48, 64, 3), (200, 40, 90), np.uint8)
    assert np.abs(records.decode_clip(encode(flat)).astype(int) - flat).max() <= 3
    frames = moving(12, 96, 128)
    # Chroma has half the resolution; luma is what crf decides.
    luma = (0.2126, 0.7152, 0.0722)
    error = (records.decode_clip(encode(frames, crf=12)).astype(float) - frames) @ luma
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 38


def test_png_keeps_every_pixel():
    frame = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(records.decode_clip(png_bytes(frame))[0], frame)


def read(path, *, start, count, rate, crop=Crop(), size=(48, 64)):  # noqa: B008
    with Media(path) as media:
        return np.stack(
            list(
                clip_frames(
                    media, start=start, num_frames=count, rate=Fraction(rate), size=size, crop=crop
                )
            )
        )


def test_a_clip_is_exactly_the_frames_of_the_file_that_it_names(make_video, moving):
    path = make_video("x.mp4", moving(40, speed=3), gop=12)
    whole = read(path, start=0.0, count=40, rate=10)
    assert len({frame.tobytes() for frame in whole}) == 40
    for first, count in [(0, 5), (7, 9), (12, 28), (39, 1)]:
        clip = read(path, start=first / 10, count=count, rate=10)
        np.testing.assert_array_equal(clip, whole[first : first + count])
    np.testing.assert_array_equal(read(path, start=0.4, count=18, rate=5), whole[4:40:2])


def test_uneven_frames_come_at_an_even_rate_by_their_time_stamps(make_video):
    grays = [np.full((48, 64, 3), 20 * i, np.uint8) for i in range(6)]
    path = make_video("x.mkv", grays, times=[0.0, 0.1, 0.2, 0.6, 0.7, 0.8], crf="1")
    shown = read(path, start=0.0, count=9, rate=10)[:, 0, 0, 0]
    np.testing.assert_allclose(shown, [0, 20, 40, 40, 40, 40, 60, 80, 100], atol=3)


def test_bars_are_cut_off_before_resizing(make_video):
    frame = np.zeros((80, 64, 3), np.uint8)
    frame[30:78] = 180  # off the centre, so that fitting alone would not leave it
    path = make_video("x.mp4", [frame] * 5)
    clip = read(path, start=0.0, count=5, rate=10, crop=Crop(top=31 / 80, bottom=3 / 80))
    assert clip.min() > 170


def test_a_clip_past_the_end_is_told(make_video, moving):
    path = make_video("x.mp4", moving(10))
    with pytest.raises(ValueError, match="of 20 frames are left"):
        read(path, start=0.0, count=20, rate=10)
