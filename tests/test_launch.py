"""The launch scripts: several processes train as one does, and their end is the job's end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from configs import paperworld_vae
from sora_jax.train.loop import train

ROOT = Path(__file__).parents[1]
LOCAL = str(ROOT / "launch" / "local.sh")


def launch(*args, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [LOCAL, *map(str, args)],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=600,
    )


def losses(workdir: Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def test_two_processes_train_as_one_with_two_devices(tmp_path):
    command = [sys.executable, "-m", "sora_jax.cli", "train", "--distributed"]
    done = launch(
        *(2, *command, "--config", "configs/paperworld_vae.py:smoke"),
        *("--workdir", tmp_path / "two", "--config.num_steps=3", "--config.sample_every=0"),
        JAX_NUM_CPU_DEVICES="1",
        JAX_PLATFORMS="cpu",
    )
    assert done.returncode == 0, done.stderr
    config = paperworld_vae.get_config("smoke").unlock()
    config.num_steps, config.sample_every = 3, 0
    train(config, tmp_path / "one", devices=jax.devices()[:2])
    together = losses(tmp_path / "two")
    assert len(together) == 2
    np.testing.assert_allclose(together, losses(tmp_path / "one"), rtol=1e-5)


def test_a_failing_process_stops_the_others_and_gives_the_status():
    script = 'if [ "$JAX_PROCESS_ID" = 1 ]; then exit 7; else exec sleep 60; fi'
    begun = time.monotonic()
    done = launch(3, "bash", "-c", script)
    assert done.returncode == 7
    assert time.monotonic() - begun < 30


def test_every_process_is_told_its_number_and_the_same_coordinator():
    script = 'echo "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS"'
    done = launch(2, "bash", "-c", script)
    numbers, addresses = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert sorted(numbers) == ["0/2", "1/2"] and len(set(addresses)) == 1
    assert done.returncode == 0


def test_a_missing_number_of_processes_is_explained():
    for args in ((), ("0", "true"), ("two", "true"), ("2",)):
        done = launch(*args)
        assert done.returncode == 2 and "usage: launch/local.sh N COMMAND" in done.stderr
