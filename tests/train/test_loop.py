"""The loop: exact resume, interruption, and what it refuses."""

import json
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from sora_jax.checkpoint import Checkpointer
from sora_jax.data import sources
from sora_jax.train import export as exporting
from sora_jax.train import loop, startup
from sora_jax.train.export import export
from sora_jax.train.loop import begin, train
from sora_jax.train.vae_stage import VAEStage

STOP_AFTER = 2
ONE = jax.devices()[:1]  # what is no matter of the mesh compiles faster without one


def saved_state(workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(step, arrays by path) of the newest checkpoint, read without any model."""
    import orbax.checkpoint as ocp

    directory = workdir / "checkpoints"
    with Checkpointer(directory) as checkpointer:
        step = checkpointer.latest_step()
    return step, ocp.PyTreeCheckpointer().restore((directory / str(step) / "state").resolve())


def rows(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def interrupt_in_step(monkeypatch, step: int, number=signal.SIGINT):
    """Raises a signal while batch `step` of the next run is placed, and never again."""
    place, calls = loop.loaders.to_global, []

    def placed(*args):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(number)
        return place(*args)

    monkeypatch.setattr(loop.loaders, "to_global", placed)


@pytest.mark.parametrize(
    ("stage", "number"), [("dit", signal.SIGINT), ("vae", signal.SIGTERM)], ids=["dit", "vae"]
)
def test_two_steps_and_resume_and_two_equal_four_bitwise(
    stage, number, dit_config, vae_config, tmp_path, monkeypatch
):
    config = {"dit": dit_config, "vae": vae_config}[stage]
    devices = None if stage == "dit" else ONE
    config.num_steps, config.checkpoint_every, config.sample_every = 4, 4, 0
    begun = time.perf_counter()
    train(config, tmp_path / "straight", devices=devices)
    goodput_adds_up(tmp_path / "straight", time.perf_counter() - begun)

    with monkeypatch.context() as patch:
        interrupt_in_step(patch, STOP_AFTER, number)
        with pytest.raises(KeyboardInterrupt, match="at step 2; the checkpoint is saved") as end:
            train(config, tmp_path / "resumed", devices=devices)
    assert getattr(end.value, "exit_code", 130) == (130 if number == signal.SIGINT else 75)
    assert saved_state(tmp_path / "resumed")[0] == STOP_AFTER
    train(config, tmp_path / "resumed", devices=devices)

    assert_same_end(tmp_path / "straight", tmp_path / "resumed")
    # The losses tell that the data came in the same order, too: each step has other clips, and the
    # last row is the mean of steps 3 and 4 in both.
    ours, theirs = rows(tmp_path / "straight"), rows(tmp_path / "resumed")
    assert ours[0]["train/loss"] != ours[1]["train/loss"]
    assert ours[-1]["step"] == theirs[-1]["step"] == 4
    assert ours[-1]["train/loss"] == theirs[-1]["train/loss"]


def goodput_adds_up(workdir: Path, wall: float):
    told = json.loads((workdir / "goodput.json").read_text())
    assert sum(told["seconds"].values()) == pytest.approx(told["wall_seconds"], rel=1e-6)
    # A second for what lies before and after the clock, threads that end: beside other work it
    # takes .3 of these 20, and no more of a run of hours, whose 1 % is meant.
    assert told["wall_seconds"] == pytest.approx(wall, rel=0.01, abs=1.0)
    assert told["seconds"]["compile"] > told["seconds"]["save"] > 0 == told["seconds"]["lost"]
    assert told["step"] == 4 and told["goodput"] == told["seconds"]["step"] / told["wall_seconds"]


def assert_same_end(one: Path, other: Path):
    """The newest checkpoints are of step 4, and the same bit for bit."""
    (step, straight), (again, resumed) = saved_state(one), saved_state(other)
    assert step == again == 4 and set(straight) == set(resumed)
    for path, value in straight.items():
        np.testing.assert_array_equal(value, resumed[path], err_msg=path)


def test_a_crash_goes_on_from_the_local_copy_or_from_before_a_damage_and_tells_what_it_lost(
    dit_config, tmp_path, monkeypatch, capsys
):
    dit_config.num_steps, dit_config.profile.steps = 4, (2, 2)
    train(dit_config, tmp_path / "straight", devices=ONE)
    assert list((tmp_path / "straight" / "profile").rglob("*.xplane.pb"))
    dit_config.profile.steps = ()
    dit_config.local_checkpoint_dir, dit_config.local_checkpoint_every = str(tmp_path / "disk"), 1

    place, calls = loop.loaders.to_global, []

    def crashing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the host is gone")
        return place(*args)

    begun = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(loop.loaders, "to_global", crashing)
        with pytest.raises(RuntimeError, match="gone"):
            train(dit_config, tmp_path / "crashed", devices=ONE)
    assert saved_state(tmp_path / "crashed")[0] == 2
    capsys.readouterr()
    train(dit_config, tmp_path / "crashed", devices=ONE)
    assert "going on from step 3, of the hosts' own copies" in capsys.readouterr().err
    assert_same_end(tmp_path / "straight", tmp_path / "crashed")

    # Without copies, and with a damaged last step, it goes on from step 2.
    dit_config.local_checkpoint_dir, dit_config.log_every = "", 2
    file = tmp_path / "crashed" / "checkpoints" / "4" / "meta" / "metadata"
    file.write_bytes(file.read_bytes().replace(b"skips", b"skipz"))
    (tmp_path / "crashed" / "trace").touch()
    capsys.readouterr()
    train(dit_config, tmp_path / "crashed", devices=ONE)
    told = capsys.readouterr().err
    assert "going on with another config: log_every 1 -> 2, local_checkpoint_dir" in told
    assert (tmp_path / "crashed" / "checkpoints" / "damaged-4").is_dir()
    assert not (tmp_path / "crashed" / "trace").exists()
    assert list((tmp_path / "crashed" / "profile").rglob("*.xplane.pb"))
    assert_same_end(tmp_path / "straight", tmp_path / "crashed")
    goodput = json.loads((tmp_path / "crashed" / "goodput.json").read_text())
    assert goodput["runs"] == 3 and goodput["seconds"]["lost"] > 0
    assert goodput["seconds"]["restore"] > 0 and goodput["seconds"]["down"] > 0
    # A second for what lies before the first clock and after the last, as above; of two cores with
    # six other jobs it was 1.6 of 14.9.
    wall = time.time() - begun
    assert sum(goodput["seconds"].values()) == pytest.approx(wall, rel=0.01, abs=2.5)

    dit_config.seed = 1
    with pytest.raises(ValueError, match=r"crashed holds a run of another config: seed 0, not 1;"):
        train(dit_config, tmp_path / "crashed", devices=ONE)
    assert json.loads((tmp_path / "crashed" / "goodput.json").read_text())["runs"] == 3


def test_a_run_goes_on_on_another_mesh_as_it_would_have_on_its_own(dit_config, tmp_path):
    # Adam divides by the root of squares: where a gradient is all but zero, any rounding of it is
    # a whole step of this rate.
    dit_config.optim.peak_lr = 1e-6
    dit_config.mesh.fsdp = 4
    train(dit_config, tmp_path / "own", devices=jax.devices()[:4])
    shutil.copytree(tmp_path / "own", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "4")
    dit_config.mesh.update(data=2, fsdp=2)
    train(dit_config, tmp_path / "other", devices=jax.devices()[:4])
    ours, theirs = rows(tmp_path / "other"), rows(tmp_path / "own")
    assert len(ours) > len(theirs) and ours[-1]["step"] == theirs[-1]["step"] == 4
    for name in ("train/loss", "train/grad_norm"):  # means of steps 3 and 4
        assert ours[-1][name] == pytest.approx(theirs[-1][name], rel=1e-6)
    (step, own), (again, other) = (saved_state(tmp_path / name) for name in ("own", "other"))
    assert step == again == 4 and set(own) == set(other)
    for path, value in own.items():
        scale = max(float(np.abs(value).max(initial=0)), 1e-30)
        np.testing.assert_allclose(other[path] / scale, value / scale, atol=1e-6, err_msg=path)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(dit_config, tmp_path):
    dit_config.optim.update(peak_lr=1e15, warmup_steps=0)
    dit_config.checkpoint_every = 1
    with pytest.raises(
        FloatingPointError, match=r"train/\w+ is (nan|inf) at step [234]; lower.*rec"
    ):
        train(dit_config, tmp_path, devices=ONE)
    step, state = saved_state(tmp_path)
    assert step < 4
    assert all(np.isfinite(v).all() for path, v in state.items() if path.startswith("ema/"))


def test_what_cannot_be_shown_costs_no_checkpoint(dit_config, tmp_path, monkeypatch):
    dit_config.num_steps = dit_config.checkpoint_every = dit_config.sample_every = 2

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(loop.preview, "write", fail)
    with pytest.raises(OSError, match="no space left"):
        train(dit_config, tmp_path, devices=ONE)
    assert saved_state(tmp_path)[0] == 2


def test_a_vae_is_exported_with_the_statistics_of_what_it_was_trained_on(vae_config, monkeypatch):
    """Of the parts of a mixture, opened where clips start anywhere, as training opens them."""
    vae_config.data.parts = ConfigDict(
        {name: {"weight": 1.0, "seed": seed} for name, seed in (("a", 3), ("b", 4))}
    )
    seen, make = [], sources.make_source

    def spy(settings, **options):
        seen.append(settings["seed"])
        return make(settings, **options)

    monkeypatch.setattr(sources, "make_source", spy)
    monkeypatch.setattr(exporting, "STATISTICS_CLIPS", 8)
    stage = VAEStage(vae_config)
    params = jax.jit(stage.init)(jax.random.key(0))
    config = exporting.with_statistics(stage, vae_config, params["vae"])
    assert seen == [3, 4]
    assert len(config.latents_std) == config.z_dim and min(config.latents_std) > 0


def test_a_run_starts_from_the_weights_of_a_folder(vae_config, tmp_path):
    vae_config.num_steps, vae_config.sample_every = 1, 0
    train(vae_config, tmp_path / "first", devices=ONE)
    folder = export(tmp_path / "first", tmp_path / "folder", weights="raw")

    vae_config.init_from = str(folder)
    vae_config.seed = 5
    vae_config.optim.update(peak_lr=1e-12, freeze=("vae/encoder",))
    vae_config.vae_loss.adversarial = 0.1  # its discriminator starts anew
    train(vae_config, tmp_path / "second", devices=ONE)
    _, first = saved_state(tmp_path / "first")
    _, second = saved_state(tmp_path / "second")
    for path, value in first.items():
        if path.startswith("params/"):
            np.testing.assert_allclose(second[path], value, atol=1e-9, err_msg=path)
        if path.startswith("params/vae/encoder"):
            np.testing.assert_array_equal(second[path], value, err_msg=path)
    assert any(path.startswith("params/discriminator") for path in second)


def test_an_imported_run_goes_on_as_one_that_starts_from_the_folder(dit_config, tmp_path):
    dit_config.num_steps = dit_config.checkpoint_every = 2
    dit_config.sample_every = 0
    train(dit_config, tmp_path / "first", devices=ONE)
    dit_config.init_from = str(export(tmp_path / "first", tmp_path / "folder", weights="raw"))
    assert saved_state(begin(dit_config, tmp_path / "imported"))[0] == 0
    for name in ("imported", "direct"):
        train(dit_config, tmp_path / name, devices=ONE)
    ours, theirs = (saved_state(tmp_path / name) for name in ("imported", "direct"))
    assert ours[0] == theirs[0] == 2
    for path, value in theirs[1].items():
        np.testing.assert_array_equal(ours[1][path], value, err_msg=path)
    with pytest.raises(ValueError, match="holds a training run already"):
        begin(dit_config, tmp_path / "imported")
    dit_config.dit.num_heads //= 2  # of the same shapes
    with pytest.raises(ValueError, match=r"made with dit num_heads 2, config.dit.num_heads is 1"):
        begin(dit_config, tmp_path / "heads")
    dit_config.init_from = str(tmp_path / "none")
    with pytest.raises(ValueError, match="neither a folder nor shipped weights"):
        begin(dit_config, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("stage", "ddit", "config.stage 'ddit' is not one of vae, dit"),
        ("num_steps", 0, "config.num_steps 0 must be 1 or more"),
        ("sample_every", -1, "config.sample_every -1"),
        ("batch_size", 12, "batch_size 12 is not divisible .* to 8 or 16"),
        ("vae_checkpoint", "", "config.vae_checkpoint is empty"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    dit_config, tmp_path, key, value, words
):
    dit_config[key] = value
    assert jax.device_count() == 8
    with pytest.raises(ValueError, match=words):
        train(dit_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_run_in_a_workdir_is_refused_before_it_writes_there(vae_config, tmp_path):
    with startup.alone(tmp_path), pytest.raises(ValueError, match="another run trains there"):
        train(vae_config, tmp_path, devices=ONE)
    # But for the folder that was made to try whether it can be.
    assert list(tmp_path.rglob("*")) == [tmp_path / "checkpoints"]
