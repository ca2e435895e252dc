"""What a compiled training step keeps of its forward pass, read from the program's loops.

Blocks are scanned: a loop stacks up what its backward pass needs, and a later loop reads that and
stacks up gradients. Both are among the compiler's temporaries, whole until the step ends.
"""

import re
from typing import NamedTuple

from sora_jax.plan import hlo

_INDEX = re.compile(r"index=(\d+)")
_ON_HOST = "S(5)"  # as layouts write the hosts' memory space: {1,0:T(8,128)S(5)}


class Kept(NamedTuple):
    """Bytes of one device: activations of the forward pass, and gradients of stacked blocks.

    What waits on hosts is none of them.
    """

    activations: float
    gradients: float


class _Loop(NamedTuple):
    """Types of the arrays of a loop that have a part for every trip, or more."""

    stacked: list[str]  # that it fills
    read: list[str]  # that it leaves as they are


def kept(program: hlo.Program) -> Kept:
    """Of a program whose blocks are unrolled, nothing: the compiler alone knows."""
    activations = gradients = 0.0
    for name in program.runs:
        loops = [
            _loop(program, name, instruction)
            for instruction in program.computations[name]
            if instruction.opcode == "while"
        ]
        for i, loop in enumerate(loops):
            later = [shape for other in loops[i + 1 :] for shape in other.read]
            for shape in loop.stacked:
                if shape in later:
                    later.remove(shape)
                    activations += _device_bytes(shape)
            before = {shape for other in loops[:i] for shape in other.stacked}
            if before & set(loop.read):
                gradients += sum(map(_device_bytes, loop.stacked))
    return Kept(activations, gradients)


def _device_bytes(shape: str) -> float:
    return 0.0 if _ON_HOST in shape else hlo.shape_bytes(shape)


def _loop(program: hlo.Program, caller: str, loop: hlo.Instruction) -> _Loop:
    trips = hlo.trips(program.computations, caller, loop)
    (body,) = re.findall(r"body=%([\w.\-]+)", loop.rest)
    inside = {i.name: i for i in program.computations[body]}
    (root,) = (i for i in inside.values() if i.is_root)
    stacked, read, types = [], [], hlo.parts_of(loop.type)
    if root.opcode != "tuple" or len(root.operands) != len(types):
        return _Loop([], [])
    for index, (name, type_) in enumerate(zip(root.operands, types, strict=True)):
        value = inside[name]
        found = _INDEX.search(value.rest) if value.opcode == "get-tuple-element" else None
        dims = hlo.dimensions(type_)
        if trips is None or not dims or dims[0] < trips:  # a trip may stand before the loop
            continue
        shape = type_.split("{")[0] + (_ON_HOST if _ON_HOST in type_ else "")
        if found is not None and int(found[1]) == index:
            read.append(shape)
        elif _updates(program, inside, value):  # else a carry that happens to have as many rows
            stacked.append(shape)
    return _Loop(stacked, read)


def _updates(
    program: hlo.Program, inside: dict[str, hlo.Instruction], value: hlo.Instruction
) -> bool:
    """Whether `value` is an array of which a part was written anew."""
    while value.opcode in ("get-tuple-element", "copy", "bitcast", "copy-done", "copy-start"):
        if value.operands[0] not in inside:
            return False
        value = inside[value.operands[0]]
    written = [value, *(i for name in value.called for i in program.computations.get(name, []))]
    return any(i.opcode.startswith("dynamic-update-slice") for i in written)  # or begun, or done
