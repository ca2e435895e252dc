"""Moves tensors between a file's names and our parameter trees, every key used exactly once."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax import sharding as shardings_of

# How a file's (PyTorch) tensor is laid out beside ours: axes to permute, then our shape.
_PERMUTATIONS = {
    "same": None,
    "linear": (1, 0),  # (out, in) -> (in, out)
    "conv2d": (2, 3, 1, 0),  # (out, in, h, w) -> (h, w, in, out)
    "conv3d": (2, 3, 4, 1, 0),  # (out, in, t, h, w) -> (t, h, w, in, out)
    "vector": None,  # (c, 1, 1[, 1]) <-> (c,): reshaped
    # (out, in, t, h, w) -> (t*h*w*in, out): a convolution whose stride is its kernel, as the
    # linear layer over patches that it is.
    "patch": (2, 3, 4, 1, 0),
    "patch2d": (2, 3, 1, 0),
}
_PATCHES = ("patch", "patch2d")
# Bytes up to which a stack for a single device is put together on the host: a program that writes
# layers would take longer to compile than such a stack to copy.
SMALL_STACK = 2**26
# Bytes of a layer that one device is sent at a time: on the way they lie in memory twice.
PIECE = 2**22


class Entry(NamedTuple):
    """One tensor: `key` in the file is `path` in our tree.

    `index` picks a layer where ours are stacked along a leading axis; `shape` is the file's
    shape where it differs from our permuted one ("vector" and patches).
    """

    key: str
    path: tuple[str, ...]
    layout: str = "same"
    index: int | None = None
    shape: tuple[int, ...] | None = None


def to_ours(value: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    """A file's tensor in our layout; `shape` is ours, used by "vector" and patches."""
    if layout == "vector":
        return value.reshape(shape)
    permutation = _PERMUTATIONS[layout]
    value = value if permutation is None else value.transpose(permutation)
    return value.reshape(shape) if layout in _PATCHES else value


def to_file(value: np.ndarray, entry: Entry) -> np.ndarray:
    """Our tensor in the file's layout, contiguous (safetensors writes views wrongly)."""
    if entry.layout in _PATCHES:
        permutation = _PERMUTATIONS[entry.layout]
        value = value.reshape([entry.shape[i] for i in permutation])
        value = value.transpose(np.argsort(permutation))
    elif entry.shape is not None:
        value = value.reshape(entry.shape)
    elif _PERMUTATIONS[entry.layout] is not None:
        value = value.transpose(np.argsort(_PERMUTATIONS[entry.layout]))
    return np.ascontiguousarray(value)


def flat_params(params) -> dict[tuple[str, ...], nnx.Variable]:
    """Variables by their path in the tree."""
    return {tuple(str(p) for p in path): leaf for path, leaf in nnx.to_flat_state(params)}


def _problems(title: str, keys: Iterable[str]) -> list[str]:
    keys = sorted(keys)
    if not keys:
        return []
    shown = ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "")
    return [f"{len(keys)} {title}: {shown}"]


def load(
    abstract_params,
    entries: list[Entry],
    *,
    keys: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    source: str,
    optional: frozenset[str] = frozenset(),
    dtype=jnp.float32,
    shardings=None,
):
    """Fills `abstract_params` (an `eval_shape`d State) from a file, tensor by tensor.

    Args:
      entries: the name table; several entries may name one path (stacked layers).
      keys: every key of the file with its shape.
      read: returns one tensor by key.
      source: name of the file, for errors.
      optional: keys that the file may hold and that are not used (tied copies).
      dtype: of our matrices and embeddings; all else is float32, and so is what embeds time.
      shardings: a tree like the parameters. Each tensor goes straight to its shards, a large stack
        layer by layer, and the host holds one at a time. None: the default device.

    Raises:
      ValueError: listing all missing, unknown and misshapen keys together.
    """
    flat = flat_params(abstract_params)
    check_keys(flat, entries, keys=keys, source=source, optional=optional)
    return fill(abstract_params, entries, read=read, dtype=dtype, shardings=shardings)


def fill(
    abstract_params,
    entries: list[Entry],
    *,
    read: Callable[[str], np.ndarray],
    dtype=jnp.float32,
    shardings=None,
):
    """What `load` does once the keys are checked; its arguments."""
    flat = flat_params(abstract_params)
    placement = None if shardings is None else flat_params(shardings)
    by_path: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        by_path.setdefault(entry.path, []).append(entry)
    unfilled = set(flat) - set(by_path)
    assert not unfilled, f"name table leaves parameters unfilled: {sorted(unfilled)[:5]}"
    filled = {}
    for path, group in by_path.items():
        where = None if placement is None else placement[path].get_raw_value()
        matrix = path[-1] in ("kernel", "embedding") and not path[0].startswith("time_")
        stored = dtype if matrix else jnp.float32
        value = _fill(group, read, shape=flat[path].shape, dtype=stored, sharding=where)
        filled[path] = flat[path].replace(value)
    return _unflatten(abstract_params, filled)


