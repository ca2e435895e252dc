"""Metrics to JSONL always, to TensorBoard where its writer is installed, to W&B where asked.

Rates, MFU and the picture of the loss.
"""

import contextlib
import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax import chips, video_io


def peak_flops(device: jax.Device) -> float | None:
    """Peak dense bfloat16 FLOP/s of `device`, or None where no data sheet is known (CPUs)."""
    chip = chips.of_kind(device.device_kind)
    return None if chip is None else chip.device_flops


class MetricWriter:
    """Appends one JSON object a line to `workdir/metrics.jsonl`; process 0 alone writes.

    Args:
      wandb_project: of Weights & Biases (WANDB_MODE=offline works); "" sends nothing there.
      run_id: under which a resumed run goes on there.
      config: shown there.

    Raises:
      ValueError: a project is named, and `wandb` is not installed.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        wandb_project: str = "",
        run_id: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        self._active = jax.process_index() == 0
        self._path = Path(workdir) / "metrics.jsonl"
        self._board = self._wandb = None
        if wandb_project and not importlib.util.find_spec("wandb"):
            raise ValueError(
                f"config.wandb_project {wandb_project!r}: wandb is not installed; `pip install "
                "'sora_jax[wandb]'`, or set it to ''."
            )
        if self._active:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _end_line(self._path)
            _end_line(self._path.with_name("hosts.jsonl"))
            if importlib.util.find_spec("tensorboardX"):
                from tensorboardX import SummaryWriter

                self._board = SummaryWriter(str(workdir))
            if wandb_project:
                import wandb

                self._wandb = wandb.init(
                    project=wandb_project,
                    id=run_id,
                    resume="allow",
                    dir=str(workdir),
                    config=config,
                )

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._active:
            return
        known = {name: float(v) for name, v in values.items() if not math.isnan(v)}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | known) + "\n")
        if self._board is not None:
            for name, value in known.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(known, step=step)

    def write_hosts(self, step: int, values: dict[str, list[float | None]]) -> None:
        """Appends to hosts.jsonl, beside metrics.jsonl, a list of one value a process each."""
        if self._active:
            with self._path.with_name("hosts.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()


class Rates:
    """Steps, rows and tokens a second, and model FLOP/s utilisation, between two calls."""

    def __init__(self):
        self._time, self._step = time.perf_counter(), None

    def update(
        self, step: int, *, rows: int, tokens: int | None = None, flops: float | None = None
    ) -> dict[str, float]:
        """Rates since the last call; empty at the first one.

        Args:
          rows: of the batch, over all processes: clips, or packed rows of several.
          tokens: video tokens of one step, or None where there are none.
          flops: of one step, or None.
        """
        now = time.perf_counter()
        elapsed, steps = now - self._time, step - (step if self._step is None else self._step)
        self._time, self._step = now, step
        if steps == 0:
            return {}
        rates = {
            "perf/steps_per_second": steps / elapsed,
            "perf/rows_per_second": rows * steps / elapsed,
        }
        if tokens is not None:
            rates["perf/tokens_per_second"] = tokens * steps / elapsed
            chip = chips.of_kind(jax.devices()[0].device_kind)
            count = jax.device_count() / (1 if chip is None else chip.devices)
            rates["perf/tokens_per_second_per_chip"] = tokens * steps / elapsed / count
        if flops is not None:
            rates["perf/tflops_per_second"] = flops * steps / elapsed / 1e12
            peak = peak_flops(jax.devices()[0])
            if peak is not None:
                rates["perf/mfu"] = flops * steps / elapsed / (peak * jax.device_count())
        return rates


def _end_line(path: Path) -> None:
    """Ends a last line that was cut off, so that the next row does not go on in it."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of a metrics.jsonl as (k, 2) arrays of step and value, steps ascending.

    A run that died after its last checkpoint wrote steps that the next run repeated: the later
    rows count. A line that was cut off, as a full disk or a killed host leaves it, is left out.
    """
    rows: dict[int, dict[str, float]] = {}
    for line in Path(path).read_text().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if line.endswith("\n") and isinstance(row, dict):
                rows[row.pop("step")] = row
    columns: dict[str, list[tuple[int, float]]] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            columns.setdefault(name, []).append((step, value))
    return {name: np.array(pairs) for name, pairs in columns.items()}


def plot_losses(metrics: Path, out: Path) -> None:
    """Draws train/loss (smoothed) and, where logged, the loss by bucket of t to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.add_subplot()
    names = [n for n in columns if n == "train/loss" or n.startswith("loss_by_t/")]
    for name in names:
        step, value = columns[name].T
        window = max(1, len(value) // 50)
        kernel = np.ones(window) / window
        smooth = np.convolve(value, kernel, mode="valid")
        label = "mean" if name == "train/loss" else f"t from {name.split('/')[1]}"
        axes.plot(step[window - 1 :], smooth, label=label, lw=2 if name == "train/loss" else 1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if names:
        axes.legend(frameon=False)
    figure.tight_layout()
    FigureCanvasAgg(figure).draw()
    image = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    video_io.save_image(out, np.ascontiguousarray(image))
