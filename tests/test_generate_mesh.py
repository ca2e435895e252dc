"""Sampling over several devices, and pipelines whose weights are not read yet."""

import json

import jax
import numpy as np
import pytest

import sora_jax
from sora_jax import cli, compile_options, sharding
from sora_jax.dit import heads
from sora_jax.generate.mesh import sampling_mesh


@pytest.mark.parametrize("sizes", ["fsdp=2,tensor=2,context=2", "data=2,context=2", "context=8"])
def test_a_mesh_makes_the_same_video(pipeline_folder, sizes):
    plain, shared = (sora_jax.load(pipeline_folder, mesh=mesh) for mesh in ("none", sizes))
    settings = {"size": (32, 32), "frames": 5, "seed": 3, "guidance_blocks": (1,)}
    expected = plain("a red ball", **settings)
    got = shared("a red ball", **settings)
    # Other sums round differently: at most one level of 255.
    assert np.abs(got.frames.astype(int) - expected.frames).max() <= 1
    assert got.metadata["mesh"] == sizes and "mesh" not in expected.metadata
    kernel = shared.dit.params["blocks"]["self_attention"]["q"]["kernel"][...]
    assert len(kernel.sharding.device_set) == shared.mesh.size
    assert not kernel.sharding.is_fully_replicated
    # 12 tokens are filled up, for eight devices to share them.
    with sharding.use_mesh(shared.mesh):
        spare = heads.spare_tokens(shared.dit.config, 12)
    assert spare == (4 if sizes == "context=8" else 0)


@pytest.mark.parametrize(
    "wanted, backend, shape",
    [
        ("none", "tpu", None),
        ("auto", "cpu", None),
        ("auto", "tpu", {"data": 2, "fsdp": 1, "tensor": 1, "context": 4}),
        ("context=2", "cpu", {"data": 1, "fsdp": 1, "tensor": 1, "context": 2}),
        ("tensor=1", "cpu", None),
    ],
)
def test_sampling_mesh(monkeypatch, wanted, backend, shape):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    mesh = sampling_mesh(wanted, heads=12)
    assert (mesh and dict(mesh.shape)) == shape


@pytest.mark.parametrize(
    "wanted, words",
    [
        ("tensor", "write auto, none, or sizes"),
        ("tensor=0", "write auto, none, or sizes"),
        ("heads=2", "write auto, none, or sizes"),
        ("fsdp=2,fsdp=2", "write auto, none, or sizes"),
        ("fsdp=4,context=4", "takes 16 devices, there are 8"),
        ("tensor=8", "12 heads do not divide over tensor=8; use 4 or 6"),
    ],
)
def test_meshes_that_cannot_be(wanted, words):
    with pytest.raises(ValueError, match=words):
        sampling_mesh(wanted, heads=12)


def test_a_mesh_of_several_processes_takes_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="takes 4 of the 8 devices of 2 processes; use all"):
        sampling_mesh("context=4", heads=12)
    assert sampling_mesh("context=8", heads=12).size == 8
    assert sampling_mesh("none", heads=12) is None


def test_again_takes_the_mesh_that_made_the_video(pipeline_folder, tmp_path, capsys):
    made, again = tmp_path / "a.png", tmp_path / "b.png"
    base = ["sample", "--checkpoint", str(pipeline_folder)]
    prompt = [*base, "--prompt", "a ball", "--mesh", "context=2", "--size", "32x32"]
    assert cli.main([*prompt, "--out", str(made)]) == 0
    assert json.loads(made.with_suffix(".json").read_text())["mesh"] == "context=2"
    repeat = [*base, "--again", str(made.with_suffix(".json")), "--out", str(again)]
    assert cli.main(repeat) == 0
    assert again.read_bytes() == made.read_bytes()
    assert cli.main([*repeat, "--mesh", "none"]) == 2
    assert "leave out --mesh" in capsys.readouterr().err


def test_programs_on_a_mesh_are_compiled_with_the_options_of_its_chips(
    pipeline_folder, monkeypatch
):
    monkeypatch.setattr(compile_options, "of_mesh", lambda mesh: {"no_such_option": mesh.size})
    prompt = [sora_jax.load(pipeline_folder).request("a ball", steps=1)]
    sora_jax.load(pipeline_folder).run(prompt)  # on one device, which has no collectives
    with pytest.raises(Exception, match="no_such_option"):
        sora_jax.load(pipeline_folder, mesh="context=2").run(prompt)


def test_weights_are_read_when_they_are_needed(pipeline_folder, monkeypatch):
    read = []
    monkeypatch.setattr(
        "sora_jax.convert.weights.Weights.read", lambda self, key: read.append(key) or 1 / 0
    )
    pipe = sora_jax.load(pipeline_folder, weights=False)
    assert pipe.num_tokens(pipe.request("a ball")) == 12
    assert not read
    with pytest.raises(ZeroDivisionError):
        pipe.load_weights()


def test_mistakes_are_told_before_weights_are_read(pipeline_folder, tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise AssertionError("read the weights")

    monkeypatch.setattr("sora_jax.generate.Pipeline.load_weights", refuse)
    picture = tmp_path / "given.png"
    from sora_jax import video_io

    video_io.save_image(picture, np.zeros((16, 16, 3), np.uint8))
    base = ["sample", "--checkpoint", str(pipeline_folder), "--out", str(tmp_path / "a.png")]
    for arguments in (["--image", str(picture)], ["--size", "17x16"], ["--mesh", "heads=2"]):
        assert cli.main([*base, "--prompt", "a ball", *arguments]) == 2
    assert "read the weights" not in capsys.readouterr().err


def test_info_counts_without_reading(pipeline_folder, monkeypatch, capsys):
    monkeypatch.setattr("sora_jax.convert.weights.Weights.read", lambda self, key: 1 / 0)
    assert cli.main(["info", "--checkpoint", str(pipeline_folder)]) == 0
    assert "dit.blocks" in capsys.readouterr().out
