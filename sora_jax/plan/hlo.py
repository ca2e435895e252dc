"""Compiled programs as text: computations, instructions, and how often each one runs.

The text is the schedule (`is_scheduled=true`): instructions stand in the order in which they start.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]+m[0-9]+\w*)?)\[([0-9,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computations)=\{?%([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations|(?:true|false)_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OPERAND_TYPES = "operand_layout_constraints={"
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}


class Instruction(NamedTuple):
    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    rest: str  # attributes and metadata
    is_root: bool

    @property
    def cycles(self) -> int | None:
        """The compiler's own estimate of one run, where it made one."""
        found = _CYCLES.search(self.rest)
        return int(found.group(1)) if found else None

    @property
    def operand_types(self) -> str:
        """Of a custom call, which alone tells them."""
        start = self.rest.find(_OPERAND_TYPES) + len(_OPERAND_TYPES)
        if start < len(_OPERAND_TYPES):
            return ""
        return self.rest[start : _closing(self.rest, start - 1, "{}")]

    @property
    def called(self) -> tuple[str, ...]:
        return (*_CALLED.findall(self.rest), *self.branches)

    @property
    def branches(self) -> tuple[str, ...]:
        """Of a conditional: computations of which one runs."""
        return tuple(n for found in _BRANCHES.findall(self.rest) for n in _NAME.findall(found))


class Program(NamedTuple):
    """A compiled program.

    Args:
      runs: how often each computation runs in one step; those inside fusions are left out, and
        of a conditional's branches all but the one that is most work.
      unknown_loops: loops whose number of trips was not found, and counts as 1.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    runs: dict[str, float]
    unknown_loops: int

    def scheduled(self) -> Iterator[tuple[Instruction, float]]:
        """Every instruction that runs by itself, and how often."""
        for name, times in self.runs.items():
            for instruction in self.computations[name]:
                yield instruction, times


def first_size(type_: str) -> int:
    """Values of a type as programs write it, or of the first part of a tuple."""
    dims = dimensions(type_)
    return math.prod(dims) if dims or _SHAPE.search(type_) else 0


def dimensions(type_: str) -> tuple[int, ...]:
    """Of an array's type as programs write it, or of the first part of a tuple."""
    found = _SHAPE.search(type_)
    return tuple(int(n) for n in found.group(2).split(",") if n) if found else ()


