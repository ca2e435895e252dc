"""Compares two checkpoints tensor by tensor: training runs or inference weights in any layout."""

from pathlib import Path

from sora_jax.convert import rewrite
from sora_jax.convert.rewrite import Difference, Tensors
from sora_jax.train.export import find, restore
from sora_jax.train.loop import STAGES


def verify(a: str | Path, b: str | Path, *, weights: str = "ema") -> tuple[int, list[Difference]]:
    """(tensors compared, differences) of two checkpoints; `weights` picks those of runs.

    Raises:
      ValueError: one of them cannot be read.
    """
    return rewrite.compare(*(_parts(path, weights) for path in (a, b)))


def _parts(path: str | Path, weights: str) -> dict[str, Tensors]:
    path = find(path)
    if not (path / "checkpoints").is_dir():
        return rewrite.parts_of(path)
    config, params = restore(path, weights)
    stage = STAGES[config.stage](config)
    if config.stage == "vae":
        return {"vae": rewrite.from_params("vae", stage.config, params["vae"])}
    return {
        "dit": rewrite.from_params("dit", stage.dit_config, params["dit"]),
        "text": rewrite.from_params("text", stage.text_config, params["text"]),
        "vae": rewrite.from_folder(config.vae_checkpoint, "vae"),
    }


SHOWN = 10  # differences that are listed


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
