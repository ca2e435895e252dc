"""A VAE over a mesh in space: each device has a tile of every frame, and its neighbours' rows.

The whole network runs inside one `shard_map`, in which everything but convolutions and attention
is a tile's own affair. A convolution of three rows gets one from the neighbour on either side
(`with_neighbours`); where there is none, at the border of the frame, zeros arrive, which are the
padding. Attention among the positions of a frame gathers keys and values (`gather`). XLA's own
partitioner is not asked to cut these convolutions: it gave wrong values for some VAEs.
"""

import contextvars
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sora_jax import sharding

HEIGHT, WIDTH = 2, 3  # dimensions of (b, t, h, w, c)


class Axis(NamedTuple):
    """A mesh axis that cuts a dimension, and into how many tiles."""

    name: str
    size: int


_axes: contextvars.ContextVar[dict[int, Axis]] = contextvars.ContextVar("space_axes")


def run(body: Callable, modules: Any, x: jax.Array, kept: Any, *, multiple: int) -> Any:
    """`body(modules, x, kept)`, on tiles of x where a mesh has axes that cut its rows or columns.

    Args:
      body: gives a tree of arrays (b, t, h, w, c), each as many tiles as x.
      modules: a tree of NNX modules.
      kept: arrays like x, what the chunk before left; or None.
      multiple: rows and columns of a tile are multiples of this.
    """
    mesh = sharding.current_mesh()
    if mesh is None or mesh.size == 1:
        return body(modules, x, kept)
    blocks = (x.shape[HEIGHT] // multiple, x.shape[WIDTH] // multiple)
    spec = sharding.fitted(
        mesh, (*x.shape[:2], *blocks, x.shape[-1]), "batch", "frames", "height", "width", "channels"
    )
    axes = {}
    for dimension in (HEIGHT, WIDTH):
        size = sharding.shards_of(mesh, spec, dimension)
        if size > 1:
            axes[dimension] = Axis(spec[dimension], size)
    if not axes:
        return body(modules, x, kept)
    graph, weights = nnx.split(modules)

    def local(weights, x, kept):
        token = _axes.set(axes)
        try:
            with sharding.use_mesh(None):  # weights are whole, and nothing is left to constrain
                return body(nnx.merge(graph, weights), x, kept)
        finally:
            _axes.reset(token)

    whole = jax.sharding.PartitionSpec()
    return jax.shard_map(
        local, mesh=mesh, in_specs=(whole, spec, spec), out_specs=spec, check_vma=False
    )(weights, x, kept)


def with_neighbours(x: jax.Array, padding: tuple) -> tuple[jax.Array, tuple]:
    """x (b, t, h, w, c) with its neighbours' rows and columns, and the padding that is left.

    Args:
      padding: rows before and after along time, height and width; the stride of the convolution
        divides a tile.
    """
    axes = _axes.get({})
    left = list(padding)
    for dimension, axis in axes.items():
        before, after = left[dimension - 1]
        parts = [x]
        # Devices that nobody sends to, at the border, receive zeros.
        if before:
            rows = lax.slice_in_dim(x, x.shape[dimension] - before, None, axis=dimension)
            forward = [(i, i + 1) for i in range(axis.size - 1)]
            parts.insert(0, lax.ppermute(rows, axis.name, forward))
        if after:
            rows = lax.slice_in_dim(x, 0, after, axis=dimension)
            backward = [(i + 1, i) for i in range(axis.size - 1)]
            parts.append(lax.ppermute(rows, axis.name, backward))
        x = jnp.concatenate(parts, axis=dimension)
        left[dimension - 1] = (0, 0)
    return x, tuple(left)


def gather(x: jax.Array, dimension: int) -> jax.Array:
    """The positions of all tiles along `dimension`, tile by tile."""
    for axis in _axes.get({}).values():
        x = lax.all_gather(x, axis.name, axis=dimension, tiled=True)
    return x