def parts_of(type_: str) -> list[str]:
    """Types of the parts of a tuple; an array's is one part."""
    type_ = re.sub(r"/\*.*?\*/", "", type_).strip()
    if not type_.startswith("("):
        return [type_]
    parts, depth = [""], 0
    for letter in type_[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def shape_bytes(type_: str) -> float:
    """Bytes of a type as programs write it; those of all parts of a tuple."""
    total = 0.0
    for kind, dims in _SHAPE.findall(type_):
        if kind in _BYTES:
            size = _BYTES[kind]
        elif kind.startswith("f8"):
            size = 1
        else:
            bits = re.search(r"\d+", kind)
            size = int(bits.group(0)) / 8 if bits else 0
        total += size * math.prod(int(n) for n in dims.split(",") if n)
    return total


def parse(text: str) -> Program:
    """The program of `Compiled.as_text()`.

    Raises:
      ValueError: where there is no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and (found := _instruction(line)):
            current.append(found)
    if not entry:
        raise ValueError("the compiled program's text has no ENTRY computation.")
    runs: dict[str, float] = {}
    unknown = _count_runs(computations, entry, 1.0, runs)
    return Program(computations, entry, runs, unknown)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, with those that an attribute broke put together again."""
    pending = ""
    for line in text.splitlines():
        begins = _INSTRUCTION.match(line) or _HEAD.match(line) or line.rstrip() == "}"
        if begins or not line.strip():
            if pending:
                yield pending
            pending = line
        else:
            pending += " " + line
    if pending:
        yield pending


def _instruction(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if not start:
        return None
    position = start.end()
    position = _closing(line, position) + 1 if line[position] == "(" else line.find(" ", position)
    type_ = line[start.end() : position]
    opcode = _OPCODE.match(line, position)
    if not opcode:
        return None
    end = _closing(line, opcode.end() - 1)
    operands = tuple(_NAME.findall(line[opcode.end() : end]))
    rest = line[end + 1 :]
    if opcode.group(1) == "constant":
        rest = line[opcode.end() : end] + rest
    return Instruction(start.group(2), opcode.group(1), type_, operands, rest, bool(start.group(1)))


def _closing(line: str, start: int, pair: str = "()") -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(line)):
        depth += (line[i] == pair[0]) - (line[i] == pair[1])
        if depth == 0:
            return i
    return len(line)


def _count_runs(computations, name, times, runs) -> int:
    """Adds `times` runs of `name` and of what it calls; the number of loops of unknown length."""
    if name not in computations:
        return 0
    runs[name] = runs.get(name, 0.0) + times
    unknown = 0
    for instruction in computations[name]:
        if instruction.opcode == "while":
            count = trips(computations, name, instruction)
            unknown += count is None
            body = re.search(r"body=%([\w.\-]+)", instruction.rest)
            if body:
                unknown += _count_runs(computations, body.group(1), times * (count or 1), runs)
        elif instruction.branches:
            most = max(instruction.branches, key=lambda branch: _work(computations, branch))
            unknown += _count_runs(computations, most, times, runs)
        elif instruction.opcode in ("call", "async-start"):
            for called in instruction.called:
                unknown += _count_runs(computations, called, times, runs)
    return unknown


def _work(computations, name) -> tuple[float, float, int]:
    """Of one run, to tell branches by: kernels, the compiler's cycles of the rest, instructions."""
    runs: dict[str, float] = {}
    _count_runs(computations, name, 1.0, runs)
    done = [(i, times) for called, times in runs.items() for i in computations[called]]
    kernels = math.fsum(times for i, times in done if i.opcode == "custom-call")
    return kernels, math.fsum(times * (i.cycles or 0) for i, times in done), len(done)


def trips(computations, caller: str, loop: Instruction) -> int | None:
    """Trips of a loop that counts up by one to a constant, as every scan does."""
    known = _KNOWN_TRIPS.search(loop.rest)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
    inside = {i.name: i for i in computations.get(condition.group(1), [])} if condition else {}
    root = next((i for i in inside.values() if i.is_root), None)
    if root is None:
        return None
    if root.opcode == "fusion":  # the comparison stands in a fusion of its own
        (called,) = root.called[:1] or ("",)
        compare = next((i for i in computations.get(called, []) if i.opcode == "compare"), None)
        operands = root.operands
    else:
        compare, operands = root, root.operands
    if compare is None or "direction=LT" not in compare.rest:
        return None
    limits = [v for name in operands if (v := _constant(inside.get(name))) is not None]
    index = [
        int(found.group(1))
        for name in operands
        if name in inside
        and inside[name].opcode == "get-tuple-element"
        and (found := re.search(r"index=(\d+)", inside[name].rest))
    ]
    if len(limits) != 1:
        return None
    return limits[0] - (_initial(computations[caller], loop, index[0]) if index else 0)


def _initial(instructions: list[Instruction], loop: Instruction, index: int) -> int:
    """The counter's first value: 0 unless the loop's operand says otherwise."""
    names = {i.name: i for i in instructions}
    value = names.get(loop.operands[0])
    if value is not None and value.opcode == "tuple" and index < len(value.operands):
        value = names.get(value.operands[index])
        while value is not None and value.opcode in ("copy", "bitcast") and value.operands:
            value = names.get(value.operands[0])
        return _constant(value) or 0
    return 0


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    found = re.match(r"-?\d+", instruction.rest)
    return int(found.group(0)) if found else None
