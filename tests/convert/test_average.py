"""The mean of checkpoints, by the tool that makes it."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.convert import folder, rewrite

TOOL = Path(__file__).parents[2] / "tools" / "average_weights.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_mean_of_two_checkpoints_is_the_mean_of_their_tensors(pipeline_folder, tmp_path):
    other = tmp_path / "other"
    rewrite.write_diffusers(other, rewrite.parts_of(pipeline_folder), dtype="float32")
    config, _, params = folder.load_component(pipeline_folder, "dit")
    moved = jax.tree.map(lambda x: x + 1, params)
    folder.save_component(other, "dit", config, moved)
    made = run("--checkpoints", pipeline_folder, other, "--shares", 0.75, 0.25, "--out",
               tmp_path / "mean")  # fmt: skip
    assert made.returncode == 0, made.stderr
    found = folder.load_component(tmp_path / "mean", "dit")[2]
    for one, a in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, (a + 0.25).astype(jnp.bfloat16).astype(jnp.float32))
    assert folder.load_component(tmp_path / "mean", "vae")[0]


def test_shares_that_do_not_add_up_are_refused(pipeline_folder, tmp_path):
    made = run("--checkpoints", pipeline_folder, "--shares", 0.5, "--out", tmp_path / "mean")
    assert made.returncode == 2 and "add up to 1" in made.stderr
    assert made.stderr.count("\n") == 1 and not (tmp_path / "mean").exists()


@pytest.mark.parametrize("first", [0, 1])
def test_checkpoints_of_other_components_are_refused(
    load_tool, pipeline_folder, tmp_path, monkeypatch, capsys, first
):
    folders = [pipeline_folder, pipeline_folder / "vae"]
    checkpoints = [str(folders[first]), str(folders[1 - first])]
    arguments = ["average_weights", "--checkpoints", *checkpoints, "--out", str(tmp_path / "mean")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        load_tool("average_weights").main()
    told = capsys.readouterr().err
    assert end.value.code == 2 and "other components" in told and told.count("\n") == 1
    assert not (tmp_path / "mean").exists()
