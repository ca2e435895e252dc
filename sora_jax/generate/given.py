"""From pictures and canvases to what the transformer sees of them (`conditions.py`)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from sora_jax.generate import canvas as canvas_of
from sora_jax.generate import conditions
from sora_jax.generate.canvas import Canvas
from sora_jax.generate.conditions import Conditions, Picture
from sora_jax.generate.request import Request
from sora_jax.image import clip


def conditions_of(
    pipe,
    request: Request,
    pictures: Sequence[Picture | None],
    canvases: Sequence[Canvas] | None,
    *,
    count: int,
) -> Conditions:
    """What `Pipeline.conditions` says."""
    if canvases is not None:
        return _frames(pipe, canvases) if pipe.way == "channels" else _tokens(pipe, canvases)
    if pictures[0] is None:
        if pipe.way == "channels":
            raise ValueError(conditions.NEEDS_PICTURE)
        return Conditions()
    shown = {frame: p for frame, p in zip((0, -1), pictures, strict=True) if p is not None}
    canvas = canvas_of.of_pictures(
        {frame % request.frames: picture for frame, picture in shown.items()},
        request.frames,
        size=(request.width, request.height),
    )
    given = _frames(pipe, [canvas], pictures=[p for p in pictures if p is not None])
    return Conditions(*(None if c is None else jnp.repeat(c, count, axis=0) for c in given))


def _frames(
    pipe, canvases: Sequence[Canvas], pictures: Sequence[Picture] | None = None
) -> Conditions:
    """Masks of the frames that are given, latents of videos that show them and are grey
    elsewhere, and what an image encoder sees of the first one, or of the first and last.

    Args:
      pictures: for the image encoder, as they were before they were cut to the video's shape.

    Raises:
      ValueError: nothing, or parts of frames, for a model that goes on from whole ones.
    """
    known = np.stack([canvas.known.all(axis=(1, 2)) for canvas in canvases])
    some = np.stack([canvas.known.any(axis=(1, 2)) for canvas in canvases])
    count = 1 if pipe.dit.config.image_positions is None else 2
    needed = [0, -1][:count] if pipe.dit.config.image_dim is not None else []
    if (some & ~known).any() or not known[:, needed].all():
        ends = "frames, the first and the last among them" if count == 2 else "frames"
        ends = "frames, the first among them" if len(needed) == 1 else ends
        raise ValueError(f"this model goes on from whole {ends}; give these, or use another.")
    frames = np.stack([canvas_of.to_unit(canvas.frames) for canvas in canvases])
    latents = pipe.encode_unit(np.where(known[..., None, None, None], frames, np.float32(0)))
    temporal = pipe.vae.config.scale_factor_temporal
    mask = np.stack([conditions.mask_channels(k, temporal=temporal) for k in known])
    mask = np.broadcast_to(mask[:, :, None, None], (*latents.shape[:-1], temporal))
    channels, features = jnp.concatenate([jnp.asarray(mask), latents], axis=-1), None
    if needed:
        size = pipe.image.config.image_size
        shown = [pictures or [canvas.frames[at] for at in needed] for canvas in canvases]
        pixels = np.stack([clip.preprocess(p, size=size) for each in shown for p in each])
        rows = pipe.encode_pictures(pixels)
        features = rows.reshape(len(canvases), -1, rows.shape[-1])
    return Conditions(channels, features)


def _tokens(pipe, canvases: Sequence[Canvas]) -> Conditions:
    """Latents of the canvases, and which tokens of them are given."""
    temporal, (patch, height, width) = pipe.vae.config.scale_factor_temporal, pipe.cell
    cell = (patch // temporal, height, width)
    keep = np.stack([canvas_of.given_tokens(c, temporal=temporal, cell=cell) for c in canvases])
    videos = np.stack([canvas_of.filled(c) for c in canvases])
    # The encoder is causal: frames after the last that are given change nothing.
    used = np.flatnonzero(keep.any(axis=(0, 2, 3))).max(initial=0)
    frames = 1 + ((used + 1) * cell[0] - 1) * temporal
    latents = pipe.encode(videos[:, :frames])
    missing = keep.shape[1] * cell[0] - latents.shape[1]
    clean = jnp.pad(latents, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
    return Conditions(clean=clean, keep=jnp.asarray(keep))