def check_keys(
    flat: Mapping[tuple[str, ...], nnx.Variable],
    entries: list[Entry],
    *,
    keys: Mapping[str, tuple[int, ...]],
    source: str,
    optional: frozenset[str] = frozenset(),
) -> None:
    """Raises ValueError unless the file's keys and shapes are exactly those of the table."""
    by_key = {entry.key: entry for entry in entries}
    missing = [entry.key for entry in entries if entry.key not in keys]
    unknown = [key for key in keys if key not in by_key and key not in optional]
    misshapen = []
    for entry in entries:
        ours = flat[entry.path].shape if entry.index is None else flat[entry.path].shape[1:]
        if entry.key in keys:
            expected = file_shape(entry, ours)
            if tuple(keys[entry.key]) != expected:
                misshapen.append(f"{entry.key} {tuple(keys[entry.key])} (expected {expected})")
    problems = (
        _problems("missing", missing)
        + _problems("unknown", unknown)
        + _problems("of another shape", misshapen)
    )
    if problems:
        raise ValueError(f"{source}: tensors do not match the config: {'; '.join(problems)}.")


def _fill(
    group: list[Entry],
    read: Callable[[str], np.ndarray],
    *,
    shape: tuple[int, ...],
    dtype,
    sharding: jax.sharding.NamedSharding | None,
) -> jax.Array:
    """One parameter from its entries: a tensor, or a stack of one a layer."""
    first = group[0]
    if first.index is None:
        return _place(to_ours(read(first.key), first.layout, shape), dtype, sharding)
    if sharding is None and math.prod(shape) * np.dtype(dtype).itemsize <= SMALL_STACK:
        stack = np.empty(shape, dtype)
        for entry in group:
            stack[entry.index] = to_ours(read(entry.key), entry.layout, shape[1:])
        return jnp.asarray(stack)
    layer = None if sharding is None else shardings_of.without_leading_axis(sharding)
    stack = jnp.zeros(shape, dtype, device=sharding)
    rows = _rows_of_piece(shape[1:], np.dtype(dtype), sharding)
    for entry in group:
        whole = to_ours(read(entry.key), entry.layout, shape[1:])
        for start in range(0, shape[1], rows):
            value = _place(whole[start : start + rows], dtype, layer)
            stack = _set_rows(sharding)(stack, value, entry.index, start)
            jax.block_until_ready(stack)  # else the host reads ahead and holds many layers
    return stack


def _rows_of_piece(
    layer: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.NamedSharding | None
) -> int:
    """How many rows of a layer are sent at a time; equal pieces, so that one program does.

    All of them where several devices share the layer: each takes a part of its own.
    """
    if sharding is not None and sharding.num_devices > 1:
        return layer[0]
    least = -(-math.prod(layer) * dtype.itemsize // PIECE)
    return layer[0] // next(n for n in range(least, layer[0] + 1) if layer[0] % n == 0)


@functools.cache
def _set_rows(sharding: jax.sharding.NamedSharding | None):
    """Writes rows of a layer into a stack where it lies."""

    def write(stack, value, index, start):
        begin = (index, start) + (0,) * (stack.ndim - 2)
        return jax.lax.dynamic_update_slice(stack, value[None], begin)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _place(value: np.ndarray, dtype, sharding: jax.sharding.NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(np.asarray(value, dtype))
    # Cast shard by shard: the host never holds a second copy of the tensor.
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: np.ascontiguousarray(value[index], dtype)
    )


def _unflatten(like, flat):
    def one(path, leaf):
        key = tuple(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
        return flat[key]

    return jax.tree_util.tree_map_with_path(
        one, like, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def export(params, entries: list[Entry]) -> dict[str, np.ndarray]:
    """Our parameters under the file's names, in the file's layouts."""
    flat = flat_params(params)
    unused = set(flat) - {entry.path for entry in entries}
    assert not unused, f"name table leaves parameters out: {sorted(unused)[:5]}"
    return {entry.key: tensor_of(flat, entry) for entry in entries}


def tensor_of(flat: Mapping[tuple[str, ...], nnx.Variable], entry: Entry) -> np.ndarray:
    """One tensor of `flat_params` in the file's layout."""
    value = flat[entry.path][...]
    return to_file(np.asarray(value if entry.index is None else value[entry.index]), entry)


def file_shape(entry: Entry, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a file's tensor must have for our shape."""
    if entry.shape is not None:
        return tuple(entry.shape)
    permutation = _PERMUTATIONS[entry.layout]
    if permutation is None:
        return tuple(ours)
    return tuple(ours[i] for i in np.argsort(permutation))
