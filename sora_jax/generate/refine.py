"""Third stage: a video enlarged, noised a little, and drawn again tile by tile."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax.generate import given_kv, lengths, tasks, texts
from sora_jax.generate.conditions import Tiles
from sora_jax.generate.denoise import OnStep, Start, check_strength
from sora_jax.generate.video import Video, array_hash, to_bytes
from sora_jax.prompts import timed

STRENGTH = 0.1  # of the noise: more moves away from what was given (docs/tasks.md)
MOST_SCALE = 8
SHARPEN = 1.5  # times what a blur takes away
SHARPEN_WIDTH = 0.75  # of that blur, standard deviation in pixels of what is enlarged


def enlarged(
    clip: UInt8[np.ndarray, "F H W 3"],
    *,
    scale: float | int,
    multiple: tuple[int, int],
    sharpen: bool = True,
) -> UInt8[np.ndarray, "F2 H2 W2 3"]:
    """`clip` at `scale` times its size by cubic interpolation, its sides cut to multiples.

    Cubic interpolation spreads an edge over `scale` pixels. Where it is sharpened, an unsharp mask
    of that width takes it back, and no value leaves the range of the pixels around it in `clip`, so
    that no halo appears.
    """
    import cv2

    rows, columns = (round(side * scale) for side in clip.shape[1:3])
    size, around = (columns, rows), np.ones((3, 3), np.uint8)

    def one(frame: np.ndarray) -> np.ndarray:
        large = cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)
        if not sharpen:
            return large
        large = large.astype(np.float32)
        mask = large - cv2.GaussianBlur(large, (0, 0), SHARPEN_WIDTH * scale)
        least, most = (
            cv2.resize(extreme(frame, around), size, interpolation=cv2.INTER_NEAREST)
            for extreme in (cv2.erode, cv2.dilate)
        )
        return np.clip(large + SHARPEN * mask, least, most).round().astype(np.uint8)

    height, width = (n // m * m for n, m in zip((rows, columns), multiple, strict=True))
    top, left = (rows - height) // 2, (columns - width) // 2
    return np.stack([one(frame) for frame in clip])[:, top : top + height, left : left + width]


def refine(
    pipe,
    prompt: str,
    clip: UInt8[np.ndarray, "_ _ _ 3"],
    *,
    scale: float | int = 2.0,
    strength: float | int = STRENGTH,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Video:
    """`clip` at `scale` times its size, with the edges of a video of that size.

    The transformer works on tiles of what it was trained on, half of each shared, in space and
    time, so that any size is as much memory as one tile.

    Raises:
      ValueError: a scale that enlarges nothing, or a strength outside (0, 1].
    """
    if not 1 < scale <= MOST_SCALE:
        raise ValueError(f"scale {scale:g} is out of range; use more than 1, at most {MOST_SCALE}.")
    check_strength(strength)
    held = lengths.held(pipe, clip)
    draft = enlarged(held, scale=scale, multiple=pipe.cell[1:])
    rows, columns = draft.shape[1:3]
    if not rows or not columns:
        raise ValueError(
            f"the video is {clip.shape[2]}x{clip.shape[1]}; {scale:g} times that is less than a "
            f"token of {pipe.cell[2]}x{pipe.cell[1]}."
        )
    settings = settings | {"size": (columns, rows), "frames": len(held)}
    request = pipe.request(prompt, **settings)
    given_kv.check(request, tiles=True)
    words = timed.change(prompt, pipe.sampling.refine_prefix.__add__)
    part = min(len(held), pipe.sampling.frames)
    if part < len(held) and timed.is_timed(prompt):
        raise ValueError(
            f"time-stamped prompts are for one window: refine sees {part} of {len(held)} frames at "
            "once; write a prompt without stamps, or refine shorter videos."
        )
    trained = pipe.request(words, **(settings | {"size": None, "frames": part}))
    request = dataclasses.replace(request, shift=trained.shift)
    tile = pipe.latent_shape(trained)[:3]
    start = Start(pipe.encode(draft[None]), strength)
    latents = pipe.denoise(
        pipe.noise([request]),
        request,
        texts.embed(pipe, [trained]),
        pipe.conditions(request),
        start=start,
        tiles=Tiles(tile, tuple(size // 2 for size in tile)),
        on_step=on_step,
    )
    # What the VAE loses of the draft it loses of the refined as well: the change alone counts.
    change = pipe.decode(latents)[0] - pipe.decode(start.latents)[0]
    frames = to_bytes(draft / 127.5 - 1 + change)[: len(clip)]
    task = {"name": "refine", "clip": array_hash(clip), "scale": scale, "strength": strength}
    return tasks.video_of(pipe, request, frames, task)
