"""Accelerators of Google Cloud by the names that `sora-jax plan --topology` takes: "v5p:4x4x8".

Cloud TPU counts some of them in cores and some in chips, and Kubernetes by other names again; this
is the one table. Nothing but the standard library, as in all of launch/: it runs where no
environment is.
"""

import dataclasses
import difflib
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs."""

    prefix: str  # of Cloud TPU's accelerator types
    cores: int  # that those count for a chip
    runtime: str  # image of the TPU VM
    gke: str  # value of the node label cloud.google.com/gke-tpu-accelerator
    machine: str  # of GKE's nodes, less the number of chips
    dims: int
    most: int  # chips along a side
    single: tuple[str, ...]  # topologies of one host with other than four chips, or with four


FLAT = ("1x1", "2x2", "2x4")
CHIPS = {
    "v4": Chip("v4-", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu", 3, 16, ()),
    "v5e": Chip(
        "v5litepod-", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu", 2, 16, FLAT
    ),
    "v5p": Chip("v5p-", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu", 3, 24, ()),
    "v6e": Chip("v6e-", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard", 2, 16, FLAT),
    "tpu7x": Chip("tpu7x-", 2, "v2-alpha-tpu7-ubuntu2404", "tpu7x", "tpu7x-standard", 3, 32, ()),
}
SAME = {"v7x": "tpu7x"}  # another name in use
PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")

# GPUs of GKE: value of the node label cloud.google.com/gke-accelerator, machine of eight.
GPUS = {
    "a100": ("nvidia-tesla-a100", "a2-highgpu-8g"),
    "a100-80gb": ("nvidia-a100-80gb", "a2-ultragpu-8g"),
    "h100": ("nvidia-h100-80gb", "a3-highgpu-8g"),
    "h100-mega": ("nvidia-h100-mega-80gb", "a3-megagpu-8g"),
    "h200": ("nvidia-h200-141gb", "a3-ultragpu-8g"),
    "b200": ("nvidia-b200", "a4-highgpu-8g"),
}
GPUS_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Slice:
    """So many chips of one kind on one interconnect."""

    name: str  # key of CHIPS
    topology: str

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.split("x")))

    @property
    def accelerator_type(self) -> str:
        """Cloud TPU's name for it."""
        return f"{self.chip.prefix}{self.chips * self.chip.cores}"

    @property
    def chips_a_host(self) -> int:
        return self.chips if self.topology in self.chip.single else 4

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_a_host

    @property
    def machine(self) -> str:
        """GKE's machine type of each host."""
        return f"{self.chip.machine}-{self.chips_a_host}t"


def parse(text: str) -> Slice:
    """A slice from "v5p:4x4x8".

    Raises:
      ValueError: another kind of chip, or a topology that it does not come in; with the nearest.
    """
    name, colon, topology = text.partition(":")
    if not colon:
        raise ValueError(
            f"--type {text!r}: write CHIP:TOPOLOGY as `sora-jax plan` does, such as "
            f"{_guess(text) or 'v5p:4x4x8'}."
        )
    name = SAME.get(name, name)
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, 1, 0.4)
        hint = f"did you mean {near[0]}:{topology}?" if near else f"one of {', '.join(CHIPS)}."
        raise ValueError(f"--type {text!r}: unknown chip {name!r}; {hint}")
    known = topologies(CHIPS[name])
    if topology not in known:
        hint = _same_chips(topology, known) or difflib.get_close_matches(topology, known, 3, 0)
        raise ValueError(
            f"--type {text!r}: {name} comes in no {topology!r}; did you mean {' or '.join(hint)}?"
        )
    return Slice(name, topology)


def topologies(chip: Chip) -> list[str]:
    """All that it comes in, the small ones first."""
    if chip.dims == 2:
        return list(PLANES)
    sides = range(4, chip.most + 1, 4)
    cubes = [(a, b, c) for a in sides for b in sides if b >= a for c in sides if c >= b]
    cubes.sort(key=math.prod)
    return [*SMALL, *("x".join(map(str, cube)) for cube in cubes)]


def _same_chips(topology: str, known: list[str]) -> list[str]:
    """Of as many chips, or in another order of sides."""
    if not all(side.isdigit() for side in topology.split("x")):
        return []
    chips = math.prod(map(int, topology.split("x")))
    return [t for t in known if math.prod(map(int, t.split("x"))) == chips][:3]


def _guess(text: str) -> str | None:
    """The slice that Cloud TPU's own name, such as v5p-256, stands for."""
    for name, chip in CHIPS.items():
        number = text.removeprefix(chip.prefix).removeprefix(f"{name}-")
        if number != text and number.isdigit():
            chips = int(number) // chip.cores
            for topology in topologies(chip):
                if math.prod(map(int, topology.split("x"))) == chips:
                    return f"{name}:{topology}"
    return None


def find_gpu(name: str) -> tuple[str, str]:
    """Node label and machine type of a GPU.

    Raises:
      ValueError: another name; with the nearest.
    """
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(GPUS)}."
        raise ValueError(f"--gpu {name!r} is unknown; {hint}")
    return GPUS[name]
