"""TPU slices that are not there: their names, their devices, and where each device stands."""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sora_jax import chips
from sora_jax.chips import Chip

# What libtpu wants to know on a machine without a TPU; jax must not have been imported yet.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # programs for absent devices cannot be read back
}
# Shapes that a slice may have, as far as suggestions go.
_SIZES = (1, 2, 4, 8, 16)


class Slice(NamedTuple):
    """Devices to compile for.

    Args:
      devices: of all slices.
      places: (device number) -> (slice, x, y, z, core), in the order of `devices`.
      extent: chips along x, y and z of one slice.
    """

    name: str
    chip: Chip
    slices: int
    devices: Sequence[Any]
    extent: tuple[int, int, int]

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.extent)

    def places(self, devices: Sequence[Any]) -> np.ndarray:
        """(slice, x, y, z, core) of each of `devices`."""
        return np.array(
            [
                (getattr(d, "slice_index", 0) or 0, *d.coords, getattr(d, "core_on_chip", 0))
                for d in devices
            ]
        )


def prepare() -> None:
    """Makes this process one that compiles for TPUs; before jax is imported.

    Raises:
      ValueError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "plan compiles with libtpu, which is not installed: pip install 'sora_jax[tpu]'."
        )
    os.environ.update(ENVIRONMENT)


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the shape in chips of a topology such as "v5p:4x4x8".

    Raises:
      ValueError: a name or shape that no slice has, with the nearest.
    """
    chip = chips.of_topology(name)
    shape = name.partition(":")[2]
    if not re.fullmatch(r"\d+(x\d+)*", shape) or min(map(int, shape.split("x"))) < 1:
        raise ValueError(f"topology {name!r}: write a shape in chips, as in {_example(chip)}.")
    sizes = tuple(int(n) for n in shape.split("x"))
    host = [int(n) for n in chip.host_shape.split("x")]
    fits = len(sizes) == chip.torus and all(n % h == 0 for n, h in zip(sizes, host, strict=True))
    if not fits:
        raise ValueError(
            f"topology {name!r} does not exist: a {chip.topology} slice has {chip.torus} "
            f"dimensions, multiples of {chip.host_shape} (a host); did you mean "
            f"{nearest(chip, sizes)}?"
        )
    return chip, sizes


def _example(chip: Chip) -> str:
    return f"{chip.topology}:{'x'.join(['4'] * chip.torus)}"


def nearest(chip: Chip, sizes: Sequence[int]) -> str:
    """The slice of powers of two whose shape, or number of chips, is nearest to `sizes`."""
    host = [int(n) for n in chip.host_shape.split("x")]
    count = math.prod(sizes)
    shapes = [()]
    for h in host:
        shapes = [(*s, n) for s in shapes for n in _SIZES if n % h == 0]
    padded = (*sizes, *(1,) * chip.torus)[: chip.torus]

    def distance(shape):
        by_count = abs(math.log2(math.prod(shape) / count))
        return by_count, sum(abs(a - b) for a, b in zip(shape, padded, strict=True))

    best = min(shapes, key=distance)
    return f"{chip.topology}:{'x'.join(map(str, best))}"


def describe(name: str, slices: int = 1) -> Slice:
    """The devices of `slices` slices of that topology, from libtpu.

    Raises:
      ValueError: a topology that does not exist, or fewer slices than one.
    """
    chip, sizes = parse(name)
    if slices < 1:
        raise ValueError(f"--slices {slices} must be 1 or more.")
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    options = {} if slices == 1 else {"num_slices": slices}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except JaxRuntimeError as error:
        near = difflib.get_close_matches(name, [nearest(chip, sizes)], n=1, cutoff=0.0)
        raise ValueError(
            f"topology {name!r}: libtpu knows no such slice ({str(error).splitlines()[0]}); did "
            f"you mean {near[0]}?"
        ) from error
    extent = (*sizes, 1, 1)[:3]
    return Slice(name, chip, slices, found.devices, extent)


def one_host(chip: Chip) -> str:
    """The topology of a single host."""
    return f"{chip.topology}:{chip.host_shape}"
