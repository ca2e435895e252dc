"""Weights go straight to their shards: equal to a plain load, each tensor read once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import sharding
from sora_jax.convert import folder, names
from sora_jax.convert.weights import Weights


@pytest.mark.parametrize("name", ["dit", "vae", "text"])
def test_a_load_onto_a_mesh_equals_a_plain_one_and_is_sharded(pipeline_folder, name, monkeypatch):
    reads, read = [], Weights.read
    monkeypatch.setattr(Weights, "read", lambda self, key: reads.append(key) or read(self, key))
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, context=2)
    placed = folder.load_component(pipeline_folder, name, mesh=mesh)[2]
    assert len(reads) == len(set(reads)) > 0
    plain = folder.load_component(pipeline_folder, name)[2]
    wanted = sharding.tree_shardings(plain, mesh)
    leaves = [jax.tree.leaves(tree) for tree in (plain, placed, wanted)]
    sharded = 0
    for one, other, where in zip(*leaves, strict=True):
        np.testing.assert_array_equal(one, other)
        assert other.sharding == where
        sharded += not other.sharding.is_fully_replicated
    assert sharded > len(leaves[0]) / 4


def test_parameters_take_the_type_asked_for(pipeline_folder):
    mesh = sharding.make_mesh(data=1, fsdp=8)
    for options in ({}, {"mesh": mesh}):
        params = folder.load_component(pipeline_folder, "dit", dtype=jnp.bfloat16, **options)[2]
    full = folder.load_component(pipeline_folder, "dit")[2]
    kernels = [nnx.to_flat_state(p) for p in (full, params)]
    cast = 0
    for (path, a), (_, b) in zip(*kernels, strict=True):
        matrix = path[-1] == "kernel" and not path[0].startswith("time_")
        assert b.dtype == (jnp.bfloat16 if matrix else jnp.float32), path
        np.testing.assert_array_equal(a[...].astype(b.dtype), b[...])
        cast += matrix
    assert cast > 10


@pytest.mark.parametrize("on_mesh", [False, True])
def test_a_large_stack_is_put_together_on_the_device_piece_by_piece(
    pipeline_folder, monkeypatch, on_mesh
):
    one = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1]) if on_mesh else None
    whole = folder.load_component(pipeline_folder, "dit", mesh=one)[2]
    pieces, place = [], names._place

    def placed(value, *where):
        pieces.append(value.nbytes)
        return place(value, *where)

    monkeypatch.setattr(names, "SMALL_STACK", 0)
    monkeypatch.setattr(names, "PIECE", 1000)
    monkeypatch.setattr(names, "_place", placed)
    in_pieces = folder.load_component(pipeline_folder, "dit", mesh=one)[2]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(in_pieces), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype and a.sharding == b.sharding
    stacks = [leaf for path, leaf in nnx.to_flat_state(in_pieces) if path[0] == "blocks"]
    largest = max(leaf.nbytes // len(leaf[...]) for leaf in stacks)
    of_stacks = [n for n in pieces if n <= 1000]
    assert largest > 1000 and sum(of_stacks) >= sum(leaf.nbytes for leaf in stacks)
