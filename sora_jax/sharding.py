"""The mesh, and the one table that maps logical axis names to it.

Parameters carry logical axes in their NNX metadata (``axes=("embed", "mlp")``) and
activations pass through `constrain`; nothing else in the package writes a PartitionSpec.
"""

import contextlib
import contextvars
import functools
import math
import os

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

CONTEXT = "context"
MESH_AXES = ("data", "fsdp", "tensor", CONTEXT)
# Those that cut weights for memory's sake: layers gather them before they multiply.
STORAGE_AXES = ("fsdp", CONTEXT)
SPACE = "space"
_TILE_ROWS = 8  # of a TPU's tiles of memory

# Logical axis -> mesh axes. `data` replicates weights (across slices), `fsdp` shards weights
# and batch, `tensor` shards heads and MLP, `context` shards video tokens, and weights once more.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "tokens": CONTEXT,
    "text_tokens": None,
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    "frames": None,
    "channels": None,
    # weights
    "embed": ("fsdp", CONTEXT),
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "conv_in": None,
    "conv_out": ("fsdp", CONTEXT),
    "norm": None,
    "bias": None,
    "patch": None,
    "image": None,
    "time": None,
    "buckets": None,
    "spatial": None,
}

_active_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def join_processes() -> None:
    """Makes this process one of a job of several; before anything else touches a device.

    On Cloud TPU and under Slurm JAX finds the others by itself; elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID tell (launch/local.sh sets them).

    Raises:
      ValueError: one of the three is missing or no number, or JAX finds no others.
    """
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"--distributed: nothing tells this process of others ({error}) Start all of them "
                "by launch/local.sh 2 sora-jax COMMAND --distributed ..., or leave it out."
            ) from error
        return
    numbers = []
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        value = os.environ.get(name, "")
        if not value.isdigit():
            raise ValueError(f"{name} is {value!r}; with JAX_COORDINATOR_ADDRESS, set a number.")
        numbers.append(int(value))
    jax.distributed.initialize(num_processes=numbers[0], process_id=numbers[1])


