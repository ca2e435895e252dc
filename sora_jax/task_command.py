"""What `sora-jax sample` does beside text to video: one task of its arguments, one video."""

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import video_io
from sora_jax.generate import conditions, lengths, tasks, trained
from sora_jax.generate.denoise import check_strength
from sora_jax.generate.refine import refine
from sora_jax.generate.request import MAX_FPS
from sora_jax.generate.video import Film, Video, sheet_path
from sora_jax.task_arguments import asked, flag

__all__ = ["asked", "check", "parse_size", "prepare", "read_mask", "save"]


def check(pipe, task: str, args: Namespace) -> None:
    """Raises ValueError, before any weights are read, for a task that `pipe` cannot do."""
    anew = task in ("edit", "refine") or (task == "interpolate" and args.strength)
    if pipe.way == "channels" and (anew or (task == "seconds" and args.image is None)):
        raise ValueError(f"{flag(task)}: {conditions.NEEDS_PICTURE}")
    needed = {"keyframe": "keyframes", "join": "middle", "loop": "middle", "inpaint": "box"}
    if mask := (needed | {"outpaint": "border"}).get(task):
        trained.check(pipe, mask)


def prepare(
    pipe, task: str, args: Namespace, prompt: str, settings: dict[str, Any]
) -> Callable[..., Video | Film]:
    """Reads what the task is given; returns what makes its video, called with `on_step`.

    It needs no weights yet, so that a file that cannot be read is told before they are loaded. Of
    a film the frames are made while it is saved.

    Args:
      settings: of any video, as `Pipeline.request` takes them.

    Raises:
      ValueError: one line: what was given, what is allowed, what to change.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    given["seed"] = args.seed or 0
    read = _Reader(pipe, args, given)
    if task != "interpolate":
        video_io.check_rate(args.out, read.fps)
    if args.window is not None:
        given["window"] = args.window
    if args.strength is not None:
        if task != "interpolate" or args.strength:  # which draws nothing anew unless it is told
            check_strength(args.strength)
        given["strength"] = args.strength
    seconds = {} if args.seconds is None else {"seconds": args.seconds}
    if args.seconds is not None:
        lengths.check_seconds(args.seconds)

    def of(function: Callable[..., Video | Film], *inputs: Any, **more: Any):
        return functools.partial(function, pipe, prompt, *inputs, **(given | more))

    if task == "keyframe":
        return of(tasks.keyframes, _keyframes(args.keyframe, read))
    if task == "extend":
        return of(tasks.extend, read(args.video), direction=args.extend, **seconds)
    if task == "loop":
        return of(tasks.loop, None if args.video is None else read(args.video), **seconds)
    if task == "join":
        return of(tasks.join, *map(read, args.join), **seconds)
    if task == "edit":
        return of(tasks.edit, read(args.edit))
    if task == "inpaint":
        return of(tasks.inpaint, read(args.inpaint), read_mask(args.mask, args.inpaint, read))
    if task == "outpaint":
        size = parse_size(args.outpaint, name="outpaint")
        return of(tasks.outpaint, read.as_it_is(args.video), size=size)
    if task == "interpolate":
        # At the file's own rate: what is asked for are frames between its frames.
        fps = args.fps or video_io.probe(args.video).fps or read.fps
        if fps * max(args.interpolate, 0) > MAX_FPS:
            raise ValueError(
                f"--interpolate {args.interpolate} of {fps:g} frames a second is more than "
                f"{MAX_FPS}; use less, or read the video at a lower --fps."
            )
        video_io.check_rate(args.out, fps * max(args.interpolate, 1))
        return of(tasks.interpolate, read(args.video, fps=fps), times=args.interpolate, fps=fps)
    if task == "refine":
        return of(refine, read.as_it_is(args.video), scale=args.refine)
    if (frames := given.pop("frames", None)) is not None:
        raise ValueError(f"--frames {frames} and --seconds {args.seconds:g}: give one of them.")
    image = None if args.image is None else read(args.image)[0]
    total = lengths.seconds_to_frames(pipe, args.seconds, given.get("fps"))
    how = {"joint": bool(args.joint), "rolling": bool(args.rolling)}
    return of(tasks.long, frames=total, image=image, **how)


def save(made: Video | Film, out: Path, *, sheet: bool) -> Path:
    """Writes a video, or a film as it is made."""
    written = made.save(out)
    if sheet:
        frames = made.frames if isinstance(made, Video) else video_io.read_video(out).frames
        picture = video_io.contact_sheet(
            [frames], columns=min(9, len(frames)), labels=[made.metadata["prompt"]]
        )
        video_io.save_image(sheet_path(out), picture)
    return written


class _Reader:
    """Clips of files at the rate and size of the video that is made."""

    def __init__(self, pipe, args: Namespace, given: dict[str, Any]):
        self.fps = given.get("fps") or pipe.sampling.fps
        self.size = given.get("size") or (pipe.sampling.width, pipe.sampling.height)
        self._fit = video_io.pad if args.fit == "pad" else video_io.fit

    def __call__(self, path: str, *, fps: float | None = None) -> np.ndarray:
        return np.stack([self.fit(frame) for frame in self.as_it_is(path, fps=fps)])

    def fit(self, frame: np.ndarray) -> np.ndarray:
        return self._fit(frame, self.size[::-1])

    def as_it_is(self, path: str, *, fps: float | None = None) -> np.ndarray:
        """At its own size."""
        return video_io.read_video(path, fps=fps or self.fps).frames


def _keyframes(texts: list[str], read: _Reader) -> dict[int, np.ndarray]:
    """{frame: picture} of "FRAME:FILE" each.

    Raises:
      ValueError: another form, a frame given twice, or a file that is no picture.
    """
    pictures: dict[int, np.ndarray] = {}
    for text in texts:
        frame, colon, path = text.partition(":")
        frame = "-1" if frame == "last" else frame
        if not (colon and path and frame.strip().lstrip("-").isdigit()):
            raise ValueError(f"--keyframe {text}: write FRAME:FILE, such as 8:a.png or last:b.png.")
        if int(frame) in pictures:
            raise ValueError(f"--keyframe {frame} is given twice; give each frame once.")
        pictures[int(frame)] = read.fit(video_io.read_video(path, num_frames=1).frames[0])
    return pictures


def read_mask(text: str, video: str, read: _Reader) -> np.ndarray:
    """What is to be made anew (H, W) or (F, H, W): white in a file, or a box "x,y,w,h" in pixels.

    A box lies in the video that is made. A file has the size of that, or of the file `video`, with
    which it is then cut or padded.

    Raises:
      ValueError: a box outside the video, a file of another size, or all or nothing marked.
    """
    width, height = read.size
    numbers = text.split(",")
    if len(numbers) == 4 and all(n.strip().isdigit() for n in numbers):
        x, y, w, h = map(int, numbers)
        if not (w and h and x + w <= width and y + h <= height):
            raise ValueError(
                f"--mask {text}: a box of x,y,w,h must lie within the video's {width}x{height}."
            )
        hole = np.zeros((height, width), bool)
        hole[y : y + h, x : x + w] = True
        tasks.check_hole(hole, name=f"--mask {text}")
        return hole
    if "," in text and not Path(text).exists():
        raise ValueError(
            f"--mask {text}: no file, and no box; write x,y,w,h as four whole numbers from 0 on."
        )
    frames, own = read.as_it_is(text), video_io.probe(video)
    size = frames.shape[2], frames.shape[1]
    if size not in (read.size, (own.width, own.height)):
        made = f", or of {width}x{height}, as it is made"
        raise ValueError(
            f"--mask {text} is {size[0]}x{size[1]}; give one of {own.width}x{own.height}, as "
            f"{video} is{'' if (own.width, own.height) == read.size else made}."
        )
    hole = np.stack([read.fit(frame) for frame in frames]).mean(axis=-1) > 127
    tasks.check_hole(hole, name=f"--mask {text}")
    return hole[0] if len(hole) == 1 else hole


def parse_size(text: str, *, name: str = "size") -> tuple[int, int]:
    """(width, height) of "WxH".

    Raises:
      ValueError: for anything else.
    """
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise ValueError(f"{flag(name)} {text}: write width x height in pixels, for example 64x64.")
    return int(width), int(height)
