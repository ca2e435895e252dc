"""What a compiled training step keeps of its forward pass, read from the program's loops.

Blocks are scanned: a loop stacks up what its backward pass needs, and a later loop reads that and
stacks up gradients. Both are among the compiler's temporaries, whole until the step ends.
"""

import re
from typing import NamedTuple

from sora_jax.plan import hlo

_INDEX = re.compile(r"index=(\d+)")
_ON_HOST = ":S(5)"  # as layouts write the hosts' memory space


class Kept(NamedTuple):
    """Bytes of one device: activations of the forward pass, and gradients of stacked blocks."""

    activations: float
    gradients: float


class _Loop(NamedTuple):
    stacked: list[str]  # types that it fills, a part a trip
    read: list[str]  # types that it leaves as they are


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
                    activations += hlo.shape_bytes(shape)
            before = {shape for other in loops[:i] for shape in other.stacked}
            if before & set(loop.read):
                gradients += sum(map(hlo.shape_bytes, loop.stacked))
    return Kept(activations, gradients)


def _loop(program: hlo.Program, caller: str, loop: hlo.Instruction) -> _Loop:
    trips = hlo.trips(program.computations, caller, loop)
    (body,) = re.findall(r"body=%([\w.\-]+)", loop.rest)
    inside = {i.name: i for i in program.computations[body]}
    (root,) = (i for i in inside.values() if i.is_root)
    stacked, read = [], []
    for index, (name, type_) in enumerate(zip(root.operands, hlo.parts_of(loop.type), strict=True)):
        value = inside[name]
        found = _INDEX.search(value.rest) if value.opcode == "get-tuple-element" else None
        dims = hlo.dimensions(type_)
        if trips is None or not dims or dims[0] != trips or _ON_HOST in type_:
            continue
        unchanged = found is not None and int(found[1]) == index
        (read if unchanged else stacked).append(type_.split("{")[0])
    return _Loop(stacked, read)
