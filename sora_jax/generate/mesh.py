"""The devices that a batch of videos is made on, and how they share it."""

import math

import jax
from jax.sharding import Mesh

from sora_jax.sharding import MESH_AXES, make_mesh, near_divisors


def sampling_axes(devices: int) -> dict[str, int]:
    """Sizes of the mesh axes that "auto" samples on.

    Guidance's two branches are side by side, from four devices on; video tokens, and with them all
    weights, are cut over the rest. Weights are gathered beside other work, where sums over `tensor`
    would be waited for: planned for TPUs, steps take two thirds of the time (Wan 14B at 480p on
    v5p:2x2x1 2.44 s for 3.66, 1.3B on v6e:2x4 .19 for .31) and less memory.
    """
    data = 2 if devices >= 4 and devices % 2 == 0 else 1
    return {"data": data, "context": devices // data}


def sampling_mesh(wanted: str, *, heads: int) -> Mesh | None:
    """The mesh that one batch of videos is sampled on.

    Args:
      wanted: "none", one device; "auto", all of them, as `sampling_axes` divides them, unless they
        are CPUs; or sizes of mesh axes, such as "tensor=4,context=2", of as many of the devices.
      heads: of the transformer.

    Raises:
      ValueError: for axes that do not exist, heads that do not divide, more devices than there
        are, or, of a job of several processes, fewer: each takes part in all that a mesh does.
    """
    devices = jax.devices()
    if wanted == "auto":
        if jax.default_backend() == "cpu":
            return None
        sizes = sampling_axes(len(devices))
    elif wanted == "none":
        return None
    else:
        sizes = {}
        for part in wanted.split(","):
            name, _, size = part.partition("=")
            if name not in MESH_AXES or name in sizes or not size.isdigit() or int(size) < 1:
                raise ValueError(
                    f"mesh {wanted!r}: write auto, none, or sizes of {', '.join(MESH_AXES)}, such "
                    "as tensor=4,context=2."
                )
            sizes[name] = int(size)
    if heads % sizes.get("tensor", 1):
        raise ValueError(
            f"mesh {wanted!r}: the transformer's {heads} heads do not divide over tensor="
            f"{sizes['tensor']}; use {near_divisors(heads, sizes['tensor'])}."
        )
    count = math.prod(sizes.values())
    if count > len(devices):
        raise ValueError(
            f"mesh {wanted!r} takes {count} devices, there are {len(devices)}; make it smaller."
        )
    if 1 < count < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {wanted!r} takes {count} of the {len(devices)} devices of {jax.process_count()} "
            "processes; use all, or none."
        )
    return None if count == 1 else make_mesh(**{"fsdp": 1} | sizes, devices=devices[:count])
