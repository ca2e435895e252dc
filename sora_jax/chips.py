"""One table of accelerators: what each can do, each figure with its public source.

Figures are per chip, of the makers' data sheets. TPU7x is the one chip that JAX shows as two
devices; `devices` says so, and the properties with `device` in their name divide by it.
"""

import dataclasses
import difflib

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Args:
      name: short, as Google's documents write it.
      kinds: what `jax.Device.device_kind` begins with.
      bf16: dense bfloat16 FLOP/s.
      int8: dense int8 operations a second (TPU7x: fp8).
      hbm: bytes a compiler lets a program have, less than the data sheet's.
      hbm_bandwidth: bytes a second.
      ici_links: to neighbours; 0 where there is no such network.
      ici_link: bytes a second over one link, one way.
      dcn_host: bytes a second out of one host.
      topology: what names of its topologies begin with; "" for those that cannot be planned.
      torus: dimensions of the network between chips.
      wraps: chips along a dimension from which on its ends are joined.
      chips_per_host: in slices of several hosts.
      host_shape: those chips, as a part of the topology.
      devices: that JAX shows of one chip.
      matrix_unit: rows (and columns) of a matrix unit.
      flops_per_cycle: of all matrix units of one device.
    """

    name: str
    kinds: tuple[str, ...]
    bf16: float
    int8: float = 0.0
    hbm: float = 0.0
    hbm_bandwidth: float = 0.0
    ici_links: int = 0
    ici_link: float = 0.0
    dcn_host: float = 0.0
    topology: str = ""
    torus: int = 0
    wraps: int = 0
    chips_per_host: int = 0
    host_shape: str = ""
    devices: int = 1
    matrix_unit: int = 0
    flops_per_cycle: int = 0

    @property
    def device_flops(self) -> float:
        return self.bf16 / self.devices

    @property
    def device_hbm(self) -> float:
        return self.hbm / self.devices

    @property
    def device_hbm_bandwidth(self) -> float:
        return self.hbm_bandwidth / self.devices

    @property
    def clock(self) -> float:
        """Cycles a second at which the matrix units reach the data sheet's FLOP/s."""
        return self.device_flops / self.flops_per_cycle


# Sources: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (system architecture): peak FLOP/s,
# HBM, its bandwidth, bidirectional ICI bandwidth a chip (halved and divided by the links here),
# NICs of a host. `hbm` is what libtpu 0.0.42 says is available when a program is too large.
# Matrix units: the same pages and Austin et al. 2025, "How to Scale Your Model", chapter 2.
CHIPS = (
    Chip(
        name="v4",
        kinds=("TPU v4",),
        bf16=275e12,
        int8=275e12,
        hbm=31.75 * GIB,  # of 32
        hbm_bandwidth=1.2e12,
        ici_links=6,
        ici_link=50e9,  # 2,400 Gbit/s a chip
        dcn_host=25e9,
        topology="",  # libtpu shows a v4 slice as two devices a chip, which no mesh takes
        torus=3,
        wraps=4,
        chips_per_host=4,
        host_shape="2x2x1",
        matrix_unit=128,
        flops_per_cycle=8 * 2 * 128**2,  # two cores of four units, one device
    ),
    Chip(
        name="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        bf16=197e12,
        int8=394e12,
        hbm=15.75 * GIB,  # of 16
        hbm_bandwidth=819e9,
        ici_links=4,
        ici_link=50e9,  # 1,600 Gbit/s a chip
        dcn_host=25e9,  # 2 NICs of 100 Gbit/s
        topology="v5e",
        torus=2,
        wraps=16,
        chips_per_host=4,
        host_shape="2x2",
        matrix_unit=128,
        flops_per_cycle=4 * 2 * 128**2,
    ),
    Chip(
        name="v5p",
        kinds=("TPU v5", "TPU v5p"),
        bf16=459e12,
        int8=918e12,
        hbm=95.74 * GIB,  # of 95 GiB by the data sheet; the compiler's own figure
        hbm_bandwidth=2765e9,
        ici_links=6,
        ici_link=100e9,  # 4,800 Gbit/s a chip
        dcn_host=25e9,  # 200 Gbit/s
        topology="v5p",
        torus=3,
        wraps=4,
        chips_per_host=4,
        host_shape="2x2x1",
        matrix_unit=128,
        flops_per_cycle=8 * 2 * 128**2,  # two cores of four units, one device
    ),
    Chip(
        name="v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        bf16=918e12,
        int8=1836e12,
        hbm=31.25 * GIB,  # of 32
        hbm_bandwidth=1600e9,
        ici_links=4,
        ici_link=100e9,  # 3,200 Gbit/s a chip
        dcn_host=100e9,  # 4 NICs of 200 Gbit/s
        topology="v6e",
        torus=2,
        wraps=16,
        chips_per_host=4,
        host_shape="2x2",
        matrix_unit=256,
        flops_per_cycle=4 * 2 * 256**2,  # 1.75 GHz; the compiler's cycles rule out half as many
    ),
    Chip(
        name="v7x",
        kinds=("TPU7x", "TPU v7x"),
        bf16=2307e12,
        int8=4614e12,  # fp8
        hbm=189.5 * GIB,  # of 192
        hbm_bandwidth=7380e9,
        ici_links=6,
        ici_link=100e9,  # 1,200 GB/s both ways a chip
        dcn_host=50e9,  # 100 Gbit/s a chip
        topology="tpu7x",
        torus=3,
        wraps=4,
        chips_per_host=4,
        host_shape="2x2x1",
        devices=2,
        matrix_unit=256,
        flops_per_cycle=4 * 2 * 256**2,
    ),
    # Dense figures of NVIDIA's data sheets; for MFU alone.
    Chip(name="A100", kinds=("NVIDIA A100",), bf16=312e12),
    Chip(name="H100", kinds=("NVIDIA H100",), bf16=989e12),
    Chip(name="H200", kinds=("NVIDIA H200",), bf16=989e12),
    Chip(name="B200", kinds=("NVIDIA B200",), bf16=2250e12),
)


def of_kind(device_kind: str) -> Chip | None:
    """The chip that a `jax.Device.device_kind` belongs to, or None where none is known (CPUs)."""
    matches = [
        (kind, chip) for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)
    ]
    return max(matches, key=lambda match: len(match[0]))[1] if matches else None


def of_topology(name: str) -> Chip:
    """The chip of a topology such as "v5p:4x4x8".

    Raises:
      ValueError: for one that is not in the table.
    """
    prefix = name.partition(":")[0]
    known = {chip.topology: chip for chip in CHIPS if chip.topology}
    aliases = {chip.name: chip for chip in known.values()}
    if prefix in known:
        return known[prefix]
    near = difflib.get_close_matches(prefix, [*known, *aliases], n=1, cutoff=0.4)
    meant = f"; did you mean {(known | aliases)[near[0]].topology}?" if near else ""
    raise ValueError(
        f"topology {name!r}: no chip {prefix!r}{meant} Known: {', '.join(known)}, as in v5p:4x4x8."
    )
