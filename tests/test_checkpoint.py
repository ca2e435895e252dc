"""Training checkpoints: another mesh, another container, nothing there, another config."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import checkpoint, sharding
from sora_jax.checkpoint import Checkpointer


def make_tree(width=12):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "kernel": nnx.Param(jax.random.normal(keys[0], (3, 16, width)), axes=("embed", "mlp")),
        "low": nnx.Param(jax.random.normal(keys[1], (16,)).astype(jnp.bfloat16), axes=("embed",)),
        "odd": nnx.Param(jax.random.normal(keys[2], (7,)), axes=("embed",)),
        "step": jnp.asarray(5, jnp.int32),
    }


def placed(tree, **sizes):
    shardings = sharding.tree_shardings(tree, sharding.make_mesh(**sizes))
    return jax.device_put(tree, shardings), shardings


def abstract(tree):
    return jax.eval_shape(lambda: tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with step 5 of `make_tree`, saved on a mesh of 2 x 4."""
    path = tmp_path_factory.mktemp("checkpoints")
    with Checkpointer(path) as checkpointer:
        tree, _ = placed(make_tree(), fsdp=2, tensor=4)
        checkpointer.save(5, tree, data={"records_read": 40}, meta={"stage": "dit"})
    return path


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 4, "tensor": 2}], ids=str
)
def test_restores_bit_for_bit_on_another_mesh(saved, sizes):
    expected, shardings = placed(make_tree(), **sizes)
    with Checkpointer(saved) as checkpointer:
        assert checkpointer.latest_step() == 5
        got, data, meta = checkpointer.restore(abstract(expected), shardings)
    assert (data, meta) == ({"records_read": 40}, {"stage": "dit"})
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_containers_may_be_others_where_the_paths_are_the_same(tmp_path):
    class Pair(NamedTuple):
        first: jax.Array
        second: jax.Array

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"first": jnp.ones(2), "second": jnp.zeros(3)}, data={}, meta={})
        wanted = jax.eval_shape(lambda: Pair(jnp.ones(2), jnp.zeros(3)))
        got, _, _ = checkpointer.restore(wanted)
    assert isinstance(got, Pair)
    np.testing.assert_array_equal(got.first, np.ones(2))


def test_saved_values_are_those_of_the_call_though_the_buffers_are_donated(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jnp.arange(1 << 18, dtype=jnp.float32)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": x}, data={}, meta={})
        for _ in range(3):
            x = overwrite(x)
        jax.block_until_ready(x)
        checkpointer.wait()
        got, _, _ = checkpointer.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    np.testing.assert_array_equal(got["x"], np.arange(1 << 18, dtype=np.float32))


def test_only_the_newest_are_kept(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": jnp.full(2, step)}, data={"n": step}, meta={})
        checkpointer.wait()
        wanted = {"x": jax.ShapeDtypeStruct((2,), jnp.int32)}
        assert checkpointer.restore(wanted, step=2)[1] == {"n": 2}
        assert checkpointer.restore(wanted)[1] == {"n": 3}
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 1 under .*steps 2, 3"):
            checkpointer.restore(wanted, step=1)


def test_empty_folder_is_an_error_that_names_it(tmp_path):
    with Checkpointer(tmp_path / "none") as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(FileNotFoundError, match=r"no training checkpoint under .*none"):
            checkpointer.restore(abstract(make_tree()))


def test_other_shapes_or_arrays_are_refused_in_one_line(saved):
    def without(name):
        return {key: value for key, value in make_tree().items() if key != name}

    cases = {
        r"5 holds kernel/value as \(3, 16, 12\), the config makes it \(3, 16, 8\) \(1 a": (
            make_tree(width=8)
        ),
        r"holds odd/value as \(7,\), the config makes it nothing": without("odd"),
        r"holds new as nothing, the config makes it \(2,\)": make_tree() | {"new": jnp.zeros(2)},
    }
    with Checkpointer(saved) as checkpointer:
        for message, tree in cases.items():
            with pytest.raises(ValueError, match=message) as error:
                checkpointer.restore(abstract(tree))
            assert "\n" not in str(error.value)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(file, rng):
    """Changes one random byte of `file` and returns what it was."""
    old = file.read_bytes()
    new = bytearray(old)
    new[rng.integers(len(old))] ^= int(rng.integers(1, 256))
    file.write_bytes(new)
    return old


def test_every_changed_byte_is_found_in_whatever_file_it_is(saved):
    rng = np.random.default_rng(0)
    files = files_of(saved / "5")
    assert any(f.name == "manifest.txt" for f in files) and len(files) > 8
    for file in [*files, *rng.choice(files, 30)]:
        if not file.stat().st_size:
            continue
        old = flip(file, rng)
        with Checkpointer(saved) as checkpointer:
            name = str(file.relative_to(saved / "5"))
            with pytest.raises(ValueError, match=rf"step 5: {name} is damaged\); put a copy"):
                checkpointer.newest_sound()
        file.write_bytes(old)
    with Checkpointer(saved) as checkpointer:
        assert checkpointer.newest_sound() == 5


def test_a_damaged_step_is_named_and_put_aside_and_the_one_before_restored(tmp_path, caplog):
    wanted = {"x": jax.ShapeDtypeStruct((2,), jnp.int32)}
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": jnp.full(2, step)}, data={"n": step}, meta={})
    next((tmp_path / "3" / "data").rglob("metadata")).unlink()
    flip(tmp_path / "2" / "manifest.txt", np.random.default_rng(1))
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.newest_sound() == 1 and (tmp_path / "3").exists(), "reading moves none"
        state, data, _ = checkpointer.restore(wanted)
        assert data == {"n": 1} and state["x"].tolist() == [1, 1]
        assert checkpointer.all_steps() == [1]
        checkpointer.save(3, {"x": jnp.full(2, 7)}, data={"n": 7}, meta={})
        checkpointer.wait()
        assert checkpointer.restore(wanted)[1] == {"n": 7}
    assert {"damaged-2", "damaged-3", "1", "3"} == {path.name for path in tmp_path.iterdir()}
    assert "step 3: data/metadata is missing" in caplog.text
    assert "step 2: manifest.txt is damaged" in caplog.text
    flip(tmp_path / "3" / "meta" / "metadata", np.random.default_rng(2))
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match="3: meta/metadata is damaged; use another step"),
    ):
        checkpointer.restore(wanted, step=3)


def test_what_older_versions_wrote_has_no_checksums_and_is_restored_with_a_word(tmp_path, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, {"x": jnp.ones(2)}, data={}, meta={})
    (tmp_path / "4" / "manifest.txt").unlink()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore({"x": jax.ShapeDtypeStruct((2,), jnp.float32)})
    assert "4: written without checksums; restored as it is" in caplog.text


def test_the_newest_the_best_and_every_nth_are_kept(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: 6.0, 7: 7.0}
    (tmp_path / "saving-9").mkdir(parents=True)  # of a process that was killed
    with Checkpointer(tmp_path, keep=1, keep_every=3, keep_best=2) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, {"x": jnp.ones(2)}, data={}, meta={}, loss=loss)
        checkpointer.wait()
        assert checkpointer.all_steps() == [2, 3, 5, 6, 7]
    assert len(list(tmp_path.iterdir())) == 5


def test_what_stops_the_writing_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.manifest, "write", full)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(2)}, data={}, meta={})
        with pytest.raises(OSError, match="No space left"):
            checkpointer.wait()
        assert checkpointer.latest_step() is None, "a step without its checksums is none"
