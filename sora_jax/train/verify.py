"""Compares two checkpoints tensor by tensor: training runs or inference weights in any layout."""

from pathlib import Path

import sora_jax
from sora_jax.convert import rewrite
from sora_jax.convert.rewrite import Difference, Tensors
from sora_jax.train.export import run_parts

SHOWN = 10  # differences that are listed


def verify(a: str | Path, b: str | Path, *, weights: str = "ema") -> tuple[int, list[Difference]]:
    """(tensors compared, differences) of two checkpoints; `weights` picks those of runs.

    Raises:
      ValueError: one of them cannot be read.
    """
    return rewrite.compare(*(_parts(path, weights) for path in (a, b)))


def _parts(path: str | Path, weights: str) -> dict[str, Tensors]:
    path = sora_jax.checkpoint_path(path)
    if not (path / "checkpoints").is_dir():
        return rewrite.parts_of(path)
    return run_parts(path, weights, statistics=False)[0]


def report(a: str, b: str, *, weights: str = "ema") -> None:
    """Prints how many tensors are equal.

    Raises:
      ValueError: in one line, where any differ; the first ten are named.
    """
    count, differences = verify(a, b, weights=weights)
    if differences:
        rows = "; ".join(f"{d.key}: {d.what}" for d in differences[:SHOWN])
        more = "; ..." if len(differences) > SHOWN else ""
        raise ValueError(f"{a} and {b}: {len(differences)} of {count} differ: {rows}{more}")
    print(f"all {count} tensors are equal")