def make_mesh(
    *, data: int = 1, fsdp: int = -1, tensor: int = 1, context: int = 1, devices=None
) -> Mesh:
    """A mesh of `data x fsdp x tensor x context` devices; one size may be -1 (the rest).

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    if wrong := [name for name, size in sizes.items() if size < 1 and size != -1]:
        raise ValueError(
            f"mesh sizes {sizes} must be 1 or more, or -1 (the rest); "
            f"change config.mesh.{wrong[0]}."
        )
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise ValueError(f"mesh sizes {sizes}: only one may be -1; change config.mesh.")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh sizes {sizes} do not multiply to the {len(devices)} devices; "
            f"{_dividing(sizes, len(devices))}."
        )
    if devices[0].platform == "tpu" and len(devices) > 1:
        # Auto axes: Explicit ones reject ambiguous contractions.
        types = (AxisType.Auto,) * len(MESH_AXES)
        return Mesh(_on_torus(sizes, devices), MESH_AXES, axis_types=types)
    array = jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        devices=devices,
        # make_mesh defaults to Explicit axes, which reject ambiguous contractions.
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
    )
    return array


def _dividing(sizes: dict[str, int], devices: int) -> str:
    """What to change of sizes that do not multiply to so many devices."""
    for name, size in sizes.items():
        others = math.prod(n for other, n in sizes.items() if other != name and n != -1)
        if size != -1 and devices % others == 0 and devices // others % size:
            return f"change config.mesh.{name} to {near_divisors(devices // others, size)}"
    return "change config.mesh, of which one may be -1 (the rest)"


def _on_torus(sizes: dict[str, int], devices: list) -> np.ndarray:
    """TPU devices, so that neighbours on a mesh axis are neighbours on the network.

    An axis may take a part of one of the network's dimensions, which `jax.make_mesh` refuses;
    between slices, over the data-centre network, only `data` goes.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    if sizes["data"] % slices:
        raise ValueError(
            f"mesh.data {sizes['data']} is not divisible by the {slices} slices, which only `data` "
            f"connects; change config.mesh.data to a multiple of {slices}."
        )
    inside = sizes | {"data": sizes["data"] // slices}
    return mesh_utils.create_hybrid_device_mesh(
        tuple(inside.values()),
        (slices,) + (1,) * (len(sizes) - 1),
        devices,
        allow_split_physical_axes=True,
    )


def clip_axes(mesh: Mesh, batch: int) -> tuple[str, ...]:
    """Those whose devices have the same clips of `batch`, and can share their frames.

    Of the axes that batches are cut over, these are the ones that so few clips do not divide over.
    """
    cut = _names(_fit(spec("batch"), (batch,), mesh)[0])
    return tuple(name for name in mesh.axis_names if name not in cut)


def space_mesh(mesh: Mesh, size: int, *, shared: tuple[str, ...]) -> Mesh:
    """The devices of `mesh`, in its order, with an axis of `size` of those along `shared`."""
    replicas = [name for name in mesh.axis_names if name not in shared]
    names = (*replicas, SPACE, "rest")
    order = [mesh.axis_names.index(name) for name in (*replicas, *shared)]
    shape = (*(mesh.shape[name] for name in replicas), size, -1)
    devices = np.transpose(mesh.devices, order).reshape(shape)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def tiles_of(pspec: PartitionSpec) -> PartitionSpec:
    """Of arrays like those of `pspec`, with the tiles of a `space_mesh` in front."""
    return PartitionSpec(SPACE, *pspec)


def near_divisors(number: int, parts: int) -> str:
    """Of `number`, the two nearest to `parts`: "4 or 8"."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    near = sorted(divisors, key=lambda n: abs(n - parts))[:2]
    return " or ".join(map(str, sorted(near)))


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None):
    """Makes `constrain` act on `mesh` for code traced inside the block."""
    token = _active_mesh.set(mesh)
    try:
        yield mesh
    finally:
        _active_mesh.reset(token)


def current_mesh() -> Mesh | None:
    return _active_mesh.get()


def spec(*axes: str | None) -> PartitionSpec:
    """PartitionSpec of logical `axes`; a mesh axis is used by the first that asks for it.

    Raises:
      ValueError: for a name that RULES does not hold.
    """
    used: set[str] = set()
    entries = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(RULES)}.")
        mapped = RULES[axis] if axis is not None else None
        names = (mapped,) if isinstance(mapped, str) else (mapped or ())
        names = tuple(name for name in names if name not in used)
        used.update(names)
        entries.append(names[0] if len(names) == 1 else (names or None))
    return PartitionSpec(*entries)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else (entry or ())


def _fit(pspec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Drops the mesh axes that do not divide a dimension: such a dimension is replicated."""
    entries = []
    for size, names in zip(shape, tuple(pspec) + (None,) * (len(shape) - len(pspec)), strict=True):
        names_ = _names(names)
        while names_ and size % math.prod(mesh.shape[n] for n in names_):
            names_ = names_[:-1]
        entries.append(names_[0] if len(names_) == 1 else (names_ or None))
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains activation `x` to its logical `axes`; does nothing without a mesh."""
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, _fit(spec(*axes), x.shape, mesh))
    )


def gather_weight(w: jax.Array, *axes: str | None) -> jax.Array:
    """A weight of logical `axes`, whole along the axes that cut it for memory's sake alone.

    Along one axis after the other: along both at once TPUs make an all-reduce of it, which moves
    twice the bytes and hides behind nothing. So do gradients.
    """
    for dropped in ((CONTEXT,), STORAGE_AXES):
        w = _constrain_weight(w, axes, dropped)
    return w


def scatter_weight(w: jax.Array, *axes: str | None) -> jax.Array:
    """A weight's gradient, cut as the weight is stored."""
    for dropped in ((CONTEXT,), ()):
        w = _constrain_weight(w, axes, dropped)
    return w


def _constrain_weight(
    w: jax.Array, axes: tuple[str | None, ...], dropped: tuple[str, ...]
) -> jax.Array:
    """`w` as it is stored, but for the mesh axes `dropped`."""
    mesh = current_mesh()
    if mesh is None or mesh.size == 1 or not axes:
        return w
    pspec = _without(_fit_weight(spec(*axes), w.shape, mesh), dropped)
    return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, pspec))


