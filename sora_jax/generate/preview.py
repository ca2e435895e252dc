"""A video while it is made: now and then what it heads for, decoded into a file."""

from pathlib import Path

import jax

from sora_jax import video_io
from sora_jax.generate.denoise import Moment, OnStep
from sora_jax.generate.video import to_bytes

SUFFIXES = (".png", ".webp")
TIMES = 8  # a video, spread over its steps


class Preview:
    """An `OnStep` that shows the first of the videos that are denoised together."""

    def __init__(self, pipe, path: str | Path, *, fps: float):
        self._pipe, self._path, self._fps = pipe, Path(path), fps
        self._part: int | None = None

    def __call__(self, step: int, total: int, moment: Moment) -> None:
        part = step * TIMES // total
        if part == self._part:
            return
        self._part = part
        latents = moment.guess(self._pipe.dit.config.patch_size)[:1]
        frames = to_bytes(self._pipe.decode(latents))[0]
        if jax.process_index() != 0:
            return
        video_io.write_video(self._path, frames, fps=self._fps)


def check_preview(path: str | Path, *, out: Path) -> None:
    """Raises ValueError for a file that no preview can be written to, or the video's own."""
    if video_io.check_output_path(path, allowed=SUFFIXES).absolute() == out.absolute():
        raise ValueError(f"the preview and the video are both {path}; give another name.")


def watched(pipe, path: str | Path | None, on_step: OnStep, *, fps: float | None = None) -> OnStep:
    """`on_step`, and a preview in the file `path`, if there is one."""
    if path is None:
        return on_step
    preview = Preview(pipe, path, fps=fps or pipe.sampling.fps)

    def both(step: int, total: int, moment: Moment) -> None:
        on_step(step, total, moment)
        preview(step, total, moment)

    return both
