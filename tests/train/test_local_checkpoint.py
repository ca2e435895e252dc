"""Copies on the hosts' own disks: exact, of this run alone, and only where all have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import sharding
from sora_jax.train import local_checkpoint
from sora_jax.train.local_checkpoint import LocalCheckpointer


@pytest.fixture(scope="module")
def tree():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "kernel": nnx.Param(jax.random.normal(keys[0], (3, 16, 12)), axes=("embed", "mlp")),
        "low": nnx.Param(jax.random.normal(keys[1], (16,)).astype(jnp.bfloat16), axes=("embed",)),
        "step": jnp.asarray(5, jnp.int32),
    }


@pytest.fixture(scope="module")
def placed(tree):
    shardings = sharding.tree_shardings(tree, sharding.make_mesh(data=2, fsdp=2, tensor=2))
    return jax.device_put(tree, shardings), jax.eval_shape(lambda: tree), shardings


@pytest.fixture
def saved(tmp_path, placed):
    """Steps 2 and 3 (of 1, 2, 3) of run "a"."""
    local = LocalCheckpointer(tmp_path, run="a")
    for step in (1, 2, 3):
        local.save(step, placed[0], data={"n": step}, meta={"m": [step]})
    local.wait()
    return local


def test_the_newest_two_are_kept_and_restored_bit_for_bit(saved, tmp_path, placed):
    state, shapes, shardings = placed
    names = sorted(p.name for p in (tmp_path / "sora_jax-0-of-1").iterdir())
    assert names == ["2", "3"]
    assert saved.newest(shapes, shardings, above=-1) == 3
    assert saved.newest(shapes, shardings, above=3) is None
    got, data, meta = saved.restore(2, shapes, shardings)
    assert (data, meta) == ({"n": 2}, {"m": [2]})
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    # Replicas are written once.
    size = (tmp_path / "sora_jax-0-of-1" / "3").stat().st_size
    assert size < 3 * 16 * 12 * 4 + 4000


def test_every_changed_byte_makes_a_copy_none(saved, tmp_path, placed):
    file, rng = tmp_path / "sora_jax-0-of-1" / "3", np.random.default_rng(0)
    old = file.read_bytes()
    places = [*range(8), len(old) - 1, *rng.integers(0, len(old), 60)]
    for place in places:
        new = bytearray(old)
        new[place] ^= int(rng.integers(1, 256))
        file.write_bytes(new)
        assert saved.newest(*placed[1:], above=-1) == 2, place
    file.write_bytes(old[: len(old) // 2])
    assert saved.newest(*placed[1:], above=-1) == 2
    file.write_bytes(old)
    assert saved.newest(*placed[1:], above=-1) == 3


def test_copies_of_another_run_or_mesh_are_not_taken(saved, tmp_path, tree, placed):
    other = LocalCheckpointer(tmp_path, run="b")
    assert other.newest(*placed[1:], above=-1) is None
    mesh = sharding.tree_shardings(tree, sharding.make_mesh(fsdp=8))
    assert saved.newest(placed[1], mesh, above=-1) is None
    other.save(1, placed[0], data={}, meta={})
    other.wait()
    assert [p.name for p in (tmp_path / "sora_jax-0-of-1").iterdir()] == ["1"]


def test_a_full_disk_costs_a_copy_and_not_the_run(saved, placed, monkeypatch, caplog):
    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(local_checkpoint.os, "replace", full)
        saved.save(4, placed[0], data={}, meta={})
        saved.wait()
    assert "no copy of step 4: No space left" in caplog.text
    assert saved.newest(*placed[1:], above=-1) == 3


def test_only_a_step_that_every_process_has_is_taken(saved, placed, monkeypatch):
    for theirs, expected in (([2], 2), ([3, 4], 3), ([], None)):
        monkeypatch.setattr(
            local_checkpoint.agreement, "gather", lambda mine, theirs=theirs: [mine, theirs]
        )
        assert saved.newest(*placed[1:], above=-1) == expected
