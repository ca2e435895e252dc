"""What is found before the first step: other configs, other hosts, no room; runs told apart."""

import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import base
from sora_jax import sharding
from sora_jax.train import local_checkpoint, loop, startup


@pytest.fixture
def config():
    return base.get_config()


def changed(config, **changes):
    other = config.copy_and_resolve_references()
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = other
        for group in groups:
            node = node[group]
        node[last] = value
    return other


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dit__width", 512, "dit.width 384, not 512"),
        ("seed", 3, "seed 0, not 3"),
        ("batch_size", 16, "batch_size 8, not 16"),
        ("data__flip", True, "data.flip False, not True"),
        ("optim__name", "muon", "optim.name 'adamw', not 'muon'"),
        ("data__parts", {"a": {"weight": 1}}, "data.parts.a.weight 'nothing', not 1"),
        ("optim__param_dtype", "bfloat16", "optim.param_dtype 'float32', not 'bfloat16'"),
        ("optim__moment_dtype", "bfloat16", "optim.moment_dtype 'float32', not 'bfloat16'"),
        ("optim__ema_decay", 0.0, "optim.ema_decay 0.999, not 0.0"),
    ],
)
def test_a_workdir_of_another_config_is_refused_with_what_differs(config, key, value, words):
    saved = config.to_json_best_effort()
    other = changed(config, **{key: value, "num_steps": 7})
    with pytest.raises(ValueError, match=rf"run of another config: {words}; set config") as error:
        startup.check_same_run(other, saved, workdir=Path("runs/a"))
    assert str(error.value).startswith("runs/a holds") and "num_steps" not in str(error.value)


def test_what_may_change_is_listed_and_keys_that_older_versions_lack_are_no_difference(config):
    old = changed(config)
    del old["watchdog_minutes"], old.skip["grad_norm"], old.dit["remat"]
    saved = old.to_json_best_effort()
    assert startup.check_same_run(config, saved, workdir=Path("a")) == []
    changes = {"num_steps": 2000, "data__path": "elsewhere", "optim__peak_lr": 0.5, "mesh__fsdp": 2}
    listed = startup.check_same_run(changed(config, **changes), saved, workdir=Path("a"))
    assert sorted(listed) == [
        "data.path '' -> 'elsewhere'",
        "mesh.fsdp -1 -> 2",
        "num_steps 1000 -> 2000",
        "optim.peak_lr 0.001 -> 0.5",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dit__context", "ring"),
        ("dit__remat", "full"),
        ("dit__attention", "xla"),
        ("optim__offload", True),
        ("optim__ema_decay", 0.99),
    ],
)
def test_a_workdir_goes_on_with_another_placement_of_the_same_values(config, key, value):
    config.dit.attention = "auto"
    saved = config.to_json_best_effort()
    (listed,) = startup.check_same_run(changed(config, **{key: value}), saved, workdir=Path("a"))
    assert listed.startswith(f"{key.replace('__', '.')} ") and listed.endswith(f"-> {value!r}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("config", "optim.peak_lr", 0.5), r"config.optim.peak_lr \(0.5, not 0.001\)"),
        (("files", "train/step.py", "0"), "train/step.py"),
        (("versions", "jax", "0.1"), r"jax \('0.1', not '0"),
    ],
)
def test_hosts_with_another_config_code_or_jax_are_named(config, monkeypatch, change, words):
    kind, key, value = change

    def gather(mine):
        other = {name: dict(values) for name, values in mine.items()}
        assert key in other[kind]
        other[kind][key] = value
        return [mine, mine, other]

    startup.check_hosts(config)
    monkeypatch.setattr(startup.agreement, "gather", gather)
    with pytest.raises(ValueError, match=rf"process 2 differs from process 0 in {words}.*; start"):
        startup.check_hosts(config)


def test_a_part_of_a_mixture_may_get_a_place_and_lose_it(config):
    config.data.parts = ConfigDict({"a": {"kind": "clips", "weight": 1.0}})
    placed = changed(config)
    placed.data.parts.a.path = "elsewhere"
    for old, new, row in (
        (config, placed, "data.parts.a.path 'nothing' -> 'elsewhere'"),
        (placed, config, "data.parts.a.path 'elsewhere' -> 'nothing'"),
    ):
        saved = old.to_json_best_effort()
        assert startup.check_same_run(new, saved, workdir=Path("a")) == [row]


