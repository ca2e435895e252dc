"""Tools that change a checkpoint write all of the new one, or nothing."""

import shutil
import sys

import pytest

from sora_jax.convert import rewrite
from sora_jax.train.export import export
from sora_jax.train.verify import verify
from tests.conftest import stopped_at_every_second

TOOLS = {
    "average_weights": ("--checkpoints",),
    "halve_patches": ("--checkpoint",),
    "widen": ("--mlp", "64", "--checkpoint"),
}


@pytest.fixture(params=TOOLS)
def change(request, load_tool, monkeypatch):
    """change(checkpoint, out): the exit status of a tool."""
    tool = load_tool(request.param)

    def run(checkpoint, out):
        arguments = [request.param, *TOOLS[request.param], str(checkpoint), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            tool.main()
        except SystemExit as error:
            return error.code
        return 0

    return run


def held(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_tool_that_is_stopped_leaves_what_was_there(
    change, pipeline_folder, tmp_path, monkeypatch
):
    out, new = export(pipeline_folder, tmp_path / "out", max_shard_size=3000), tmp_path / "new"
    before, write = held(out), rewrite.write_shards
    monkeypatch.setattr(rewrite, "write_shards", stopped_at_every_second(write))
    for target in (out, new):
        with pytest.raises(KeyboardInterrupt):
            change(pipeline_folder, target)
    assert held(out) == before and not new.exists()
    monkeypatch.setattr(rewrite, "write_shards", write)
    for target in (out, new):
        assert change(pipeline_folder, target) == 0
    assert not verify(out, new)[1] and not list(out.rglob("*-of-*"))
    assert (new / "model_index.json").is_file()


def test_a_tool_refuses_to_replace_what_it_reads_or_to_mix_models(
    change, pipeline_folder, tmp_path, capsys
):
    source = shutil.copytree(pipeline_folder, tmp_path / "source")
    experts = shutil.copytree(pipeline_folder, tmp_path / "experts")
    shutil.copytree(experts / "transformer", experts / "transformer_2")
    for out, words in ((source, "which is read here and would be"), (experts, "would be mixed")):
        before = held(out)
        assert change(source, out) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1
        assert held(out) == before


def test_training_by_the_clock_refuses_its_folder_before_it_begins(
    load_tool, pipeline_folder, tmp_path, monkeypatch, capsys
):
    tool = load_tool("train_by_clock")
    monkeypatch.setattr(tool, "start_drawing", lambda *_: ([], None))
    source = shutil.copytree(pipeline_folder, tmp_path / "source")
    arguments = ["--init", str(source), "--out", str(source), "--clips", "1", "--images", "1"]
    monkeypatch.setattr(sys, "argv", ["train_by_clock", *arguments, "--workers", "1"])
    monkeypatch.setattr(tool.time, "sleep", lambda _: pytest.fail("it waits for clips"))
    with pytest.raises(SystemExit) as end:
        tool.main()
    told = capsys.readouterr().err
    assert end.value.code == 2 and "which is read here" in told and told.count("\n") == 1
