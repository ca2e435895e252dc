from fractions import Fraction

import numpy as np
import pytest

from sora_jax.data.build import filters
from sora_jax.data.build.cut import Span
from sora_jax.data.build.filters import Crop, clip_stats, first_reason, letterbox
from sora_jax.data.build.scan import Flow, Scan
from sora_jax.data.build.settings import (
    BuildSettings,
    FreezeSettings,
    LetterboxSettings,
    MotionSettings,
    ScoreSettings,
)


def make_scan(count=50, *, bars=(0, 0, 0, 0), speed=5.0, size=(100, 160), **numbers):
    arrays = {"luma": 120.0, "contrast": 50.0, "sharpness": 300.0, "difference": 2.0} | numbers
    arrays = {k: np.broadcast_to(np.float32(v), count).copy() for k, v in arrays.items()}
    first = np.arange(0, count - 3, 3)
    return Scan(
        times=np.arange(count + 1) / 25,
        rate=Fraction(25),
        cuts=[],
        bars=np.broadcast_to(np.int16(bars), (count, 4)).copy(),
        hashes=[0] * count,
        flow=Flow(first, first + 3, np.full(len(first), speed, np.float32)),
        size=size,
        damage=None,
        whole=True,
        **arrays,
    )


def stats_of(scan, first=0, last=None, *, is_image=False, still=0.02):
    last = len(scan.luma) if last is None else last
    span = Span(first, last, 0, len(scan.luma))
    return clip_stats(scan, span, num_frames=last - first, is_image=is_image, still=still)


@pytest.mark.parametrize(
    "numbers, stage, reason",
    [
        ({"count": 10}, "length", "too short (0.4 of 1 s)"),
        ({"luma": 3.0}, "brightness", "too dark (mean luma 3, at least 12)"),
        ({"luma": 250.5}, "brightness", "too bright (mean luma 250.5, at most 245)"),
        ({"contrast": 1.5}, "brightness", "too flat (contrast 1.5, at least 4)"),
        ({"difference": 0.0}, "freeze", "frozen (for 1.96 s, at most 0.6 s)"),
        ({"speed": 0.01}, "motion", "too little motion (0.01 of 0.3 %/s)"),
        ({"speed": 500.0}, "motion", "too much motion (500 %/s, at most 200)"),
        ({"sharpness": 2.0}, "blur", "blurred (sharpness 2, at least 10)"),
    ],
)
def test_each_filter_drops_what_it_is_for_and_says_by_how_much(numbers, stage, reason):
    stats = stats_of(make_scan(**numbers))
    assert first_reason(stats, BuildSettings()) == {"stage": stage, "reason": reason}
    assert first_reason(stats, BuildSettings(**{stage: None})) is None


def test_an_ordinary_clip_stays():
    assert first_reason(stats_of(make_scan()), BuildSettings()) is None


def test_filters_are_asked_in_the_order_of_the_stages():
    stats = stats_of(make_scan(10, luma=0.0, sharpness=0.0))
    assert first_reason(stats, BuildSettings())["stage"] == "length"
    assert first_reason(stats, BuildSettings(length=None))["stage"] == "brightness"


def test_an_image_is_neither_short_nor_frozen():
    stats = stats_of(make_scan(1, difference=255.0), is_image=True)
    assert first_reason(stats, BuildSettings()) is None
    assert set(stats.scores) == {"luma", "contrast", "sharpness"}


def test_a_freeze_counts_from_the_frame_that_stays():
    difference = np.full(50, 2.0)
    difference[11:31] = 0  # frame 10 stays for 20 frames more
    stats = stats_of(make_scan(difference=difference))
    assert stats.frozen == pytest.approx(0.8, abs=1e-6)
    assert filters.frozen(stats, FreezeSettings(max_seconds=0.8)) is None
    assert stats_of(make_scan(difference=difference), 28).frozen == pytest.approx(0.08, abs=1e-6)


def test_one_frame_held_for_long_is_frozen():
    scan = make_scan(50)
    scan.times[25:] += 3.0
    assert stats_of(scan).frozen == pytest.approx(3.0, abs=1e-6)
    alone = stats_of(scan, 24, 25)
    assert alone.frozen == pytest.approx(3.0, abs=1e-6)
    assert filters.frozen(alone, FreezeSettings()) == "frozen (for 3 s, at most 0.6 s)"


def test_motion_is_of_the_clip_alone():
    scan = make_scan(60)
    scan.flow.speed[scan.flow.first >= 30] = 50.0
    assert stats_of(scan, 0, 30).motion == pytest.approx(5.0)
    assert stats_of(scan, 30, 60).motion == pytest.approx(50.0)
    assert stats_of(scan, 1, 3).motion == pytest.approx(5.0)  # shorter than a pair is apart
    assert filters.bad_motion(stats_of(scan, 0, 1), MotionSettings()) is None  # unknown: stays


def test_bars_are_cut_with_the_row_that_they_end_in():
    span = Span(0, 50, 0, 50)
    crop = letterbox(make_scan(bars=(12, 12, 0, 0)), span, LetterboxSettings())
    assert crop == Crop(top=0.13, bottom=0.13)
    crop = letterbox(make_scan(bars=(0, 0, 20, 19)), span, LetterboxSettings())
    assert crop == Crop(left=21 / 160, right=20 / 160)
    assert letterbox(make_scan(bars=(12, 12, 0, 0)), span, None) == Crop()


def test_what_is_no_bar_stays():
    span = Span(0, 50, 0, 50)
    settings = LetterboxSettings()
    for bars in [(1, 1, 0, 0), (30, 0, 0, 0), (100, 100, 160, 160)]:
        assert letterbox(make_scan(bars=bars), span, settings) == Crop()
    one_sided = LetterboxSettings(symmetric=False)
    assert letterbox(make_scan(bars=(30, 0, 0, 0)), span, one_sided) == Crop(top=0.31)


def test_bars_are_those_of_the_whole_shot_and_no_other():
    scan = make_scan(bars=(12, 12, 0, 0))
    scan.bars[5] = (2, 2, 0, 0)  # a light frame reaches further: a dark scene, not a bar
    assert letterbox(scan, Span(20, 50, 0, 50), LetterboxSettings()) == Crop(top=0.03, bottom=0.03)
    assert letterbox(scan, Span(20, 50, 20, 50), LetterboxSettings()).top == 0.13


def test_scores_of_plug_ins_are_judged_by_their_limits():
    score = ScoreSettings(name="text", function="a:b", min=0.1, max=0.3)
    assert filters.bad_score(0.2, score) is None
    assert filters.bad_score(0.05, score) == "text too low (0.05, at least 0.1)"
    assert filters.bad_score(0.5, score) == "text too high (0.5, at most 0.3)"
    assert filters.bad_score(float("nan"), score) == "text is nan: a:b cannot tell"
    assert filters.bad_score(9.0, ScoreSettings(name="text", function="a:b")) is None
