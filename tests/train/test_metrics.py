"""Metrics on disk, rates, and the picture of the loss."""

import importlib.util
import json
import math
import sys
import types
from typing import ClassVar
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from sora_jax.train import metrics, window


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `Rates` sees."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def test_written_metrics_are_read_back_by_name(tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 0.5, "loss_by_t/0.00": math.nan})
        writer.write(3, {"train/loss": 0.25, "loss_by_t/0.00": 2.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 1, "train/loss": 0.5}, "NaN is no JSON: it is left out"
    columns = metrics.read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(columns["train/loss"], [[1, 0.5], [3, 0.25]])
    np.testing.assert_array_equal(columns["loss_by_t/0.00"], [[3, 2.0]])


def test_steps_repeated_after_a_crash_count_once_and_a_cut_line_not_at_all(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5)]
    file.write_text("".join(json.dumps({"step": s, "x": x}) + "\n" for s, x in lines) + '{"st')
    np.testing.assert_array_equal(metrics.read_metrics(file)["x"], [[1, 1], [2, 2.5], [3, 3]])


def test_a_run_goes_on_behind_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "tra')
    with metrics.MetricWriter(tmp_path) as writer:
        writer.write(2, {"x": 2.0})
    np.testing.assert_array_equal(metrics.read_metrics(file)["x"], [[1, 1], [2, 2]])
    # As earlier versions went on.
    file.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "tra{"step": 2, "x": 2.0}\n')
    np.testing.assert_array_equal(metrics.read_metrics(file)["x"], [[1, 1]])


def test_rates_are_those_since_the_last_call(clock):
    rates = metrics.Rates()
    clock[0] += 50  # compilation
    assert rates.update(11, rows=4, tokens=100, flops=2e12) == {}
    clock[0] += 2
    got = rates.update(21, rows=4, tokens=100, flops=2e12)
    assert got == {
        "perf/steps_per_second": 5.0,
        "perf/rows_per_second": 20.0,
        "perf/tokens_per_second": 500.0,
        "perf/tokens_per_second_per_chip": 62.5,  # of 8 simulated devices
        "perf/tflops_per_second": 10.0,
    }
    clock[0] += 1
    assert rates.update(22, rows=4) == {"perf/steps_per_second": 1, "perf/rows_per_second": 4}


def test_tokens_a_chip_are_of_chips_where_one_is_two_devices(clock, monkeypatch):
    devices = [mock.Mock(spec=jax.Device, device_kind="TPU7x")] * 8
    monkeypatch.setattr(metrics.jax, "devices", lambda: devices)
    rates = metrics.Rates()
    rates.update(0, rows=1, tokens=100)
    clock[0] += 2
    assert rates.update(1, rows=1, tokens=100)["perf/tokens_per_second_per_chip"] == 50 / 4


def test_every_hosts_values_are_lists_in_a_file_of_their_own(tmp_path):
    (tmp_path / "hosts.jsonl").write_text('{"step": 1, "st')
    with metrics.MetricWriter(tmp_path) as writer:
        writer.write_hosts(3, {"step_seconds": [1.0, 2.0], "data_wait_seconds": [0.5, None]})
    row = json.loads((tmp_path / "hosts.jsonl").read_text().splitlines()[-1])
    assert row == {"step": 3, "step_seconds": [1.0, 2.0], "data_wait_seconds": [0.5, None]}


def test_utilisation_is_a_share_of_the_data_sheet(clock, monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 5e12)
    rates = metrics.Rates()
    rates.update(0, rows=1, flops=1e12)
    clock[0] += 0.5
    got = rates.update(10, rows=1, flops=1e12)
    np.testing.assert_allclose(got["perf/mfu"], 20e12 / (5e12 * 8))  # 8 simulated devices


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("cpu", None),
    ],
)
def test_peak_is_that_of_the_longest_name_that_fits(kind, peak):
    device = mock.Mock(spec=jax.Device, device_kind=kind)
    assert metrics.peak_flops(device) == peak


def test_tensorboard_gets_the_same_values(tmp_path, monkeypatch):
    class SummaryWriter:
        """The part of tensorboardX's that is used; it is an optional dependency."""

        written: ClassVar[list] = []

        def __init__(self, logdir: str):
            self.written.append(("open", logdir))

        def add_scalar(self, tag: str, scalar_value: float, global_step: int):
            self.written.append((tag, scalar_value, global_step))

        def close(self):
            self.written.append("close")

    board = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: name)
    with metrics.MetricWriter(tmp_path) as writer:
        writer.write(7, {"train/loss": 0.5, "bucket": math.nan})
    assert SummaryWriter.written == [("open", str(tmp_path)), ("train/loss", 0.5, 7), "close"]


def test_weights_and_biases_gets_them_under_the_name_of_the_run(tmp_path, monkeypatch):
    seen = []
    run = types.SimpleNamespace(
        log=lambda values, step: seen.append((values, step)), finish=lambda: seen.append("finish")
    )
    fake = types.SimpleNamespace(init=lambda **options: seen.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        metrics.importlib.util, "find_spec", lambda name: True if name == "wandb" else found(name)
    )
    options = {"wandb_project": "videos", "run_id": "abc", "config": {"seed": 0}}
    with metrics.MetricWriter(tmp_path, **options) as writer:
        writer.write(7, {"train/loss": 0.5, "bucket": math.nan})
    opened, logged, closed = seen
    assert opened["project"] == "videos" and opened["id"] == "abc" and opened["config"]["seed"] == 0
    assert logged == ({"train/loss": 0.5}, 7) and closed == "finish"
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb_project 'videos': wandb is not installed; `pip"):
        metrics.MetricWriter(tmp_path, wandb_project="videos")


def test_without_tensorboard_only_jsonl_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with metrics.MetricWriter(tmp_path) as writer:
        writer.write(7, {"train/loss": 0.5})
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_plot_shows_every_loss(tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
        writer.write(0, {"perf/mfu": 0.4})
        metrics.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "empty.png")
        for step in range(1, 200):
            writer.write(step, {"train/loss": 1 / step, "loss_by_t/0.25": 2 / step})
    metrics.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    empty, full = (
        np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("empty.png", "loss.png")
    )
    assert full.shape == (540, 960, 3)
    blue, orange = ((31, 119, 180), (255, 127, 14))
    for colour in (blue, orange):
        assert (full == np.array(colour, np.uint8)).all(axis=-1).sum() > 200
        assert not (empty == np.array(colour, np.uint8)).all(axis=-1).any()


def test_averages_leave_out_what_a_step_does_not_have():
    rows = [
        (1, {"train/loss": 1.0, "bucket": math.nan, "never": math.nan}),
        (2, {"train/loss": 3.0, "bucket": 5.0, "never": math.nan}),
    ]
    got = window.average(rows)
    assert got["train/loss"] == 2.0 and got["bucket"] == 5.0 and math.isnan(got["never"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_average_of_a_metric_that_is_not_finite_names_it_and_its_step(value):
    rows = [(8, {"train/grad_norm": 1.0}), (9, {"train/grad_norm": value})]
    with pytest.raises(FloatingPointError, match=rf"train/grad_norm is {value} at step 9"):
        window.average(rows)
