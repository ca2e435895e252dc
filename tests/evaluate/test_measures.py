"""What cases say together: rates, medians and the least, and whether that is what is asked."""

import pytest

from sora_jax.evaluate.intervals import wilson
from sora_jax.evaluate.measures import Measure, summarise, verdict

RATE = Measure("right", target=0.75)
RATIO = Measure("seam", "median", 1.2, at_most=True)
LEAST = Measure("kept", "least", 35.0)


def outcomes(name, *values):
    return [{name: value, "another": False} for value in values]


def test_a_rate_is_the_share_of_yes_among_the_cases_that_say_something():
    summary = summarise(RATE, outcomes("right", True, None, True, False, True))
    assert summary == {
        "kind": "rate",
        "cases": 4,
        "right": 3,
        "value": 0.75,
        "interval": list(wilson(3, 4)),
    }


def test_numbers_have_a_median_or_the_least():
    values = (1.0, None, 9.0, 1.1)
    summary = summarise(RATIO, outcomes("seam", *values))
    assert (summary["cases"], summary["value"], summary["interval"]) == (3, 1.1, None)
    summary = summarise(RATIO, outcomes("seam", *values, 1.05, 1.2, 1.3))
    assert (summary["cases"], summary["interval"]) == (6, [1.0, 9.0])
    summary = summarise(LEAST, outcomes("kept", *values))
    assert (summary["cases"], summary["value"], summary["interval"]) == (3, 1.0, None)


def test_measures_that_no_case_says_anything_of_have_no_value_and_do_not_pass():
    summary = summarise(RATE, outcomes("right", None, None))
    assert (summary["cases"], summary["value"], summary["interval"]) == (0, None, None)
    tasks = {"animate": {"measures": {"right": summary}}}
    result = verdict(tasks, {"animate": [RATE, Measure("unasked")]})
    assert list(result["targets"]) == ["animate/right"] and not result["passed"]


@pytest.mark.parametrize(
    ("measure", "value", "passed"),
    [(RATE, 0.75, True), (RATE, 0.74, False), (RATIO, 1.2, True), (RATIO, 1.21, False)],
)
def test_targets_are_bounds_from_below_or_above(measure, value, passed):
    result = verdict({"x": {"measures": {measure.name: {"value": value}}}}, {"x": [measure]})
    row = result["targets"][f"x/{measure.name}"]
    assert (row["passed"], row["at_most"], result["passed"]) == (passed, measure.at_most, passed)


def test_a_case_says_what_it_did_wrong():
    assert RATE.failed(False) == "right" and RATE.failed(True) == RATE.failed(None) == ""
    assert RATIO.failed(1.84) == "seam 1.84" and RATIO.failed(1.1) == RATIO.failed(None) == ""
    assert LEAST.failed(34.0) == "kept 34" and Measure("free", "median").failed(0.0) == ""
