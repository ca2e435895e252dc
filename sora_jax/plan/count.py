"""Matrix products of a traced program, counted exactly: loops, kernels and recomputation included.

`Compiled.cost_analysis` counts the body of a loop once and knows nothing of Pallas kernels; here
the jaxpr is walked, loops count as often as they run and kernels as often as their grid.
"""

import collections
import math
from typing import Any

import jax
from jax.extend import core as jax_core


class Counts(collections.Counter):
    """FLOPs over all devices by what makes them: "matmul", "conv", and kernels by name.

    Attributes:
      steps: of the grids of kernels, by name.
      parallel: pieces of a grid that cores may share out, by name; of several calls the fewest.
    """

    def __init__(self, *flops: Any) -> None:
        super().__init__(*flops)
        self.steps: collections.Counter[str] = collections.Counter()
        self.parallel: dict[str, int] = {}

    def add(self, other: "Counts") -> None:
        """Adds another's, steps too."""
        self.update(other)
        self.steps.update(other.steps)
        for name, pieces in other.parallel.items():
            self.parallel[name] = min(pieces, self.parallel.get(name, pieces))

    @property
    def kernels(self) -> float:
        return sum(n for name, n in self.items() if name not in ("matmul", "conv"))


def of_function(function: Any, *arguments: Any) -> Counts:
    """FLOPs of one call of `function` on `arguments`, which may be abstract."""
    return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_jaxpr(jaxpr: Any) -> Counts:
    """FLOPs of one run; a multiplication and an addition count as two."""
    total = Counts()
    _walk(jaxpr, 1.0, total, "")
    return total


def _walk(jaxpr: Any, times: float, total: Counts, kernel: str) -> None:
    branches = []
    for equation in _live(jaxpr):
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total[kernel or "matmul"] += times * _dot(equation)
        elif name == "conv_general_dilated":
            total[kernel or "conv"] += times * _convolution(equation)
        elif name == "scan":
            _walk(params["jaxpr"].jaxpr, times * params["length"], total, kernel)
        elif name == "cond":
            branches.append(params["branches"])
        elif name == "pallas_call":
            grid = params["grid_mapping"].grid
            inside = Counts()
            name, runs = kernel or _kernel_name(params), times * math.prod(grid)
            inside.steps[name] = runs
            kinds = getattr(params.get("compiler_params"), "dimension_semantics", None) or ()
            shared = zip(grid, kinds, strict=False)
            inside.parallel[name] = math.prod(n for n, kind in shared if kind == "parallel")
            total.add(inside)
            _walk(params["jaxpr"], runs, total, name)
        else:
            inside = times * (params["mesh"].size if name == "shard_map" else 1)
            for jaxpr_ in _inner(params):
                _walk(jaxpr_, inside, total, kernel)
    # A tile of a kernel takes one of several ways, each behind a condition of its own.
    for choices in [sum(branches, ())] if kernel and branches else branches:
        _add_largest(choices, times, total, kernel)


def _live(jaxpr: Any) -> list[Any]:
    """Equations that a result needs: XLA drops the rest, such as what a policy saved."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jax_core.Literal)}
    found = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            found.append(equation)
            needed.update(v for v in equation.invars if not isinstance(v, jax_core.Literal))
    return found[::-1]


def _add_largest(branches: Any, times: float, total: Counts, kernel: str) -> None:
    """One branch runs: the dearest counts, for only what is masked is skipped."""
    counted = []
    for branch in branches:
        counts = Counts()
        _walk(branch.jaxpr, times, counts, kernel)
        counted.append(counts)
    total.add(max(counted, key=lambda c: sum(c.values())))


def _kernel_name(params: dict[str, Any]) -> str:
    info = params.get("name_and_src_info")
    return getattr(info, "name", None) or params.get("name") or "kernel"


def _inner(params: dict[str, Any]) -> list[Any]:
    """Jaxprs among an equation's parameters; a custom gradient's rules are not part of it."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jax_core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, jax_core.Jaxpr):
                found.append(item)
    return found


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution(equation: Any) -> float:
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    out_features = kernel[numbers.rhs_spec[0]]
    per_output = math.prod(kernel) / max(1, out_features)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output
