"""Compares two checkpoints tensor by tensor: training runs or inference weights in any layout."""

from collections.abc import Collection
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
    parts, unknown = zip(*(_parts(path, weights) for path in (a, b)), strict=True)
    return rewrite.compare(*parts, unknown={*unknown[0], *unknown[1]})


def _parts(path: str | Path, weights: str) -> tuple[dict[str, Tensors], Collection[str]]:
    """(components, settings that they do not tell)."""
    path = sora_jax.checkpoint_path(path)
    if not (path / "checkpoints").is_dir():
        return rewrite.parts_of(path), ()
    parts, config, _ = run_parts(path, weights, statistics=False)
    return parts, rewrite.STATISTICS if config.stage == "vae" else ()


def report(a: str, b: str, *, weights: str = "ema") -> None:
    """Prints how many tensors are equal.

    Raises:
      ValueError: in one line, where any differ, or settings do; the first ten are named.
    """
    count, differences = verify(a, b, weights=weights)
    if differences:
        rows = "; ".join(f"{d.key}: {d.what}" for d in differences[:SHOWN])
        more = "; ..." if len(differences) > SHOWN else ""
        raise ValueError(
            f"{a} and {b}: {len(differences)} differences in {count} tensors: {rows}{more}"
        )
    print(f"all {count} tensors are equal, and so are the settings")
