"""How many frames a clip, a window and a film have."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax import agreement
from sora_jax.dit.patchify import check_frames
from sora_jax.generate import memory
from sora_jax.generate.request import pixels

MOST_SECONDS = 3600.0


def whole(pipe, frames: int) -> int:
    """The most frames, of `frames`, that the VAE takes: 1 + a multiple of its temporal factor."""
    step = pipe.vae.config.scale_factor_temporal
    return 1 + (frames - 1) // step * step


def held(pipe, clip: UInt8[np.ndarray, "F H W 3"]) -> UInt8[np.ndarray, "G H W 3"]:
    """`clip` with its last frame held until the VAE takes it."""
    rest = -(len(clip) - 1) % pipe.vae.config.scale_factor_temporal
    return np.concatenate([clip, np.repeat(clip[-1:], rest, axis=0)])


def overlap_of(pipe, window: int) -> int:
    """Frames that a window takes over by default: half of it."""
    return whole(pipe, (window + 1) // 2)


def window_of(
    pipe,
    frames: int | None = None,
    *,
    window: int | None = None,
    settings: Mapping[str, Any] = {},
) -> int:
    """Frames of a window: as asked, or what the checkpoint was trained on, or what memory holds.

    Of several processes all call it, and get the same.

    Args:
      frames: of the film, where it may be shorter.
      window: what is asked for; None leaves it to checkpoint and memory.
      settings: the film's, for its size, and for whether keys and values are kept.

    Raises:
      ValueError: a window that the model does not take, or too short to move over the film.
    """
    if window is None:
        window = _fitting(pipe, frames, settings)
    check_frames(window, step=pipe.cell[0], name="window")
    if frames is None:
        return window
    if frames > window:
        check_window(window, least=1 + pipe.vae.config.scale_factor_temporal, to="move forward")
    return min(window, frames)


def check_window(window: int, *, least: int, to: str) -> None:
    """Raises ValueError for a window of less than `least` frames; `to` says what they are for."""
    if window < least:
        raise ValueError(f"window {window} is too short to {to}; use at least {least}.")


def _fitting(pipe, frames: int | None, settings: Mapping[str, Any]) -> int:
    trained = pipe.sampling.frames
    most = trained if frames is None else min(frames, trained)
    width, height = size_of(pipe, settings)
    cells = (height // pipe.cell[1]) * (width // pipe.cell[2])
    each = memory.window_bytes(pipe.dit.config, cells, mesh=pipe.mesh)
    if settings.get("kv_cache") not in (None, 1):  # as if all were given, as nearly all may be
        each += memory.kept_bytes(pipe.dit.config, cells, mesh=pipe.mesh)
    return memory.fitting(
        most,
        temporal=pipe.vae.config.scale_factor_temporal,
        per_latent_frame=each,
        # All run the same program, and beside the weights.
        free=min(agreement.gather(memory.free_bytes() - pipe.unread_bytes())),
    )


def size_of(pipe, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height that `settings` ask for, by default the checkpoint's."""
    size = settings.get("size")
    return (pipe.sampling.width, pipe.sampling.height) if size is None else pixels(size)


def check_seconds(seconds: float | int) -> None:
    """Raises ValueError for no time, or for more than an hour."""
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError(
            f"seconds {seconds:g} is out of range; use more than 0, at most {MOST_SECONDS:g}."
        )


def seconds_to_frames(pipe, seconds: float | int, fps: float | None = None) -> int:
    """Frames of a film of about `seconds`, its first frame one more.

    Raises:
      ValueError: no time, or too much.
    """
    check_seconds(seconds)
    step = pipe.vae.config.scale_factor_temporal
    return 1 + max(1, round(seconds * (fps or pipe.sampling.fps) / step)) * step
