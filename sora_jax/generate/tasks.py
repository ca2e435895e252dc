"""What Sora does beside text to video, each as a canvas and a sweep of windows over it.

Every function takes a `Pipeline`, a prompt, its inputs as uint8 arrays of any size, and the
settings of `Pipeline.request`; it returns a `Video`. Clips are at the video's own rate: reading
files at it is the command's part. What is given comes back as it was.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from sora_jax import video_io
from sora_jax.diffusion.tasks import FRAME_TIMES
from sora_jax.dit.patchify import check_frames
from sora_jax.generate import canvas as canvas_of
from sora_jax.generate import given_kv, lengths, texts, trained, windows
from sora_jax.generate import rolling as rolling_of
from sora_jax.generate.between import between
from sora_jax.generate.canvas import Canvas
from sora_jax.generate.conditions import Picture
from sora_jax.generate.denoise import OnStep, check_strength
from sora_jax.generate.request import Request
from sora_jax.generate.video import Film, Video, array_hash
from sora_jax.generate.windows import Sweep
from sora_jax.prompts import timed

# Sizes differ from clip to clip, so they go without letters.
Clip = UInt8[np.ndarray, "_ _ _ 3"]

DIRECTIONS = ("forward", "backward", "both")


def _fitted(clip: Any, size: tuple[int, int], *, name: str = "the video") -> Clip:
    """`clip` with its centre cut to `size` (width, height).

    Raises:
      ValueError: an array of another kind, or one without frames.
    """
    if isinstance(clip, Video):  # what `Pipeline` returns
        raise ValueError(f"{name} is a Video; give its .frames.")
    if not (isinstance(clip, np.ndarray) and clip.dtype == np.uint8 and clip.ndim == 4):
        raise ValueError(
            f"{name} is {getattr(clip, 'dtype', type(clip).__name__)} of shape "
            f"{getattr(clip, 'shape', None)}; give a numpy array, uint8, (F, H, W, 3), RGB."
        )
    if not len(clip):
        raise ValueError(f"{name} has no frames; give at least one.")
    return np.stack([video_io.fit(frame, size[::-1]) for frame in clip])


def video_of(pipe, request, frames: np.ndarray, task: dict[str, Any]) -> Video:
    metadata = pipe.metadata(dataclasses.replace(request, frames=len(frames)))
    return Video(
        frames=frames, fps=request.fps, metadata=metadata | {"task": task, "batch_size": 1}
    )


def _render(
    pipe,
    prompt: str,
    canvas: Canvas | None,
    task: dict[str, Any],
    *,
    draft: Clip | None = None,
    strength: float | int = 1.0,
    shown: int | None = None,
    window: int | None = None,
    overlap: int | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Video:
    """The film of a canvas (or of a draft), in one window or in several; its first `shown` frames.

    Raises:
      ValueError: as many frames as the VAE does not take, or such a window.
    """
    total = len(draft) if canvas is None else len(canvas.frames)
    pipe.request(prompt, **(settings | {"frames": total}))
    window = lengths.window_of(pipe, total, window=window, settings=settings)
    if total > window:
        trained.check(pipe, "prefix")
    settings = settings | {"frames": window}
    request = pipe.request(prompt, **settings)
    given_kv.check(request, given=canvas is not None or total > window)
    made = windows.film(
        pipe,
        lambda *_: [request],
        Sweep(total, window, lengths.overlap_of(pipe, window) if overlap is None else overlap),
        canvases=None if canvas is None else [canvas],
        drafts=None if draft is None else draft[None],
        strength=strength,
        on_step=on_step,
    )
    frames = np.concatenate(list(made), axis=1)[0, :shown]
    return video_of(pipe, request, frames, task)


def animate(pipe, prompt: str, picture: Picture, **settings: Any) -> Video:
    """A video that begins with `picture`."""
    trained.check(pipe, "first")
    return keyframes(pipe, prompt, {0: picture}, **settings)


def keyframes(pipe, prompt: str, pictures: Mapping[int, Picture], **settings: Any) -> Video:
    """A video that shows each picture at its frame; negative numbers count from the end.

    Raises:
      ValueError: a frame outside the video, or twice; none at all; a number of frames that the
        VAE does not take.
    """
    frames = settings.pop("frames", None) or pipe.sampling.frames
    placed: dict[int, Picture] = {}
    for frame, picture in pictures.items():
        at = frame + frames if frame < 0 else frame
        if at in placed:
            raise ValueError(f"keyframe {frame} is given twice; give each frame once.")
        placed[at] = picture
    if not placed:
        raise ValueError("no keyframe is given; give at least one picture.")
    ends = {0: "first"} | ({frames - 1: "last"} if frames > 1 else {})
    kinds = {ends.get(at, "keyframes") for at in placed}
    mask = "keyframes"
    if kinds <= {"first", "last"} and "first" in kinds:
        mask = "first" if kinds == {"first"} else "first_last"
    trained.check(pipe, mask)
    canvas = canvas_of.of_pictures(placed, frames, size=lengths.size_of(pipe, settings))
    hashes = {str(at): array_hash(picture) for at, picture in placed.items()}
    return _render(pipe, prompt, canvas, {"name": "keyframes", "pictures": hashes}, **settings)


def extend(
    pipe,
    prompt: str,
    clip: Clip,
    *,
    direction: str = "forward",
    seconds: float | int,
    window: int | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Video:
    """`clip` with about `seconds` more at its end, its beginning, or both.

    Time stamps count from the beginning of the video that is made.

    Raises:
      ValueError: an unknown direction, no time, a clip without frames or too short to lead to,
        or a window too short to make anything beside what it is given.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {direction!r} is unknown; use {', '.join(DIRECTIONS)}.")
    lengths.check_seconds(seconds)
    clip = _fitted(clip, lengths.size_of(pipe, settings))
    length = lengths.window_of(pipe, window=window, settings=settings)
    step = pipe.vae.config.scale_factor_temporal
    # Half a window that goes back is given, at least a latent frame, which is never the first.
    least, way = (1 + step, "forward") if direction == "forward" else (2 * step, "backward")
    least = 1 + -(-(least - 1) // step) * step
    lengths.check_window(length, least=least, to=f"extend {way}")
    request = pipe.request(prompt, **(settings | {"frames": length}))
    added = max(step, round(seconds * request.fps / step) * step)
    made, lead = clip, added if direction == "both" else 0
    whole = len(clip) + added * (2 if direction == "both" else 1)
    texts.check(pipe, prompt, frames=whole, fps=request.fps)
    if direction != "backward":
        trained.check(pipe, "prefix")
    behind = min(len(clip) // step * step, (length // 2) // step * step)
    if direction != "forward":
        trained.check(pipe, "suffix")
        if not behind:
            raise ValueError(
                f"the video has {len(clip)} frames; to lead to its beginning takes {step}."
            )
    if direction != "backward":
        known = min(lengths.whole(pipe, len(clip)), lengths.overlap_of(pipe, length))
        canvas = canvas_of.of_clip(clip[-known:], max(known + added, length), at=0)
        sweep = Sweep(
            *(len(canvas.frames), length, lengths.overlap_of(pipe, length)),
            before=lead + len(clip) - known,
        )
        film = windows.film(pipe, lambda *_: [request], sweep, canvases=[canvas], on_step=on_step)
        fresh = np.concatenate(list(film), axis=1)[0, known : known + added]
        made = np.concatenate([made, fresh])
    if direction != "forward":
        fresh = windows.before(
            pipe, [request], made[None], overlap=behind, total=added, on_step=on_step
        )[0]
        made = np.concatenate([fresh, made])
    task = {"name": "extend", "direction": direction, "clip": array_hash(clip), "added": added}
    return video_of(pipe, request, made, task)


def _check_untimed(request: Request) -> None:
    if timed.is_timed(request.prompt):
        raise ValueError("a join or a loop takes a prompt without time stamps; leave them out.")


def _gap(pipe, request, seconds: float | int) -> int:
    """Frames that a bridge of about `seconds` makes, in one window of `request`.

    Raises:
      ValueError: more than one window can bridge, or no time.
    """
    lengths.check_seconds(seconds)
    step, length = pipe.vae.config.scale_factor_temporal, request.frames
    gap = max(step, round(seconds * request.fps / step) * step)
    most = length - 1 - step
    if gap > most:
        raise ValueError(
            f"seconds {seconds:g} is {gap} frames; one window of {length} joins over at most "
            f"{most} ({most / request.fps:g} s): extend the first video before."
        )
    return gap


def bridge(
    pipe,
    prompt: str,
    first: Clip,
    second: Clip,
    *,
    seconds: float | int,
    on_step=None,
    **settings: Any,
) -> tuple[Any, Clip]:
    """The request, and about `seconds` of frames that lead from `first` to `second`.

    Of a `second` shorter than a latent frame the last frame is held, where it leads to.

    Raises:
      ValueError: more than one window can bridge, or no time; a prompt with time stamps.
    """
    trained.check(pipe, "middle")
    step, length = pipe.vae.config.scale_factor_temporal, lengths.window_of(pipe, settings=settings)
    request = pipe.request(prompt, **(settings | {"frames": length}))
    _check_untimed(request)
    gap = _gap(pipe, request, seconds)
    before = lengths.whole(pipe, min(len(first), (length - gap + 1) // 2))
    held = np.repeat(second[-1:], max(step - len(second), 0), axis=0)
    second = np.concatenate([second, held])
    after = min(length - gap - before, len(second) // step * step)
    canvas = canvas_of.blank(before + gap + after, request.height, request.width)
    canvas_of.place(canvas, first[-before:], at=0)
    canvas_of.place(canvas, second[:after], at=before + gap)
    request = pipe.request(prompt, **(settings | {"frames": len(canvas.frames)}))
    video = pipe.run([request], canvases=[canvas], on_step=on_step)[0]
    return request, video.frames[before : before + gap]


def join(
    pipe, prompt: str, first: Clip, second: Clip, *, seconds: float | int = 0.5, **settings: Any
) -> Video:
    """`first`, about `seconds` that lead over, and `second`."""
    size = lengths.size_of(pipe, settings)
    first, second = _fitted(first, size, name="A"), _fitted(second, size, name="B")
    request, gap = bridge(pipe, prompt, first, second, seconds=seconds, **settings)
    task = {"name": "join", "clips": [array_hash(first), array_hash(second)], "added": len(gap)}
    return video_of(pipe, request, np.concatenate([first, gap, second]), task)


def loop(
    pipe,
    prompt: str,
    clip: Clip | None = None,
    *,
    seconds: float | int = 0.75,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Video:
    """A video whose end leads back to its beginning: `clip`, or one made first, and a bridge."""
    trained.check(pipe, "middle")
    if clip is None:
        length = lengths.window_of(pipe, settings=settings)
        request = pipe.request(prompt, **(settings | {"frames": length}))
        _check_untimed(request)
        _gap(pipe, request, seconds)
        alone = pipe.request(prompt, **(settings | {"kv_cache": 1}))  # of which nothing is given
        clip = pipe.run([alone], on_step=on_step)[0].frames
    clip = _fitted(clip, lengths.size_of(pipe, settings))
    settings = {k: v for k, v in settings.items() if k != "frames"}
    request, gap = bridge(pipe, prompt, clip, clip, seconds=seconds, on_step=on_step, **settings)
    task = {"name": "loop", "clip": array_hash(clip), "added": len(gap)}
    return video_of(pipe, request, np.concatenate([clip, gap]), task)


def edit(pipe, prompt: str, clip: Clip, *, strength: float | int = 0.8, **settings: Any) -> Video:
    """`clip` drawn anew after `prompt` (SDEdit): the larger `strength`, the less of it stays.

    Raises:
      ValueError: a strength outside (0, 1].
    """
    check_strength(strength)
    clip = _fitted(clip, lengths.size_of(pipe, settings))
    task = {"name": "edit", "clip": array_hash(clip), "strength": strength}
    return _render(
        *(pipe, prompt, None, task),
        draft=lengths.held(pipe, clip),
        shown=len(clip),
        strength=strength,
        **settings,
    )


def check_hole(hole: Bool[np.ndarray, "*f H W"], *, name: str = "the mask") -> None:
    """Raises ValueError unless a mask marks a part of the video; `name` is the message's for it."""
    if not hole.any() or hole.all():
        raise ValueError(
            f"{name} marks {'all' if hole.any() else 'nothing'} of the video; white is made anew "
            "and black stays: give some of both."
        )


def inpaint(
    pipe,
    prompt: str,
    clip: Clip,
    hole: Bool[np.ndarray, "H W"] | Bool[np.ndarray, "F H W"],
    **settings: Any,
) -> Video:
    """`clip` with what `hole` marks made anew, in every frame or frame by frame.

    Raises:
      ValueError: a mask of another size than the clip, or one that marks nothing or all.
    """
    trained.check(pipe, "box")
    if hole.shape[-2:] != clip.shape[1:3] or (hole.ndim == 3 and len(hole) != len(clip)):
        raise ValueError(
            f"the mask is {hole.shape[-1]}x{hole.shape[-2]}"
            + (f" of {len(hole)} frames" if hole.ndim == 3 else "")
            + f", the video {clip.shape[2]}x{clip.shape[1]} of {len(clip)} frames; give a mask of "
            "the video's size."
        )
    size = lengths.size_of(pipe, settings)
    hole = np.broadcast_to(hole, clip.shape[:3])
    shown = np.repeat(hole[..., None], 3, axis=-1).astype(np.uint8) * 255
    clip, hole = _fitted(clip, size), _fitted(shown, size)[..., 0] > 0
    check_hole(hole)
    task = {"name": "inpaint", "clip": array_hash(clip), "mask": array_hash(hole)}
    held = lengths.held(pipe, clip)
    known = ~np.concatenate([hole, np.repeat(hole[-1:], len(held) - len(hole), axis=0)])
    return _render(pipe, prompt, Canvas(held, known), task, shown=len(clip), **settings)


def outpaint(
    pipe, prompt: str, clip: Clip, *, size: tuple[int, int] | None = None, **settings: Any
) -> Video:
    """`clip` in the middle of a larger picture of `size` (width, height).

    Raises:
      ValueError: a clip that does not fit into `size`.
    """
    trained.check(pipe, "border")
    width, height = size or (pipe.sampling.width, pipe.sampling.height)
    rows, columns = clip.shape[1:3]
    if rows > height or columns > width or (rows, columns) == (height, width):
        raise ValueError(
            f"the video is {columns}x{rows}; --outpaint {width}x{height} must be larger."
        )
    held = lengths.held(pipe, clip)
    canvas = canvas_of.blank(len(held), height, width)
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas.frames[:, top : top + rows, left : left + columns] = held
    canvas.known[:, top : top + rows, left : left + columns] = True
    task = {"name": "outpaint", "clip": array_hash(clip)}
    return _render(pipe, prompt, canvas, task, shown=len(clip), size=(width, height), **settings)


def interpolate(
    pipe,
    prompt: str,
    clip: Clip,
    *,
    times: int = 2,
    strength: float | int = 0.0,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Video:
    """`clip` at `times` its frame rate; frames between are moved part of the way (`between`).

    Args:
      strength: above 0 they are also noised as much and drawn anew after the prompt. What that
        changes is added to them, so that what the VAE loses of them is not lost.

    Raises:
      ValueError: `times` below 2, a strength outside [0, 1], or more frames a second than there
        may be.
    """
    if times < 2:
        raise ValueError(f"interpolate {times} is out of range; use 2 or more.")
    if strength:
        check_strength(strength)
    settings["fps"] = times * (settings.get("fps") or pipe.sampling.fps)
    window, overlap = (settings.pop(name, None) for name in ("window", "overlap"))
    request = pipe.request(prompt, **settings)
    clip = _fitted(clip, lengths.size_of(pipe, settings))
    task = {"name": "interpolate", "clip": array_hash(clip), "times": times, "strength": strength}
    draft = between(clip, times)
    held = lengths.held(pipe, draft)
    if not strength:
        return video_of(pipe, request, draft, task)
    window = lengths.window_of(pipe, len(held), window=window, settings=settings)
    overlap = lengths.overlap_of(pipe, window) if overlap is None else overlap
    drawn = {"draft": held, "shown": len(draft), "strength": strength, "on_step": on_step}
    drawn |= {"window": window, "overlap": overlap}
    made = _render(pipe, prompt, None, task, **drawn, **settings)
    through = windows.through(pipe, held[None], Sweep(len(held), window, overlap))
    lost = np.concatenate(list(through), axis=1)[0, : len(draft)]
    changed = draft.astype(np.int16) + made.frames - lost
    changed[::times] = clip
    return dataclasses.replace(made, frames=np.clip(changed, 0, 255).astype(np.uint8))


def long(
    pipe,
    prompt: str,
    *,
    frames: int,
    window: int | None = None,
    overlap: int | None = None,
    joint: bool = False,
    rolling: bool = False,
    image: Picture | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Film:
    """A film of any length, made as its parts are asked for.

    Args:
      frames: of the film, 1 + a multiple of the VAE's temporal factor.
      window: frames that the model sees at once; by default what it was trained on, or what the
        memory holds.
      overlap: frames that a window takes over from the one before, likewise; by default half.
      joint: denoise all windows together, blended where they overlap at every step, instead of one
        after the other; latents of the whole film are in memory then, and no model need have been
        trained to continue. Prompts without time stamps alone.
      rolling: one window that moves by a latent frame at a time, its noise rising along time, in
        place of one window after the other: see `generate.rolling`.
      image: picture that it begins with.

    Raises:
      ValueError: a number of frames that the VAE does not take; a task the checkpoint does not
        know; settings that exclude each other.
    """
    if joint and rolling:
        raise ValueError("joint (--joint) and rolling (--rolling) exclude each other; use one.")
    step = pipe.vae.config.scale_factor_temporal
    for name, count in (("frames", frames), ("overlap", 1 if overlap is None else overlap)):
        check_frames(count, step=step, name=name)
    window = lengths.window_of(pipe, frames, window=window, settings=settings)
    if frames > window and not joint:
        trained.check(pipe, "prefix")
    if rolling:
        trained.check(pipe, FRAME_TIMES)
        if settings.get("cache_threshold") is None:  # the checkpoint's is for one time
            settings["cache_threshold"] = 0.0
    request = pipe.request(prompt, **(settings | {"frames": window}))
    canvases = None
    if image is not None:
        trained.check(pipe, "first")
        canvases = [canvas_of.of_pictures({0: image}, window, size=(request.width, request.height))]
    given_kv.check(request, given=frames > window or image is not None or rolling, tiles=joint)
    sweep = Sweep(frames, window, lengths.overlap_of(pipe, window) if overlap is None else overlap)
    texts.check(pipe, prompt, frames=frames, fps=request.fps)
    if joint:
        made = windows.joint(pipe, [request], sweep, canvases=canvases, on_step=on_step)
    elif rolling:
        made = rolling_of.film(pipe, [request], sweep, canvases=canvases, on_step=on_step)
    else:
        made = windows.film(pipe, lambda *_: [request], sweep, canvases=canvases, on_step=on_step)
    task = {"name": "film", "window": sweep.window, "overlap": sweep.overlap}
    task |= {"joint": joint, "rolling": rolling}
    metadata = pipe.metadata(dataclasses.replace(request, frames=frames))
    return Film(
        parts=(part[0] for part in made),
        fps=request.fps,
        metadata=metadata | {"task": task, "batch_size": 1},
    )
