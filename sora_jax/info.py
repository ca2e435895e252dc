"""What `sora-jax info` shows: devices, versions, and what a checkpoint costs to run."""

import importlib.metadata
import platform

import jax
from rich.console import Console
from rich.table import Table

import sora_jax
from sora_jax.dit.flops import flops

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")


def show(checkpoint: str, *, size: tuple[int, int] | None, frames: int | None) -> None:
    """Prints the tables.

    Raises:
      ValueError: no such checkpoint, or a size that it cannot make.
    """
    pipe = sora_jax.load(checkpoint, weights=False)
    request = pipe.request("cost", size=size, frames=frames)
    console = Console()
    for table in (_versions(), _parts(pipe), _costs(pipe, request)):
        console.print(table)


def _versions() -> Table:
    table = Table(title="this machine", show_header=False)
    devices = jax.devices()
    table.add_row("devices", f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})")
    table.add_row("python", platform.python_version())
    table.add_row("sora_jax", sora_jax.__version__)
    for name in PACKAGES:
        table.add_row(name, importlib.metadata.version(name))
    return table


def _count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _parts(pipe) -> Table:
    table = Table(title=f"{pipe.info['checkpoint']} ({pipe.info['checkpoint_sha256']})")
    table.add_column("module")
    table.add_column("parameters", justify="right")
    parts = [("text", pipe.text), ("dit", pipe.dit), ("vae", pipe.vae)]
    parts += [("dit_2", part) for part in pipe.experts.parts[1:]]
    parts += [] if pipe.image is None else [("image", pipe.image)]
    for name, part in parts:
        table.add_row(name, f"{_count(part.abstract):,}", style="bold")
        for child in part.abstract:
            table.add_row(f"  {name}.{child}", f"{_count(part.abstract[child]):,}")
    return table


def _costs(pipe, request) -> Table:
    latents = pipe.latent_shape(request)
    tokens = pipe.num_tokens(request)
    cost = flops(
        pipe.dit.config,
        tokens=tokens,
        text_tokens=pipe.sampling.text_tokens,
        image_rows=pipe.image_rows,
    )
    forwards = pipe.denoise.forwards(request)
    table = Table(
        title=f"{request.width}x{request.height}, {request.frames} frames, {request.steps} steps",
        show_header=False,
    )
    table.add_row("latents (f h w c)", " x ".join(map(str, latents)))
    table.add_row("video tokens", f"{tokens:,}")
    for name, value in cost._asdict().items():
        table.add_row(f"forward, {name.replace('_', ' ')}", f"{value / 1e9:,.3f} GFLOP")
    table.add_row("forward, in all", f"{cost.total / 1e9:,.3f} GFLOP")
    table.add_row(f"denoising, {forwards} forwards", f"{cost.total * forwards / 1e12:,.3f} TFLOP")
    return table
