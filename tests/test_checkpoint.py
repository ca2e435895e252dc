"""Training checkpoints: another mesh, another container, nothing there, another config."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import sharding
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
