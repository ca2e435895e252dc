"""How many frames a model can see at once in the memory that there is, by an estimate."""

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sora_jax import sharding
from sora_jax.dit.config import DiTConfig

_MEMINFO = Path("/proc/meminfo")
SHARE = 0.8  # of free memory that a window may take
ROWS = 2  # videos of one evaluation: guidance makes two of one
_STREAMS = 8  # float32 copies of a token's residual stream alive at once: norms, q, k, v, outputs


def window_bytes(config: DiTConfig, tokens: int, *, mesh: Mesh | None = None) -> float:
    """Activations, on one device of `mesh`, of one evaluation on `ROWS` videos of `tokens` each.

    A block at a time is alive: its streams and the hidden layer of its MLP. Attention's kernels
    keep no table of pairs.
    """
    streams, hidden = _STREAMS * config.width, 2 * config.ffn_dim
    if mesh is not None:
        hidden /= mesh.shape["tensor"]  # streams are whole there
    return ROWS * tokens * 4.0 * (streams + hidden) / _shards(mesh)


def kept_bytes(config: DiTConfig, tokens: int, *, mesh: Mesh | None = None) -> float:
    """Keys and values of all blocks on one device, for `ROWS` videos of `tokens` given each."""
    heads = 1 if mesh is None else mesh.shape["tensor"]
    both = 2.0 * config.width * config.depth * jnp.dtype(config.dtype).itemsize
    return ROWS * tokens * both / (heads * _shards(mesh))


def _shards(mesh: Mesh | None) -> int:
    """Devices over which `ROWS` videos and their tokens are cut."""
    if mesh is None:
        return 1
    rows = sharding.fitted(mesh, (ROWS,), "batch")
    # Tokens are filled up to what `context` divides: `dit.heads.spare_tokens`.
    return sharding.shards_of(mesh, rows, 0) * mesh.shape[sharding.CONTEXT]


def weights_bytes(abstract: Any, *, dtype: str, mesh: Mesh | None = None) -> float:
    """Parameters of these shapes on one device of `mesh`, all of them as `dtype`."""
    leaves = jax.tree.leaves(abstract)
    shapes = [leaf.shape for leaf in leaves]
    if mesh is not None:
        placed = jax.tree.leaves(sharding.tree_shardings(abstract, mesh))
        shapes = [where.shard_shape(s) for where, s in zip(placed, shapes, strict=True)]
    return float(jnp.dtype(dtype).itemsize * sum(math.prod(shape) for shape in shapes))


def free_bytes() -> float:
    """Memory that is free on the first device; that of the machine, where devices are its CPUs."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    with contextlib.suppress(OSError):  # there is no such file but in Linux
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):  # with what caches of files would give back
                return 1024.0 * int(line.split()[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def fitting(frames: int, *, temporal: int, per_latent_frame: float, free: float) -> int:
    """The longest window of at most `frames` frames, halved until `free` bytes hold it.

    Args:
      temporal: frames in a latent frame after the first; windows are 1 + a multiple of it.
      per_latent_frame: bytes.
    """
    latents = 1 + (frames - 1) // temporal
    while latents > 2 and latents * per_latent_frame > SHARE * free:
        latents = 1 + (latents - 1) // 2
    return 1 + (latents - 1) * temporal
