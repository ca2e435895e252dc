"""A VAE over a mesh in space: each device has a tile of every frame, and its neighbours' rows.

The whole network runs inside one `shard_map`, in which everything but convolutions and attention
is a tile's own affair. A convolution of three rows gets one from the neighbour on either side
(`with_neighbours`); where there is none, at the border of the frame, zeros arrive, which are the
padding. Attention among the positions of a frame gathers keys and values (`gather`). XLA's own
partitioner is not asked to cut these convolutions: it gave wrong values for some VAEs.
"""

import contextvars
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from sora_jax import sharding

HEIGHT, WIDTH = 2, 3  # dimensions of (b, t, h, w, c)


class Grid(NamedTuple):
    """Tiles of a frame; device i of the axis has that of row i // columns, column i % columns."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


WHOLE = Grid(1, 1)
_grid: contextvars.ContextVar[Grid] = contextvars.ContextVar("space_grid", default=WHOLE)


def grid_for(devices: int, rows: int, columns: int) -> Grid:
    """The most tiles that divide `rows`, `columns` and `devices`, with the shortest borders."""
    found = [
        Grid(r, size // r)
        for size in range(1, devices + 1)
        if devices % size == 0
        for r in range(1, size + 1)
        if size % r == 0 and rows % r == 0 and columns % (size // r) == 0
    ]
    return max(found, key=lambda grid: (grid.size, -rows / grid.rows - columns / grid.columns))


def run(body: Callable, modules: Any, x: jax.Array, kept: Any, *, multiple: int) -> Any:
    """`body(modules, x, kept)` -> (y, kept), on tiles of x where there is a mesh to share it.

    Args:
      body: of arrays (b, t, h, w, c).
      modules: a tree of NNX modules.
      kept: what the chunk before left, as it was returned; or None.
      multiple: rows and columns of a tile are multiples of this.
    """
    mesh = sharding.current_mesh()
    shared = () if mesh is None else sharding.clip_axes(mesh, len(x))
    devices = math.prod(mesh.shape[name] for name in shared)
    grid = grid_for(devices, x.shape[HEIGHT] // multiple, x.shape[WIDTH] // multiple)
    if grid == WHOLE:
        return body(modules, x, kept)
    graph, weights = nnx.split(modules)

    def local(weights, x, kept):
        token = _grid.set(grid)
        try:
            with sharding.use_mesh(None):  # weights are whole, and nothing is left to constrain
                y, left = body(nnx.merge(graph, weights), _tile(x, grid), _first(kept))
        finally:
            _grid.reset(token)
        return jax.tree.map(lambda leaf: leaf[None], (y, left))

    batch = sharding.fitted(mesh, x.shape[:1], "batch")
    mesh = sharding.space_mesh(mesh, grid.size, shared=shared)
    cut = sharding.tiles_of(batch)
    y, left = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(sharding.spec(), batch, cut),
        out_specs=cut,
        check_vma=False,
    )(weights, x, kept)
    return jax.tree.map(lambda tiles: _join(tiles, grid), y), left


def _tile(x: jax.Array, grid: Grid) -> jax.Array:
    """This device's part of whole frames."""
    index = lax.axis_index(sharding.SPACE)
    for dimension, place, count in (
        (HEIGHT, index // grid.columns, grid.rows),
        (WIDTH, index % grid.columns, grid.columns),
    ):
        size = x.shape[dimension] // count
        x = lax.dynamic_slice_in_dim(x, place * size, size, axis=dimension)
    return x


def _first(kept: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], kept)


def _join(tiles: jax.Array, grid: Grid) -> jax.Array:
    """(tiles, b, t, h, w, c) to whole frames."""
    _, b, t, h, w, c = tiles.shape
    tiles = tiles.reshape(grid.rows, grid.columns, b, t, h, w, c)
    return tiles.transpose(2, 3, 0, 4, 1, 5, 6).reshape(b, t, grid.rows * h, grid.columns * w, c)


def with_neighbours(x: jax.Array, padding: tuple) -> tuple[jax.Array, tuple]:
    """x (b, t, h, w, c) with its neighbours' rows and columns, and the padding that is left.

    Args:
      padding: rows before and after along time, height and width; the stride of the convolution
        divides a tile.
    """
    grid = _grid.get()
    left = list(padding)
    places = np.arange(grid.size).reshape(grid)
    for dimension, along in ((HEIGHT, places.T), (WIDTH, places)):
        if along.shape[1] == 1:
            continue
        before, after = left[dimension - 1]
        parts = [x]
        # Devices that nobody sends to, at the border, receive zeros.
        if before:
            rows = lax.slice_in_dim(x, x.shape[dimension] - before, None, axis=dimension)
            pairs = np.stack([along[:, :-1].ravel(), along[:, 1:].ravel()], axis=1)
            parts.insert(0, lax.ppermute(rows, sharding.SPACE, pairs.tolist()))
        if after:
            rows = lax.slice_in_dim(x, 0, after, axis=dimension)
            pairs = np.stack([along[:, 1:].ravel(), along[:, :-1].ravel()], axis=1)
            parts.append(lax.ppermute(rows, sharding.SPACE, pairs.tolist()))
        x = jnp.concatenate(parts, axis=dimension)
        left[dimension - 1] = (0, 0)
    return x, tuple(left)


def is_tiled() -> bool:
    """Whether what is traced works on tiles of frames."""
    return _grid.get() != WHOLE


def gather(x: jax.Array, dimension: int) -> jax.Array:
    """The positions of all tiles along `dimension`, tile by tile."""
    if not is_tiled():
        return x
    return lax.all_gather(x, sharding.SPACE, axis=dimension, tiled=True)
