"""Open, JAX-native Sora: text-to-video diffusion transformers, from data to MP4.

`pipe = sora_jax.load("paperworld")`, then `pipe("a red ball rolls left").save("ball.mp4")`.
"""

from collections.abc import Sequence
from pathlib import Path

__version__ = "0.1.0"
__all__ = ["DTYPES", "checkpoint_path", "load", "weights_folder"]
DTYPES = ("float32", "bfloat16")
_SHIPPED = Path(__file__).parent / "weights"


def _is_shipped(name: str) -> bool:
    return "/" not in name and (_SHIPPED / name / "model_index.json").is_file()


def weights_folder(name: str = "paperworld") -> Path:
    """The folder of shipped weights called `name`, `name` itself, or that of a hub id.

    The first of these that there is: a folder here called as shipped weights are is `./name`.

    Raises:
      ValueError: none of these.
    """
    from sora_jax import video_io
    from sora_jax.convert import hub

    video_io.check_name(name)
    if _is_shipped(name):
        return _SHIPPED / name
    if Path(name).is_dir():
        return Path(name)
    if hub.is_hub_id(name):
        return hub.download(name)
    known = sorted(p.name for p in _SHIPPED.iterdir() if p.is_dir()) if _SHIPPED.is_dir() else []
    raise ValueError(
        f"checkpoint {name!r} is neither a folder nor shipped weights; give a folder, a hub id "
        f"(organisation/name), or one of: {', '.join(known)}."
    )


def checkpoint_path(name: str | Path) -> Path:
    """Shipped weights, a path that exists (a run, a folder or file of weights), or a hub id's.

    Raises:
      ValueError: none of these.
    """
    exists = Path(name).exists() and not _is_shipped(str(name))
    return Path(name) if exists else weights_folder(str(name))


def load(
    checkpoint: str | Path = "paperworld",
    *,
    loras: Sequence[str] = (),
    loras_2: Sequence[str] = (),
    dtype: str = "float32",
    mesh: str = "none",
    weights: bool = True,
):
    """A `sora_jax.generate.Pipeline` from shipped weights by name, or from a folder.

    Args:
      loras: LoRA files to merge, each "FILE" or "FILE:SCALE".
      loras_2: the same, into the second of two transformers (Wan 2.2 A14B: that for low noise).
      dtype: "float32", or "bfloat16" for half the memory and the matrix units of TPUs and GPUs.
      mesh: "none" (one device), "auto" (all accelerators) or sizes such as "tensor=4,context=2".
      weights: False reads them when the first video is made, or at `load_weights()`.

    Raises:
      ValueError: naming what is missing or damaged.
    """
    from flax import nnx

    from sora_jax.convert.lora import LoRA
    from sora_jax.generate import load_pipeline

    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    first, second = ([LoRA.parse(text) for text in texts] for texts in (loras, loras_2))
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; use {' or '.join(DTYPES)}.")
    return load_pipeline(
        weights_folder(str(checkpoint)),
        loras=first,
        loras_2=second,
        dtype=dtype,
        mesh=mesh,
        weights=weights,
    )