def test_what_a_run_has_kept_needs_no_room_again(tmp_path, monkeypatch):
    """A disk of four states: the run that filled it with two must start again there."""
    free = [4000]
    monkeypatch.setattr(startup.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free[0]))
    run, own = tmp_path / "run", tmp_path / "local" / "own"
    for folder, options in (
        (run, {}),
        (tmp_path / "local", {"room": local_checkpoint.ROOM, "kept": own}),
    ):
        free[0] = 4000
        startup.check_room(folder, 1000, key="a", **options)
        kept = options.get("kept", folder)
        for step in (1, 2):
            (kept / str(step)).mkdir(parents=True)
            (kept / str(step) / "state").write_bytes(bytes(1000))
        free[0] = 2000
        startup.check_room(folder, 1000, key="a", **options)
        free[0] = 1000  # less than a new one takes
        with pytest.raises(ValueError, match="make room"):
            startup.check_room(folder, 1000, key="a", **options)
    # What others keep beside a host's copies is not replaced.
    (tmp_path / "local" / "others").write_bytes(bytes(9000))
    shutil.rmtree(own)
    free[0] = 2000
    with pytest.raises(ValueError, match="make room"):
        startup.check_room(tmp_path / "local", 1000, key="a", room=local_checkpoint.ROOM, kept=own)


def test_too_little_space_or_no_permission_is_one_line(tmp_path, monkeypatch):
    startup.check_room(tmp_path / "a" / "b", 1 << 20, key="--workdir")
    assert not list((tmp_path / "a" / "b").iterdir())
    with pytest.raises(ValueError, match=r"--workdir .*c has .* GB free, .* want 2200000000.0 GB"):
        startup.check_room(tmp_path / "c", 10**18, key="--workdir")
    assert not (tmp_path / "c").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"local .*file/d: Not a directory; give a folder"):
        startup.check_room(tmp_path / "file" / "d", 1, key="local")

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(ValueError, match=r"--workdir .*: Permission denied; give a folder"):
        startup.check_room(tmp_path / "d", 1, key="--workdir")


def test_a_bucket_that_is_not_mounted_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert startup.folder("runs/a") == Path("runs/a")
    for start in (loop.train, loop.begin):
        with pytest.raises(ValueError, match="--workdir gs://b/run is no folder: mount the bucket"):
            start(config, "gs://b/run")
    assert not list(tmp_path.iterdir())


def test_the_state_is_counted_whole_and_by_the_pieces_of_this_process():
    mesh = sharding.make_mesh(fsdp=8)
    shapes = {"a": jnp.zeros((16, 4)), "b": jnp.zeros(3, jnp.bfloat16)}
    placement = {"a": sharding.named(mesh, "embed"), "b": sharding.named(mesh)}
    shapes = jax.eval_shape(lambda: shapes)
    assert startup.state_bytes(shapes, placement) == (16 * 4 * 4 + 6, 16 * 4 * 4 + 6)


def test_a_run_keeps_its_name_and_the_next_one_in_the_folder_has_another(tmp_path):
    first = startup.run_id(tmp_path)
    assert first == startup.run_id(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    assert startup.run_id(tmp_path) != first


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("watchdog_minutes", -1.0, "config.watchdog_minutes -1.0 must be 0"),
        ("checkpoint_best", -1, "config.checkpoint_best -1 must be 0"),
        ("profile__steps", (5, 2), r"config.profile.steps \(5, 2\): give the first and the last"),
    ],
)
def test_settings_out_of_range_are_refused(config, key, value, words):
    startup.check_settings(config)
    with pytest.raises(ValueError, match=words):
        startup.check_settings(changed(config, **{key: value}))


def test_a_workdir_is_of_one_run_at_a_time(tmp_path):
    with (
        startup.alone(tmp_path),
        pytest.raises(ValueError, match="another run trains there; wait for it, or give anoth"),
        startup.alone(tmp_path),
    ):
        pass
    with startup.alone(tmp_path):
        pass


def test_an_empty_workdir_is_none():
    with pytest.raises(ValueError, match="--workdir is empty; name a folder"):
        startup.folder("")
