"""From a compiled step to a predicted time: a roofline whose every term is stated.

- Matrix products and everything else that XLA compiles: the compiler's own estimated cycles, times
  the runs of the loops they stand in, over the clock. Where it gives none: bytes moved over HBM
  bandwidth.
- Attention kernels, of which it gives none: their FLOPs as traced, and steps of their grids, at
  the rates of kernels.py.
  Kernels that make its queries and keys: by their bytes, or their instruction words, as there.
- Collectives: bytes over links. Those with work between start and end are hidden by it, up to the
  time of all work; the others stand still for.

Nothing here ran on a chip.
"""

import collections
from typing import Any, NamedTuple

from sora_jax.chips import Chip
from sora_jax.plan import collectives, hlo, kernels
from sora_jax.plan.count import Counts
from sora_jax.plan.topology import Slice

_STRUCTURE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "iota"),
    *("conditional", "copy-start", "copy-done", "async-start", "async-done", "after-all", "add"),
    # Begun beside other work: slices on their way to fast memory, what runs on sparse cores.
    *("slice-start", "slice-done", "call-start", "call-done"),
    *("partition-id", "replica-id", "custom-call", "opt-barrier", "async-update", "rng-get-and-"),
)


class CollectiveSum(NamedTuple):
    """Collectives of one kind over the same mesh axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    count: float
    bytes: float  # that one device sends
    largest: float  # of them, in one run of one
    overlapped: float  # share of the bytes that move beside other work
    seconds: float


class Prediction(NamedTuple):
    """Seconds of one step, predicted; they add up to `step`.

    Args:
      compute: matrix products, elementwise work and copies that XLA compiles.
      kernels: attention.
      waiting: collectives that nothing hides.
      hidden: collectives beside compute; not part of the sum.
    """

    step: float
    compute: float
    kernels: float
    waiting: float
    hidden: float
    mfu: float
    collectives: list[CollectiveSum]
    largest_copies: float


def predict(step: Any, slice_: Slice) -> Prediction:
    """The predicted time of a compiled `steps.Step`."""
    chip, devices = slice_.chip, step.mesh.size
    program = hlo.parse(step.text)
    compute, copies = _compute_seconds(program, chip)
    attention = _kernel_seconds(step.counts, chip, devices)
    sums = _collective_sums(program, step, slice_)
    waiting = sum(s.seconds * (1 - s.overlapped) for s in sums)
    beside = sum(s.seconds * s.overlapped for s in sums)
    exposed = max(0.0, beside - compute - attention)
    total = compute + attention + waiting + exposed
    model = sum(value for name, value in step.flops.items() if name not in ("VAE", "text"))
    peak = chip.device_flops * devices
    return Prediction(
        step=total,
        compute=compute,
        kernels=attention,
        waiting=waiting + exposed,
        hidden=beside - exposed,
        mfu=model / (total * peak),
        collectives=sums,
        largest_copies=copies,
    )


def _compute_seconds(program: hlo.Program, chip: Chip) -> tuple[float, float]:
    """Seconds of all that XLA compiles, and of copies among it."""
    total = copies = 0.0
    for instruction, runs in program.scheduled():
        base = instruction.opcode.removesuffix("-start").removesuffix("-done")
        if base in collectives.KINDS:
            continue
        cycles = instruction.cycles
        if cycles is not None:
            seconds = runs * cycles / chip.clock
        elif (name := instruction.name.split(".")[0]) in kernels.PASSES:
            seconds = runs * _pass_seconds(name, instruction, chip)
        elif instruction.opcode in _STRUCTURE or instruction.opcode == "fusion":
            continue  # a fusion without cycles moves a few bytes
        else:
            seconds = runs * 2 * hlo.shape_bytes(instruction.type) / chip.device_hbm_bandwidth
        total += seconds
        copies += seconds if instruction.opcode in ("copy", "transpose", "reshape") else 0.0
    return total, copies


def _kernel_seconds(counts: Counts, chip: Chip, devices: int) -> float:
    """Seconds of the kernels with products, of which counts are over all devices."""
    seconds = 0.0
    for name, flops in counts.items():
        if name not in ("matmul", "conv"):
            work = {"flops": flops / devices, "steps": counts.steps[name] / devices}
            seconds += kernels.seconds(name, chip, **work, parallel=counts.parallel[name])
    return seconds


def _pass_seconds(name: str, call: hlo.Instruction, chip: Chip) -> float:
    moved = hlo.shape_bytes(call.type) + hlo.shape_bytes(call.operand_types)
    return kernels.pass_seconds(name, chip, values=hlo.first_size(call.type), moved=moved)


def _collective_sums(program: hlo.Program, step: Any, slice_: Slice) -> list[CollectiveSum]:
    places = slice_.places(list(step.mesh.devices.flat))
    grouped: dict[tuple, list[tuple[float, ...]]] = collections.defaultdict(list)
    for found in collectives.find(program, step.mesh.size):
        axes = collectives.axes_of(found, dict(step.mesh.shape))
        one = collectives.seconds(found, slice_.chip, places, slice_.extent)
        sent = found.runs * found.sent
        grouped[found.kind, axes].append(
            (found.runs, sent, found.sent, found.overlapped * found.runs * one, found.runs * one)
        )
    sums = []
    for (kind, axes), rows in sorted(grouped.items()):
        counts, sent, each, beside, seconds = zip(*rows, strict=True)
        share = sum(beside) / sum(seconds) if sum(seconds) else 0.0
        sums.append(
            CollectiveSum(kind, axes, sum(counts), sum(sent), max(each), share, sum(seconds))
        )
    return sums