def _fit_weight(pspec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """`_fit` for what is stored: one axis less where both leave less than whole rows of a tile.

    TPUs put such pieces together by an all-reduce of zeros and the piece, twice a gather's bytes.
    Where one axis alone does so, memory counts for more.
    """
    entries = []
    for size, names in zip(shape, tuple(_fit(pspec, shape, mesh)), strict=True):
        names_ = _names(names)
        rows = size // math.prod(mesh.shape[n] for n in names_)
        storing = [n for n in names_ if n in STORAGE_AXES and mesh.shape[n] > 1]
        if len(storing) > 1 and rows % _TILE_ROWS:
            names_ = names_[:-1]
        entries.append(names_[0] if len(names_) == 1 else (names_ or None))
    return PartitionSpec(*entries)


def _without(pspec: PartitionSpec, dropped: tuple[str, ...]) -> PartitionSpec:
    entries = []
    for names in pspec:
        names_ = _names(names)
        names_ = tuple(name for name in names_ if name not in dropped)
        entries.append(names_[0] if len(names_) == 1 else (names_ or None))
    return PartitionSpec(*entries)


def platform() -> str:
    """Of the devices that the code traced now will run on; those of a plan may not be here."""
    mesh = current_mesh()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def fitted(mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """`spec` of an array of that shape: what does not divide over the mesh is replicated."""
    return _fit(spec(*axes), shape, mesh)


def shards_of(mesh: Mesh, pspec: PartitionSpec, dimension: int) -> int:
    """Parts that `pspec` cuts that dimension into."""
    return math.prod(mesh.shape[name] for name in _names(pspec[dimension]))


def named(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """NamedSharding of logical `axes` on `mesh`."""
    return NamedSharding(mesh, spec(*axes))


def replicate(tree, mesh: Mesh):
    """Arrays that every process holds alike, on all devices of `mesh`."""

    return jax.tree.map(lambda x: _shards(x, named(mesh)), tree)


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether arrays on `mesh` lie in part with other processes."""
    return mesh is not None and len({d.process_index for d in mesh.devices.flat}) > 1


def to_mesh(tree, mesh: Mesh | None):
    """What this process holds, and all others alike, as a program on `mesh` takes it."""
    if not spans_processes(mesh):
        return tree

    def one(x):
        return replicate(x, mesh) if isinstance(x, jax.Array) and x.is_fully_addressable else x

    return jax.tree.map(one, tree)


def from_mesh(tree, mesh: Mesh | None):
    """What a program on `mesh` made, whole, as arrays that this process alone holds."""
    if not spans_processes(mesh):
        return tree
    whole = _whole(tree, named(mesh))
    return jax.tree.map(lambda x: x.addressable_data(0), whole)


def place(tree, shardings):
    """Arrays that every process holds alike, as `shardings` of the same tree say."""

    def one(x, where):
        return jax.device_put(x, where) if where.is_fully_addressable else _shards(x, where)

    return jax.tree.map(one, tree, shardings)


def _shards(x, where: NamedSharding) -> jax.Array:
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


@functools.partial(jax.jit, static_argnums=1)
def _whole(tree, where: NamedSharding):
    return jax.lax.with_sharding_constraint(tree, where)


def without_leading_axis(sharding: NamedSharding) -> NamedSharding:
    """How one layer of a stack lies on the mesh."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def tree_shardings(tree, mesh: Mesh):
    """Shardings for a tree of NNX variables (or their `eval_shape`), from their `axes`.

    Axes name the trailing dimensions; leading stack axes (scanned layers) are replicated.
    Optimizer moments and EMA, being maps over the same variables, inherit them. Plain
    scalars and keys are replicated.

    Raises:
      ValueError: for a parameter without `axes`.
    """

    def one(path, leaf):
        if isinstance(leaf, nnx.Variable):
            value = leaf.get_raw_value() if hasattr(leaf, "get_raw_value") else leaf.value
            if not jax.tree.leaves(value):  # optax masks what another transform updates
                return leaf
            axes = leaf.get_metadata().get("axes")
            if axes is None:
                raise ValueError(f"parameter {jax.tree_util.keystr(path)} declares no axes.")
            ndim = len(value.shape)
            own = spec(*axes)
            if len(axes) == 1:  # a vector is not worth the latency of gathering it
                own = _without(own, STORAGE_AXES)
            pspec = PartitionSpec(*((None,) * (ndim - len(axes)) + tuple(own)))
            sharding = NamedSharding(mesh, _fit_weight(pspec, value.shape, mesh))
            return leaf.replace(sharding)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(
        one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def in_host_memory(shardings, shapes):
    """`shardings` of the same arrays in the hosts' memory; scalars stay where they are."""
    return jax.tree.map(
        lambda where, leaf: where.with_memory_kind("pinned_host") if leaf.ndim else where,
        shardings,
        shapes,
    )


def axis_size(mesh: Mesh, *axes: str) -> int:
    """Number of shards that logical `axes` make on `mesh`."""
    flat = [
        n for entry in spec(*axes) for n in ((entry,) if isinstance(entry, str) else entry or ())
    ]
    return int(np.prod([mesh.shape[name] for name in flat], initial=1))
