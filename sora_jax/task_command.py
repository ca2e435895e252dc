"""What `sora-jax sample` does beside text to video: one task of its arguments, one video."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import video_io
from sora_jax.generate import lengths, tasks, trained
from sora_jax.generate.denoise import OnStep
from sora_jax.generate.refine import refine
from sora_jax.generate.video import Film, Video
from sora_jax.task_arguments import asked, flag

__all__ = ["asked", "check", "make", "parse_size", "read_mask", "save"]


def check(pipe, task: str) -> None:
    """Raises ValueError, before any weights are read, for a task that `pipe` cannot do."""
    needed = {"keyframe": "keyframes", "join": "middle", "loop": "middle", "inpaint": "box"}
    if mask := (needed | {"outpaint": "border"}).get(task):
        trained.check(pipe, mask)


def make(
    pipe, task: str, args: Namespace, prompt: str, settings: dict[str, Any], on_step: OnStep
) -> Video | Film:
    """The task's video, or a film whose frames are made while it is saved.

    Args:
      settings: of any video, as `Pipeline.request` takes them.

    Raises:
      ValueError: one line: what was given, what is allowed, what to change.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    given |= {"seed": args.seed or 0, "on_step": on_step}
    clip = _Reader(pipe, args, given)
    if args.window is not None:
        given["window"] = args.window
    if args.strength is not None:
        given["strength"] = args.strength
    seconds = {} if args.seconds is None else {"seconds": args.seconds}
    if task == "keyframe":
        return tasks.keyframes(pipe, prompt, _keyframes(args.keyframe), **given)
    if task == "extend":
        direction = args.extend
        return tasks.extend(pipe, prompt, clip(args.video), direction=direction, **seconds, **given)
    if task == "loop":
        shown = None if args.video is None else clip(args.video)
        return tasks.loop(pipe, prompt, shown, **seconds, **given)
    if task == "join":
        return tasks.join(pipe, prompt, *map(clip, args.join), **seconds, **given)
    if task == "edit":
        return tasks.edit(pipe, prompt, clip(args.edit), **given)
    if task == "inpaint":
        shown = clip(args.inpaint)
        hole = read_mask(args.mask, shown, clip)
        return tasks.inpaint(pipe, prompt, shown, hole, **given)
    if task == "outpaint":
        size = parse_size(args.outpaint, name="outpaint")
        given.pop("size", None)
        return tasks.outpaint(pipe, prompt, clip(args.video, own_size=True), size=size, **given)
    if task == "interpolate":
        shown = clip(args.video)
        return tasks.interpolate(pipe, prompt, shown, times=args.interpolate, **given)
    if task == "refine":
        shown = clip(args.video, own_size=True)
        return refine(pipe, prompt, shown, scale=args.refine, **given)
    frames = given.pop("frames", None)
    if frames is not None:
        raise ValueError(f"--frames {frames} and --seconds {args.seconds:g}: give one of them.")
    image = None if args.image is None else clip(args.image)[0]
    total = lengths.seconds_to_frames(pipe, args.seconds, given.get("fps"))
    how = {"joint": bool(args.joint), "rolling": bool(args.rolling)}
    return tasks.long(pipe, prompt, frames=total, image=image, **how, **given)


def save(made: Video | Film, out: Path, *, sheet: bool) -> Path:
    """Writes a video, or a film as it is made."""
    written = made.save(out)
    if sheet:
        frames = made.frames if isinstance(made, Video) else video_io.read_video(out).frames
        picture = video_io.contact_sheet(
            [frames], columns=min(9, len(frames)), labels=[made.metadata["prompt"]]
        )
        video_io.save_image(out.with_name(f"{out.stem}_sheet.png"), picture)
    return written


class _Reader:
    """Clips of files at the rate and size of the video that is made."""

    def __init__(self, pipe, args: Namespace, given: dict[str, Any]):
        self.fps = given.get("fps") or pipe.sampling.fps
        self.size = given.get("size") or (pipe.sampling.width, pipe.sampling.height)
        self.fit = video_io.pad if args.fit == "pad" else video_io.fit

    def __call__(self, path: str, *, own_size: bool = False) -> np.ndarray:
        frames = video_io.read_video(path, fps=self.fps).frames
        if own_size:
            return frames
        return np.stack([self.fit(frame, self.size[::-1]) for frame in frames])


def _keyframes(texts: list[str]) -> dict[int, np.ndarray]:
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
        pictures[int(frame)] = video_io.read_video(path, num_frames=1).frames[0]
    return pictures


def read_mask(text: str, clip: np.ndarray, reader: Callable) -> np.ndarray:
    """What is to be made anew (H, W) or (F, H, W): white in a file, or a box "x,y,w,h" in pixels.

    Raises:
      ValueError: a box outside the video, or a file of another size or length.
    """
    height, width = clip.shape[1:3]
    numbers = text.split(",")
    if len(numbers) == 4 and all(n.strip().isdigit() for n in numbers):
        x, y, w, h = map(int, numbers)
        if not (w and h and x + w <= width and y + h <= height):
            raise ValueError(
                f"--mask {text}: a box of x,y,w,h must lie within the video's {width}x{height}."
            )
        hole = np.zeros((height, width), bool)
        hole[y : y + h, x : x + w] = True
        return hole
    frames = reader(text, own_size=True)
    hole = frames.mean(axis=-1) > 127
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
