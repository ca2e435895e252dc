"""Steps whose update is left out: loss or gradient not finite, or a gradient far above the usual.

The compiled step leaves weights, moments and EMA as they are (step.py). Here is what it compares
with, how many such steps a run may have, and which records they showed.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

_WINDOW = 100  # gradient norms that the median is taken of
_FEWEST = 20  # norms below which there is no median to go by
_LAG = 2  # a step's limit goes by the norms of steps so far before it: those are at hand
_SHOWN = 32  # records named in a message


@dataclasses.dataclass(frozen=True)
class SkipConfig:
    """See configs/base.py.

    Raises:
      ValueError: a number below 0.
    """

    in_row: int = 0
    in_all: int = 100
    grad_norm: float = 0.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 0:
                raise ValueError(f"skip.{name} {value} must be 0 or more.")
        if 0 < self.grad_norm <= 1:
            raise ValueError(
                f"skip.grad_norm {self.grad_norm} would skip half of the steps; set it to 0 (off) "
                "or to several times the median, for example 10."
            )


class Skips:
    """Judges finished steps in their order.

    Args:
      file: where the first process writes skipped steps and their records, a line each.
    """

    def __init__(self, config: SkipConfig, *, file: Path | None = None):
        self._config, self._file = config, file
        self._norms: list[tuple[int, float]] = []
        self._in_row = self._in_all = 0

    def limit(self, step: int) -> float | None:
        """Gradient norm above which `step` is skipped; None where norms do not matter.

        A function of the steps up to `step` - 2, so that a resumed run finds the same.
        """
        if not self._config.grad_norm:
            return None
        norms = [norm for at, norm in self._norms if at <= step - _LAG][-_WINDOW:]
        if len(norms) < _FEWEST:
            return math.inf
        return self._config.grad_norm * statistics.median(norms)

    def judge(
        self, step: int, metrics: Mapping[str, Any], *, records: Callable[[], list[int]]
    ) -> None:
        """Counts `step`, whose loss, gradient norm and "train/skipped" are in `metrics`.

        Args:
          records: the records that the step's batch showed.

        Raises:
          FloatingPointError: it is skipped, and more are in a row or in all than may be.
        """
        loss, norm = (float(metrics[f"train/{name}"]) for name in ("loss", "grad_norm"))
        if not float(metrics["train/skipped"]):
            self._in_row = 0
            if self._config.grad_norm:
                self._norms = [*self._norms, (step, norm)][-_WINDOW - _LAG :]
            return
        self._in_row, self._in_all = self._in_row + 1, self._in_all + 1
        # The loss first: a gradient that is not finite follows from it more often than not.
        name, value = ("loss", loss) if not math.isfinite(loss) else ("grad_norm", norm)
        what = f"train/{name} is {value:.6g} at step {step}"
        if math.isfinite(value):
            what += f", above {self._config.grad_norm:g} times its median"
        shown = records()
        if self._file is not None and jax.process_index() == 0:
            row = {"step": step, "metric": f"train/{name}", "value": str(value), "records": shown}
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        more = ", ..." if len(shown) > _SHOWN else ""
        batch = f"its batch is records {', '.join(map(str, shown[:_SHOWN]))}{more}"
        if self._in_row <= self._config.in_row and self._in_all <= self._config.in_all:
            logging.warning("%s: skipped; %s.", what, batch)
            return
        count = ""
        if self._in_all > 1:
            count = f" ({self._in_row} skipped in a row, {self._in_all} in all)"
        raise FloatingPointError(
            f"{what}{count}; lower config.optim.peak_lr or allow more in config.skip, and run "
            f"again, which goes on from the last checkpoint; {batch}."
        )

    def get_state(self) -> dict[str, Any]:
        """The counts and norms, as JSON."""
        return {"in_row": self._in_row, "in_all": self._in_all, "norms": self._norms}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `get_state` gave."""
        self._in_row, self._in_all = state["in_row"], state["in_all"]
        self._norms = [(int(step), float(norm)) for step, norm in state["norms"]]
