"""Sampling over the devices of two processes: as one does with as many, and written once."""

import json
import sys

import jax
import numpy as np

from sora_jax import cli, sharding, video_io
from tests.test_launch import launch, simulated

# Two of everything in one job, since joining and compiling are nearly all of it.
PROGRAM = """
import os, sys
# Gloo prints from C, in pieces that lines of the other process fall between: what Python prints
# goes to where standard output was, and Gloo's descriptor nowhere.
sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
import jax, jax.numpy as jnp
from sora_jax import cli, sharding
sharding.join_processes()
sharding.join_processes = lambda: None
mesh = sharding.make_mesh(fsdp=4)
placed = sharding.place({"a": jnp.arange(8.0)}, {"a": sharding.named(mesh, "embed")})
assert placed["a"].addressable_shards[0].data.shape == (2,)
assert float(sharding.from_mesh(jax.jit(jnp.sum)(placed["a"]), mesh)) == 28
for line in sys.argv[1:]:
    assert cli.main(line.split("|")) == 0
"""


MESH = ("--mesh", "tensor=2,context=2")


def arguments(folder, out, *extra):
    given = ["sample", "--prompt", "a red ball rolls left", "--checkpoint", folder, "--out", out]
    return [str(x) for x in (*given, "--size", "32x32", *MESH, *extra)]


def storyboard(folder, out):
    """Arguments of a film of two shots, the second with the first's characters."""
    board = out.parent / "board.json"
    shots = [{"prompt": f"a red ball {verb}", "seconds": 0.625} for verb in ("rolls", "falls")]
    board.write_text(json.dumps({"size": "32x32", "shots": shots}))
    given = ("storyboard", board, "--checkpoint", folder, "--out", out, "--steps", "2")
    return [str(x) for x in (*given, "--kv-cache", "2", *MESH)]


def test_two_processes_sample_as_one_with_as_many_devices(pipeline_folder, tasks_folder, tmp_path):
    task = ("--seconds", "2", "--joint", "--window", "9", "--steps", "2")
    plain = ("--save-latents", tmp_path / "two.npy", "--preview", tmp_path / "preview.png")
    lines = [
        arguments(pipeline_folder, tmp_path / "two.png", *plain),
        arguments(pipeline_folder, tmp_path / "film.webp", *task),
        storyboard(tasks_folder, tmp_path / "shots.webp"),
    ]
    lines = ["|".join([*line, "--distributed"]) for line in lines]
    done = launch(2, sys.executable, "-c", PROGRAM, *lines, **simulated(2))
    assert done.returncode == 0, done.stderr
    written = [str(tmp_path / name) for name in ("two.png", "film.webp", "shots.webp")]
    assert done.stdout.splitlines() == written
    assert done.stderr.count("denoise ") == 1, "told by the first process alone"
    assert done.stderr.count("2 shots, 1.25 s") == 1
    alone = ("--save-latents", tmp_path / "one.npy")
    assert cli.main(arguments(pipeline_folder, tmp_path / "one.png", *alone)) == 0
    one, two = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two"))
    assert one.std() > 0.1
    np.testing.assert_allclose(two, one, atol=1e-5)
    metadata = json.loads((tmp_path / "two.json").read_text())
    assert metadata["mesh"] == "tensor=2,context=2"
    assert (tmp_path / "preview.png").is_file()
    assert cli.main(arguments(pipeline_folder, tmp_path / "alone.webp", *task)) == 0
    assert cli.main(storyboard(tasks_folder, tmp_path / "cut.webp")) == 0
    for two, one, count in (("film", "alone", 17), ("shots", "cut", 10)):
        films = [video_io.read_video(tmp_path / f"{name}.webp").frames for name in (two, one)]
        assert len(films[0]) == count
        assert np.abs(films[0].astype(int) - films[1]).max() <= 1


def test_a_mesh_of_one_process_leaves_arrays_alone():
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    x = {"a": jax.numpy.ones(3)}
    assert sharding.to_mesh(x, mesh) is x and sharding.from_mesh(x, None) is x
