"""How far a measured rate can be trusted."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

_FEWEST = 6  # values between whose ends a median lies 19 times of 20: 1 - 2 / 2**6
Z_95 = statistics.NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """Both ends belong to it; within [0, 1]."""

    low: float
    high: float


def wilson(right: int, total: int, *, z: float | int = Z_95) -> Interval:
    """Score interval of a binomial rate (Wilson 1927, J. Am. Stat. Assoc. 22:209; no correction).

    The rates p for which the observed right / total lies within z standard errors sqrt(p(1-p)/n)
    of p. Unlike the textbook interval around right / total it is no point at 0 and 1, where a
    good model ends up, and it never leaves [0, 1].

    Args:
      z: standard normal quantile; the default gives 95 %.

    Raises:
      ValueError: unless 0 <= right <= total and total >= 1.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} right of {total}; give 0 <= right <= total and total >= 1.")
    rate, spread = right / total, z * z / total
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (rate * (1 - rate) + spread / 4)) / (1 + spread)
    # Rounding may leave the ends a hair beside 0 and 1, where they belong exactly.
    low = 0.0 if right == 0 else max(0.0, centre - half)
    high = 1.0 if right == total else min(1.0, centre + half)
    return Interval(low, high)


def median_interval(values: Sequence[float | int]) -> tuple[float, float] | None:
    """95 % interval of a median: between the values at the ranks of Wilson's ends around half.

    None of fewer than six values, between any of which it lies less often.

    How many values lie below the true median is binomial with p = 1/2, whatever they are
    distributed like, so that their order alone decides. Ranks are rounded outwards.

    Raises:
      ValueError: no values.
    """
    if not values:
        raise ValueError("a median of nothing; give at least one value.")
    ordered, total = sorted(values), len(values)
    if total < _FEWEST:
        return None
    # Wilson's lower end at exactly half, which an odd number of values has no count for.
    low = 0.5 - Z_95 / 2 / math.sqrt(total + Z_95**2)
    rank = max(1, math.floor(low * total))
    return float(ordered[rank - 1]), float(ordered[total - rank])
