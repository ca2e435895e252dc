"""Collectives of a compiled program: over which mesh axes, how much each device sends, how long.

Bytes are those that one device sends in one step by the usual algorithms, for payload V of one
device's result (operand, of a reduce-scatter) and groups of g: (g - 1) / g V for all-gather,
reduce-scatter and all-to-all, twice that for all-reduce, V for a permutation.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.chips import Chip
from sora_jax.plan import hlo

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "collective-broadcast"),
)
# Of a link's bandwidth, what long transfers reach (Austin et al. 2025, chapter 2: 90 of 100 GB/s).
LINK_EFFICIENCY = 0.9
# Between the cores of one TPU7x chip, against one link (Google's page on TPU7x).
CORE_LINK = 6
_COMPUTE = ("fusion", "convolution", "dot", "custom-call", "while", "reduce", "sort")
_ORDER = r"(?:\[[\d,]+\]<=)?\[[\d,]+\](?:T\([\d,]+\))?"  # of device numbers
_MESH = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(({_ORDER})\))?\s*")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


class Collective(NamedTuple):
    """One collective of the program's text.

    Args:
      groups: of device numbers, as they stand in the mesh; (source, target) of a permutation.
      runs: times in a step.
      sent: bytes of one device in one run.
      overlapped: other work stands between its start and its end.
    """

    kind: str
    name: str
    groups: tuple[tuple[int, ...], ...]
    runs: float
    sent: float
    overlapped: bool

    @property
    def group_size(self) -> int:
        return len(self.groups[0]) if self.groups else 1


def find(program: hlo.Program, devices: int) -> list[Collective]:
    """Every collective among more than one device that `program` runs on `devices`."""
    found = []
    types = {i.name: i.type for body in program.computations.values() for i in body}
    for name, runs in program.runs.items():
        chains: set[str] = set()
        instructions = program.computations[name]
        for position, instruction in enumerate(instructions):
            inner = _collective(instruction, program)
            if inner is None:
                continue
            channel = _CHANNEL.search(inner.rest)
            if inner is not instruction and channel:
                # The compiler cuts one collective into steps, each fused with other work.
                if channel.group(1) in chains:
                    continue
                chains.add(channel.group(1))
            kind = inner.opcode.removesuffix("-start")
            groups = _groups(inner.rest, devices, kind)
            size = (
                2 if kind == "collective-permute" and groups else len(groups[0] if groups else ())
            )
            if kind == "all-reduce" and any("all-reduce-scatter" in c for c in instruction.called):
                kind = "reduce-scatter"
            if size > 1:
                operands = sum(hlo.shape_bytes(types.get(n, "")) for n in inner.operands)
                sent = _sent(kind, inner, operands, size)
                overlapped = _is_overlapped(instruction, instructions[position + 1 :])
                found.append(Collective(kind, instruction.name, groups, runs, sent, overlapped))
    return found


def _collective(instruction: hlo.Instruction, program: hlo.Program) -> hlo.Instruction | None:
    """The collective that `instruction` is, or that what it calls holds."""
    if instruction.opcode.removesuffix("-start") in KINDS:
        return instruction
    if instruction.opcode not in ("fusion", "custom-call", "call-start"):
        return None  # what async-start wraps is counted where it stands, in a computation that runs
    for called in instruction.called:
        for inner in program.computations.get(called, ()):
            if inner.opcode.removesuffix("-start") in KINDS:
                return inner
    return None


def _sent(kind: str, instruction: hlo.Instruction, operand_bytes: float, size: int) -> float:
    result = hlo.shape_bytes(instruction.type)
    if instruction.opcode.endswith("-start"):  # operands and results in one tuple
        result = max(result - operand_bytes, operand_bytes) if kind != "all-reduce" else result
        if kind == "collective-permute":
            result = operand_bytes
    if kind in ("collective-permute", "collective-broadcast"):
        return result
    payload = operand_bytes if kind == "reduce-scatter" else result
    return payload * (size - 1) / size * (2 if kind == "all-reduce" else 1)


def _is_overlapped(start: hlo.Instruction, after: Sequence[hlo.Instruction]) -> bool:
    """Whether work stands between a started collective and the instruction that waits for it."""
    if start.opcode == "fusion":
        # Cut into steps that are fused with compute.
        return "async_collective" in " ".join((start.name, *start.called)).replace("-", "_")
    if not start.opcode.endswith("-start"):
        return False
    for instruction in after:
        if instruction.opcode.endswith("-done") and start.name in instruction.operands:
            return False
        if instruction.opcode in _COMPUTE:
            return True
    return False


def _groups(rest: str, devices: int, kind: str) -> tuple[tuple[int, ...], ...]:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
        found = re.findall(r"\{(\d+),(\d+)\}", pairs.group(1)) if pairs else []
        return tuple((int(a), int(b)) for a, b in found if a != b)
    listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest)
    if listed:
        return tuple(
            tuple(int(n) for n in group.split(","))
            for group in re.findall(r"\{([\d,]+)\}", listed.group(1))
        )
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if iota:
        return tuple(map(tuple, _iota(iota.group(1)).tolist()))
    mesh = _MESH.search(rest)
    if mesh:
        return _mesh_groups(mesh, rest, devices)
    return (tuple(range(devices)),)  # none named: all of them


def _iota(text: str) -> np.ndarray:
    """Device numbers of the form [shape]<=[dims]T(permutation); without a shape they are flat."""
    found = re.match(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    dims = [int(n) for n in found.group(2).split(",")]
    numbers = np.arange(np.prod(dims)).reshape(dims)
    if found.group(3):
        numbers = numbers.transpose([int(n) for n in found.group(3).split(",")])
    shape = [int(n) for n in found.group(1).split(",")] if found.group(1) else [-1]
    return numbers.reshape(shape)


def _mesh_groups(mesh: re.Match, rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of the form mesh['a'=4,'b'=2] {'a','b':(1)2}: named axes, or parts of them."""
    axes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", mesh.group(1)))
    sizes = {name: int(size) for name, size in axes.items()}
    numbers = np.arange(int(np.prod(list(sizes.values()))))
    if mesh.group(2):
        numbers = _iota(mesh.group(2)).reshape(-1)
    inside = re.match(r"\{([^}]*)\}", rest[mesh.end() :])
    dims, grouped = [], []
    named = {m[0]: (int(m[1] or 1), int(m[2] or 0)) for m in _AXIS.findall(inside.group(1))}
    for name, size in sizes.items():
        before, part = named.get(name, (1, 0))
        if name in named and not part:
            before, part = 1, size
        # An axis is cut as (before, part, after); whole ones have one part alone.
        for length, is_grouped in ((before, False), (part or size, name in named)):
            dims.append(length)
            grouped.append(is_grouped)
        dims.append(size // (before * (part or size)))
        grouped.append(False)
    numbers = numbers.reshape(dims)
    order = [i for i, g in enumerate(grouped) if not g] + [i for i, g in enumerate(grouped) if g]
    size = int(np.prod([d for d, g in zip(dims, grouped, strict=True) if g]))
    return tuple(map(tuple, numbers.transpose(order).reshape(-1, size).tolist()))


def axes_of(collective: Collective, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    numbers = np.array(collective.groups)
    coordinates = np.stack(np.unravel_index(numbers, tuple(mesh_shape.values())))
    differ = (coordinates != coordinates[..., :1]).any(axis=(1, 2))
    return tuple(name for name, d in zip(mesh_shape, differ, strict=True) if d)


def seconds(collective: Collective, chip: Chip, places: np.ndarray, extent: Sequence[int]) -> float:
    """Time of one run over the slice's own network, or between slices.

    A group's bandwidth is that of the links along the torus dimensions it spreads over: two a
    dimension where its ends are joined, else one. The devices of a chip share them.

    Args:
      places: (device number) -> (slice, x, y, z, core).
      extent: chips along x, y and z of a slice.
    """
    members = places[np.array(collective.groups[:64])]
    spread = members.max(axis=1) - members.min(axis=1) + 1
    widest = spread.max(axis=0)
    if widest[0] > 1:
        hosts_share = chip.dcn_host / (chip.chips_per_host * chip.devices)
        return collective.sent / hosts_share
    if (widest[1:4] == 1).all():
        return collective.sent / (CORE_LINK * chip.ici_link * LINK_EFFICIENCY)
    link = chip.ici_link * LINK_EFFICIENCY / chip.devices
    dimensions = [
        (int(n), n == e and e >= chip.wraps)
        for n, e in zip(widest[1:4], extent, strict=True)
        if n > 1
    ]
    if collective.kind == "collective-permute":
        steps = np.abs(members[:, 1, 1:4] - members[:, 0, 1:4])
        wrapped = np.minimum(steps, np.array(extent) - steps)
        longest = int(np.where(np.array(extent) >= chip.wraps, wrapped, steps).sum(axis=1).max())
        return collective.sent * max(1, longest) / link
    if collective.kind.endswith("all-to-all"):
        # Through the middle of a dimension goes what one half has for the other: a half of what
        # each member has, of which it sends all but its own part.
        size = collective.group_size
        crossing = [n / 8 if wraps else n / 4 for n, wraps in dimensions]
        return collective.sent * size / (size - 1) * max(crossing) / link
    return collective.sent / (link * sum(2 if wraps else 1 for _, wraps in dimensions))
