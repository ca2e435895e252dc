"""Each pod config's small twin trains by the command, on what it needs no files for."""

import json
import math
from pathlib import Path

import pytest

from sora_jax import cli

CONFIGS = Path(__file__).parents[2] / "configs"
TWINS = ("wan", "t2v_1_3b", "t2v_5b", "t2v_14b", "staged", "sora_minute")


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_trains_and_leaves_a_checkpoint(name, tmp_path):
    command = ["train", "--config", f"{CONFIGS / name}.py:smoke", "--workdir", str(tmp_path)]
    # Previews are tests/train's; half of the steps will do.
    command += ["--config.num_steps=2", "--config.sample_every=0", "--config.checkpoint_every=2"]
    assert cli.main(command) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Of velocities of variance 2 nothing is known yet.
    assert row["step"] == 2 and 1 < row["train/loss"] < 3
    assert row["grad_norm/dit/proj_out"] > 0 and math.isfinite(row["param_norm/dit/blocks"])
    assert (tmp_path / "checkpoints" / "2").is_dir()
