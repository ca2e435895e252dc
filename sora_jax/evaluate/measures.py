"""What is measured of a task, case by case, and what the cases together say: values with intervals.

A measure of kind "rate" is a yes or no of each case, and its value the share of yes; "median" and
"least" are of numbers. None means that a case says nothing of it.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sora_jax.evaluate.intervals import median_interval, wilson

# By the names of the measures.
Outcome = dict[str, bool | float | None]


@dataclasses.dataclass(frozen=True)
class Measure:
    """One thing that is measured, and what is asked of it.

    Attributes:
      target: least value, or with `at_most` the greatest; None where nothing is asked.
    """

    name: str
    kind: Literal["rate", "median", "least"] = "rate"
    target: float | None = None
    at_most: bool = False
    unit: str = ""

    def meets(self, value: bool | float | None) -> bool:
        """Whether `value`, of all cases or of one, is what is asked; of one, a rate asks for yes.

        What says nothing, and what nothing is asked of, is as it should be.
        """
        if value is None or self.target is None:
            return True
        return value <= self.target if self.at_most else value >= self.target

    def failed(self, value: bool | float | None) -> str:
        """What a case did wrong in the words of a caption, or nothing."""
        if self.kind == "rate":
            return self.name if value is False else ""
        return "" if self.meets(value) else f"{self.name} {value:.3g}"


def summarise(measure: Measure, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """{"kind", "cases", "value", "interval"} of one measure; both last are None without a case.

    The least of numbers has no interval, nor has the median of fewer than six.
    """
    values = [v for outcome in outcomes if (v := outcome[measure.name]) is not None]
    result = {"kind": measure.kind, "cases": len(values), "value": None, "interval": None}
    if not values:
        return result
    if measure.kind == "rate":
        right = sum(map(bool, values))
        return result | {
            "right": right,
            "value": right / len(values),
            "interval": list(wilson(right, len(values))),
        }
    if measure.kind == "least":
        return result | {"value": float(min(values))}
    interval = median_interval(values)
    return result | {
        "value": float(statistics.median(values)),
        "interval": None if interval is None else list(interval),
    }


def verdict(tasks: Mapping[str, dict[str, Any]], measures: Mapping[str, Sequence[Measure]]):
    """{"targets": {"task/measure": {"value", "target", "at_most", "passed"}}, "passed": all}.

    A measure with a target that no case said anything of is not passed.
    """
    targets = {}
    for task, section in tasks.items():
        for measure in measures[task]:
            if measure.target is None:
                continue
            value = section["measures"][measure.name]["value"]
            targets[f"{task}/{measure.name}"] = {
                "value": value,
                "target": measure.target,
                "at_most": measure.at_most,
                "passed": value is not None and measure.meets(value),
            }
    return {"targets": targets, "passed": all(row["passed"] for row in targets.values())}
