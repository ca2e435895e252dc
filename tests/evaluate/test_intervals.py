"""Wilson's interval against published values and its own definition."""

import math
import random

import pytest

from sora_jax.evaluate.intervals import Z_95, median_interval, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_equals_published_values(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "total"), [(3, 10), (243, 256), (255, 256)])
def test_ends_lie_exactly_z_standard_errors_from_the_observed_rate(right, total):
    for p in wilson(right, total):
        assert abs(right / total - p) == pytest.approx(Z_95 * math.sqrt(p * (1 - p) / total))


def test_right_and_wrong_mirror_each_other_and_stay_within_the_unit_interval():
    for right in range(8):
        low, high = wilson(right, 7)
        assert 0 <= low < high <= 1
        assert wilson(7 - right, 7) == pytest.approx((1 - high, 1 - low))
    assert wilson(7, 7).high == 1 and wilson(0, 7).low == 0


@pytest.mark.parametrize(("right", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts_are_refused_in_one_line(right, total):
    with pytest.raises(ValueError, match="0 <= right <= total") as error:
        wilson(right, total)
    assert "\n" not in str(error.value)


def test_interval_of_a_median_is_of_values_around_it_whatever_their_distances():
    # Of 100 tosses of a coin 40 to 60 are heads 96 times of 100, 41 to 59 only 94 times.
    assert median_interval(range(1, 101)) == (40, 61)
    assert median_interval([x**3 for x in range(1, 101)]) == (40**3, 61**3)
    assert median_interval([5, 1, 3, 9, 7, 4]) == (1, 9)
    with pytest.raises(ValueError, match="median of nothing"):
        median_interval([])


@pytest.mark.parametrize("count", range(1, 21))
def test_interval_of_a_median_is_given_where_it_is_one_of_95_percent(count):
    found = median_interval(range(1, count + 1))
    # It misses where fewer values than its lower rank, or than its upper one, lie below the median.
    widest = 1 - 2 / 2**count
    if found is None:
        assert widest < 0.95
        return
    low, high = map(int, found)
    assert sum(math.comb(count, below) for below in range(low, high)) / 2**count >= 0.95


def test_interval_of_a_median_holds_it_nineteen_times_of_twenty():
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        low, high = median_interval([rng.expovariate(1) for _ in range(64)])
        held += low <= math.log(2) <= high
    assert 0.95 < held / 2000 < 0.98
