"""Latents to patch tokens and exactly back; no parameters.

A token holds its patch in the order (frame, row, column, channel) of Wan's unpatchify.
"""

import math

import einops
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sora_jax import types

PatchSize = tuple[int, int, int]


def grid(frames: int, height: int, width: int, *, patch_size: PatchSize) -> tuple[int, int, int]:
    """Tokens along time, height and width of latents of that size.

    Raises:
      ValueError: if the patches do not tile the latents; names the nearest sizes that do.
    """
    sizes = (frames, height, width)
    if any(size < 1 or size % p for size, p in zip(sizes, patch_size, strict=True)):
        below = tuple(max(size // p, 1) * p for size, p in zip(sizes, patch_size, strict=True))
        above = tuple(-(-size // p) * p for size, p in zip(sizes, patch_size, strict=True))
        raise ValueError(
            f"latents of {sizes} (frames, height, width) are not tiled by patches of "
            f"{tuple(patch_size)}; the nearest sizes that are: {below} and {above}."
        )
    return tuple(size // p for size, p in zip(sizes, patch_size, strict=True))


def check_pixels(frames: int, height: int, width: int, *, cell: tuple[int, int, int]) -> None:
    """Raises ValueError, naming the nearest that do, unless whole tokens fill a video.

    Args:
      cell: frames, height and width in pixels that one token stands for; the first frame of a
        video stands for as many.
    """
    for name, value, step in (("width", width, cell[2]), ("height", height, cell[1])):
        if value < step or value % step:
            raise ValueError(
                f"size {width}x{height}: {name} {value} is not a multiple of {step}; use "
                f"{_nearest(value, step)}."
            )
    check_frames(frames, step=cell[0])


def check_frames(frames: int, *, step: int, name: str = "frames") -> None:
    """Raises ValueError, naming the nearest that are, unless `frames` is 1 + a multiple of `step`.

    Args:
      name: what the message calls them.
    """
    if frames < 1 or (frames - 1) % step:
        raise ValueError(
            f"{name} {frames} is not 1 + a multiple of {step}; use "
            f"{_nearest(frames, step, offset=1)}."
        )


def _nearest(value: int, step: int, *, offset: int = 0) -> str:
    """The allowed values `offset + k * step` next to `value`, as words."""
    first = offset if offset else step
    below = offset + (value - offset) // step * step
    if below < first:
        return str(first)
    return f"{below} or {below + step}"


def patchify(latents: types.Latents, patch_size: PatchSize) -> Float[Array, "b n p"]:
    """One token per patch, in raster order (time, height, width).

    Raises:
      ValueError: if the patches do not tile the latents.
    """
    grid(*latents.shape[1:4], patch_size=patch_size)
    pt, ph, pw = patch_size
    return einops.rearrange(
        latents, "b (f i) (h j) (w k) c -> b (f h w) (i j k c)", i=pt, j=ph, k=pw
    )


def unpatchify(
    tokens: Float[Array, "b n p"], patch_size: PatchSize, *, grid: tuple[int, int, int]
) -> types.Latents:
    """Exact inverse of `patchify`; `grid` is the number of patches (time, height, width)."""
    (f, h, w), (pt, ph, pw) = grid, patch_size
    return einops.rearrange(
        tokens, "b (f h w) (i j k c) -> b (f i) (h j) (w k) c", f=f, h=h, w=w, i=pt, j=ph, k=pw
    )


def beside(
    x: Float[Array, "b n p"], others: Float[Array, "b n q"], patch_size: PatchSize
) -> Float[Array, "b n r"]:
    """Tokens of latents with further channels, from those of both: a patch's channels come last."""
    patches = math.prod(patch_size)
    parts = [tokens.reshape(*tokens.shape[:2], patches, -1) for tokens in (x, others)]
    return jnp.concatenate(parts, axis=-1).reshape(*x.shape[:2], -1)


def spread(
    values: Shaped[Array, "b f_grid h_grid w_grid"], patch_size: PatchSize
) -> Shaped[Array, "b f h w"]:
    """The value of each token at each of its latent positions."""
    for axis, size in enumerate(patch_size, start=1):
        values = jnp.repeat(values, size, axis=axis)
    return values


def positions(f: int, h: int, w: int) -> Int[Array, "n 3"]:
    """(time, row, column) of every token of an f x h x w grid of patches, in raster order."""
    axes = jnp.meshgrid(jnp.arange(f), jnp.arange(h), jnp.arange(w), indexing="ij")
    return jnp.stack([axis.reshape(-1) for axis in axes], axis=-1).astype(jnp.int32)
