from fractions import Fraction

import numpy as np
import pytest

from sora_jax.data.build.cut import chosen_spans, cut_shots, frame_count, output_rate
from sora_jax.data.build.settings import CutSettings, LengthSettings


def times(count, fps=25.0):
    return np.arange(count + 1) / fps


def cut(at, cuts=(), *, longest=2.0, shortest=1.0, margin=0.0):
    settings = CutSettings(max_seconds=longest, margin_seconds=margin)
    spans = cut_shots(at, cuts, cut=settings, length=LengthSettings(min_seconds=shortest))
    return [(s.first, s.last) for s in spans]


def test_a_shot_that_fits_is_one_clip_and_a_longer_one_is_cut_into_equal_parts():
    assert cut(times(50)) == [(0, 50)]
    assert cut(times(100)) == [(0, 50), (50, 100)]
    assert cut(times(150), longest=2.5) == [(0, 50), (50, 100), (100, 150)]


def test_parts_that_would_be_too_short_become_parts_of_full_length_and_a_rest():
    assert cut(times(60), shortest=1.5) == [(0, 50), (50, 60)]


@pytest.mark.parametrize("seed", range(20))
def test_clips_tile_the_shots_without_crossing_a_cut_or_growing_too_long(seed):
    rng = np.random.default_rng(seed)
    at = np.concatenate([[0.0], np.cumsum(rng.uniform(0.01, 0.1, 400))])
    cuts = sorted(rng.choice(np.arange(1, 400), 5, replace=False).tolist())
    longest = float(rng.uniform(0.5, 4))
    spans = cut(at, cuts, longest=longest, shortest=longest * float(rng.uniform(0, 1)))
    assert [a for a, _ in spans] == [0, *[b for _, b in spans][:-1]]
    assert spans[-1][1] == 400
    for first, last in spans:
        assert not any(first < c < last for c in cuts)
        assert at[last] - at[first] <= longest + 1e-3 or last - first == 1


def test_margins_are_left_out_at_both_ends_of_a_shot():
    assert cut(times(100), [50], margin=0.2) == [(5, 45), (55, 95)]
    assert cut(times(4), margin=1.0) == [(2, 3)]  # nothing is left: the length filter names it


def test_without_cutting_a_shot_is_a_clip():
    spans = cut_shots(times(1000), [300], cut=None, length=None)
    assert [(s.first, s.last) for s in spans] == [(0, 300), (300, 1000)]


def test_chosen_clips_are_spread_evenly():
    assert chosen_spans(10, 0) == set(range(10))
    assert chosen_spans(10, 12) == set(range(10))
    assert chosen_spans(10, 2) == {2, 7}
    assert len(chosen_spans(1000, 7)) == 7


def test_rates_are_lowered_but_never_raised():
    assert output_rate(Fraction(30000, 1001), 0) == Fraction(30000, 1001)
    assert output_rate(Fraction(30), 24) == 24
    assert output_rate(Fraction(12), 24) == 12


def test_frames_counted_forgive_time_stamps_in_milliseconds():
    rate = Fraction(30000, 1001)
    assert all(frame_count(round(n * 1001 / 30000, 3), rate) == n for n in range(1, 500))
    assert frame_count(0.0, rate) == 1
