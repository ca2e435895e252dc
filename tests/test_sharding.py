"""Logical axes to mesh axes, for parameters and activations."""

import os

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax._src import distributed
from jax.sharding import PartitionSpec

from sora_jax import sharding


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def spec_of(tree, *path):
    for key in path:
        tree = tree[key]
    return tree.get_raw_value().spec


def spec_of_sharding(tree, name):
    return tree[name].get_raw_value()


def params(**arrays):
    """A tree of parameters: name=(shape, axes)."""
    return {name: nnx.Param(jnp.zeros(shape), axes=axes) for name, (shape, axes) in arrays.items()}


def test_a_process_alone_is_told_how_several_are_started(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("JAX_CO", "SLURM", "OMPI"))]:
        monkeypatch.delenv(name)
    # JAX's own looks for others, without its refusal to do so once a device was touched.
    monkeypatch.setattr(jax.distributed, "initialize", distributed.State().initialize)
    with pytest.raises(ValueError, match=r"launch/local.sh 2 sora-jax COMMAND --distributed"):
        sharding.join_processes()


def test_spec_follows_the_table():
    assert sharding.spec("batch", "tokens", None) == PartitionSpec(
        ("data", "fsdp"), "context", None
    )
    assert sharding.spec("embed", "mlp") == PartitionSpec(("fsdp", "context"), "tensor")


def test_a_mesh_axis_is_used_once_by_the_first_that_asks():
    assert sharding.spec("heads", "mlp") == PartitionSpec("tensor", None)
    assert sharding.spec("embed", "batch") == PartitionSpec(("fsdp", "context"), "data")


def test_unknown_axis_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown logical axis 'width_'; known: batch, tokens"):
        sharding.spec("batch", "width_")


def test_every_rule_names_mesh_axes():
    for axis in sharding.RULES:
        sharding.named(sharding.make_mesh(), axis)


def test_mesh_takes_the_rest_for_minus_one():
    assert dict(sharding.make_mesh(data=2, fsdp=-1).shape) == {
        "data": 2,
        "fsdp": 4,
        "tensor": 1,
        "context": 1,
    }
    assert sharding.make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": 2, "fsdp": 2}, {"fsdp": 0}]
)
def test_mesh_that_does_not_use_every_device_is_refused(sizes):
    with pytest.raises(ValueError, match=r"mesh sizes .* change config.mesh"):
        sharding.make_mesh(**sizes)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"context": 3}, r"to the 8 devices; change config.mesh.context to 2 or 4\."),
        ({"data": 2, "tensor": 3}, r"change config.mesh.tensor to 2 or 4\."),
        ({"data": 2, "fsdp": 2}, r"change config.mesh, of which one may be -1 .the rest.\."),
        ({"tensor": 0}, r"must be 1 or more, or -1 .*; change config.mesh.tensor\."),
    ],
)
def test_a_size_that_does_not_divide_is_told_with_the_nearest_that_do(sizes, says):
    with pytest.raises(ValueError, match=says):
        sharding.make_mesh(**sizes)


def test_stacked_leading_axes_are_replicated(mesh):
    tree = params(kernel=((4, 16, 6), ("embed", "mlp")), bias=((4, 6), ("mlp",)))
    placed = sharding.tree_shardings(tree, mesh)
    assert spec_of(placed, "kernel") == PartitionSpec(None, ("fsdp", "context"), "tensor")
    assert spec_of(placed, "bias") == PartitionSpec(None, "tensor")


def test_sizes_that_do_not_divide_are_replicated(mesh):
    placed = sharding.tree_shardings(params(kernel=((3, 6), ("embed", "mlp"))), mesh)
    assert spec_of(placed, "kernel") == PartitionSpec(None, "tensor")
    with sharding.use_mesh(mesh):
        # 2 rows divide over `data`, not over `data` and `fsdp`.
        x = jax.jit(lambda x: sharding.constrain(x, "batch", "act_mlp"))(jnp.zeros((2, 3)))
    assert x.addressable_shards[0].data.shape == (1, 3)


def test_storage_cuts_whole_rows_of_tiles_and_no_vectors():
    mesh = sharding.make_mesh(fsdp=2, context=4)
    shapes = {"whole": (64, 6), "less": (16, 6), "least": (8, 6)}
    tree = params(**{name: (shape, ("embed", None)) for name, shape in shapes.items()})
    tree |= params(vector=((64,), ("embed",)))
    placed = sharding.tree_shardings(tree, mesh)
    assert spec_of(placed, "whole") == PartitionSpec(("fsdp", "context"), None)
    assert spec_of(placed, "less") == PartitionSpec("fsdp", None)
    assert spec_of(placed, "least") == PartitionSpec("fsdp", None), "memory counts for more"
    assert spec_of(placed, "vector") == PartitionSpec(None)


def test_a_weight_is_gathered_and_its_gradient_scattered_as_it_is_stored():
    mesh = sharding.make_mesh(fsdp=2, tensor=2, context=2)
    axes = ("embed", "mlp")
    with sharding.use_mesh(mesh):
        whole = jax.jit(lambda w: sharding.gather_weight(w, *axes))(jnp.ones((32, 6)))
        cut = jax.jit(lambda w: sharding.scatter_weight(w, *axes))(whole)
    assert whole.sharding.spec == PartitionSpec(None, "tensor")
    stored = sharding.tree_shardings(params(kernel=((32, 6), axes)), mesh)
    assert cut.sharding == spec_of_sharding(stored, "kernel")


def test_parameter_without_axes_is_refused_by_its_path(mesh):
    tree = {"block": {"kernel": nnx.Param(jnp.zeros(2))}}
    with pytest.raises(ValueError, match=r"\['block'\]\['kernel'\] declares no axes"):
        sharding.tree_shardings(tree, mesh)


def test_moments_inherit_and_scalars_are_replicated(mesh):
    tree = params(kernel=((16, 6), ("embed", "mlp")))
    state = jax.eval_shape(optax.adam(1e-3).init, tree)
    placed = sharding.tree_shardings(state, mesh)[0]
    assert placed.count.spec == PartitionSpec()
    for moment in (placed.mu, placed.nu):
        assert spec_of(moment, "kernel") == PartitionSpec(("fsdp", "context"), "tensor")


def test_constrain_does_nothing_without_a_mesh_or_on_one_device():
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, "batch", "act_mlp") is x
    with sharding.use_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        assert sharding.constrain(x, "batch", "act_mlp") is x
    assert sharding.current_mesh() is None


def test_constrain_shards_an_activation(mesh):
    with sharding.use_mesh(mesh):
        x = jax.jit(lambda x: sharding.constrain(x, "batch", "act_mlp"))(jnp.ones((8, 4)))
    assert x.addressable_shards[0].data.shape == (2, 2)


def test_axis_size_counts_shards(mesh):
    assert sharding.axis_size(mesh, "batch") == 4
    assert sharding.axis_size(mesh, "mlp") == 2
    assert sharding.axis_size(mesh, "norm") == 1
