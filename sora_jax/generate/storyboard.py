"""A storyboard as one film: shot after shot, characters carried over the cuts.

At a cut the model sees the end of an earlier shot and the words "..., Cut to: ...", as its training
clips of several shots have them, and goes on on the other side: the same subject, another place. A
shot that continues, and the windows within a shot, see the last frames before them.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from sora_jax import video_io
from sora_jax.dit.flops import flops
from sora_jax.generate import canvas as canvas_of
from sora_jax.generate import given_kv, lengths, texts, trained, windows
from sora_jax.generate.board import Board, Shot
from sora_jax.generate.conditions import Picture
from sora_jax.generate.denoise import OnStep
from sora_jax.generate.video import Film, array_hash, to_bytes
from sora_jax.generate.windows import Sweep
from sora_jax.prompts import timed, weighted
from sora_jax.video_io import read_video

CUT = ". Cut to: "
Frames = UInt8[np.ndarray, "_ _ _ 3"]


class Part(NamedTuple):
    """What one shot takes to render."""

    number: int
    shot: Shot
    frames: int
    windows: int
    tflops: float
    picture: Picture | None  # the shot's keyframe


def plan(pipe, board: Board, **settings: Any) -> list[Part]:
    """Frames, windows and cost of every shot; refuses what cannot be made.

    Args:
      settings: those of any video, as `Pipeline.request` takes them, but for `frames`, and
        `window`, the frames that the model sees at once (`window_of`). None leaves one to the
        checkpoint.

    Raises:
      ValueError: a task that the checkpoint was not trained for, settings it does not take, or a
        keyframe that is no picture.
    """
    if "frames" in settings:
        raise ValueError("frames follow from the seconds of the shots; give window.")
    settings["window"] = window_of(pipe, board, **settings)
    parts, given = [], False
    for number, shot in enumerate(board.shots, start=1):
        request = _request(pipe, board, shot, number, **settings)
        _check_prompts(board, shot, number)
        frames = max(1, round(shot.seconds * request.fps))
        ends = [at for at, _ in shot.spans[1:]] + [shot.seconds]
        least = 2 * pipe.vae.config.scale_factor_temporal / request.fps
        for (at, _), end in zip(shot.spans, ends, strict=True):
            if len(shot.spans) > 1 and end - at < least:
                raise ValueError(
                    f"shot {number}: the prompt at {at:g} s is for {end - at:g} s; one of several "
                    f"in a shot needs at least {least:g} s here."
                )
        for mask in _needs(shot, number, frames > request.frames):
            trained.check(pipe, mask)
            given = True
        cost = flops(
            pipe.dit.config,
            tokens=pipe.num_tokens(request),
            text_tokens=pipe.sampling.text_tokens,
            image_rows=pipe.image_rows,
        ).total
        count = _windows(pipe, shot, number, frames, request.frames)
        tflops = cost * _forwards(pipe, shot, number, request, count) / 1e12
        parts.append(Part(number, shot, frames, count, tflops, _picture(shot, number)))
    given_kv.check(request, given=given)
    return parts


def _picture(shot: Shot, number: int) -> Picture | None:
    if shot.keyframe is None:
        return None
    try:
        return read_video(shot.keyframe, num_frames=1).frames[0]
    except ValueError as error:
        raise ValueError(f"shot {number}: keyframe {error}") from error


def _check_prompts(board: Board, shot: Shot, number: int) -> None:
    """Raises ValueError for weights or stamps that no prompt, or none within a shot, may have."""
    for _, text in shot.prompts(board.style):
        if timed.is_timed(text):
            raise ValueError(
                f"shot {number}: {text!r} has a time stamp; write a list of at and text as prompt."
            )
        try:
            weighted.parse(text)
        except ValueError as error:
            raise ValueError(f"shot {number}: {error}") from error


def _needs(shot: Shot, number: int, long: bool) -> list[str]:
    """Masks that a shot takes."""
    takes_over = number > 1 and (shot.begins == "continue" or shot.carry)
    return ["first"] * (shot.keyframe is not None) + ["prefix"] * bool(long or takes_over)


def _cut_context(pipe, window: int) -> int:
    """Frames of the earlier shot that a window shows before the cut."""
    return lengths.whole(pipe, window // 2 - 1)


def _windows(pipe, shot: Shot, number: int, frames: int, window: int) -> int:
    step = window - lengths.overlap_of(pipe, window)
    if number > 1 and shot.begins == "continue":
        return math.ceil(frames / step)
    first = window
    if number > 1 and shot.carry and shot.keyframe is None:
        first = window - window // 2
    return 1 + max(0, math.ceil((frames - first) / step))


def _forwards(pipe, shot: Shot, number: int, request, count: int) -> int:
    """Forward passes of a shot in `count` windows; all but one that begins anew go on."""
    anew = int(number == 1 or shot.begins == "cut")
    first, others = (pipe.denoise.forwards(r) for r in (request, request.going_on()))
    return anew * first + (count - anew) * others


def _request(pipe, board: Board, shot: Shot, number: int, **settings: Any):
    seed = board.seed + number - 1 if shot.seed is None else shot.seed
    chosen = {"seed": seed, "negative_prompt": board.negative_prompt}
    chosen |= {name: v for name in ("fps", "size") if (v := getattr(board, name)) is not None}
    given = {name: value for name, value in settings.items() if value is not None}
    given["frames"] = given.pop("window")
    return pipe.request(shot.spans[0][1], **(chosen | given))


def window_of(pipe, board: Board, **settings: Any) -> int:
    """Frames that the model sees at once: `window` of the settings, or what memory holds.

    Raises:
      ValueError: such as the model does not take, or too few to show both sides of a cut.
    """
    step = pipe.vae.config.scale_factor_temporal
    least = 1 + -(-3 // step) * step
    window, size = settings.get("window"), settings.get("size") or board.size
    given = lengths.window_of(pipe, window=window, settings=settings | {"size": size})
    if window is None:
        return max(least, given)
    lengths.check_window(given, least=least, to="show both sides of a cut")
    return given


def render(pipe, board: Board, *, on_step: OnStep | None = None, **settings: Any) -> Film:
    """The film of a storyboard, window by window, each made when its part is asked for.

    Raises:
      ValueError: as `plan`, before anything is made.
    """
    settings["window"] = window_of(pipe, board, **settings)
    parts = plan(pipe, board, **settings)
    first = _request(pipe, board, board.shots[0], 1, **settings)
    frames = sum(part.frames for part in parts)
    metadata = pipe.metadata(dataclasses.replace(first, frames=frames))
    shots = [
        dataclasses.asdict(part.shot)
        | {
            "frames": part.frames,
            "prompts": part.shot.prompts(board.style),
            "keyframe": None if part.picture is None else array_hash(part.picture),
        }
        for part in parts
    ]
    metadata |= {
        "prompt": CUT.join(part.shot.spans[0][1] for part in parts),
        "task": {"name": "storyboard", "window": settings["window"], "shots": shots},
        "batch_size": 1,
    }
    made = _shots(pipe, board, parts, _Steps(on_step, parts, first.steps), settings)
    return Film(parts=made, fps=first.fps, metadata=metadata)


class _Steps:
    """Counts denoising steps over all shots."""

    def __init__(self, on_step: OnStep | None, parts: Sequence[Part], steps: int):
        self._report, self._done = on_step, 0
        self._total = steps * sum(part.windows for part in parts)

    def __call__(self, step: int, total: int, x: Any) -> None:
        self._done += 1
        if self._report is not None:
            self._report(min(self._done, self._total), self._total, x)


def _shots(
    pipe, board: Board, parts: Sequence[Part], on_step: OnStep, settings: dict[str, Any]
) -> Iterator[Frames]:
    kept: list[Frames] = []  # the last window of each shot, which later shots go on from
    for part in parts:
        request = _request(pipe, board, part.shot, part.number, **settings)
        shot, window = part.shot, request.frames
        begun = None
        if part.number > 1 and shot.begins == "continue":
            given = kept[-1][-lengths.overlap_of(pipe, window) :]
            given = given[-lengths.whole(pipe, len(given)) :]
        elif part.picture is not None:
            given = begun = video_io.fit(part.picture, (request.height, request.width))[None]
        elif part.number > 1 and shot.carry:
            before = board.shots[shot.carry - 1].prompts(board.style)[-1][1]
            clip = kept[shot.carry - 1]
            given = begun = _cut_to(pipe, board, clip, before, shot, request, on_step)
        else:
            given = None
        last = None
        for made in _go_on(pipe, board, part, request, given, begun, on_step):
            last = made if last is None else np.concatenate([last, made])
            last = last[-window:]
            yield made
        kept.append(last)


def _cut_to(
    pipe, board: Board, clip: Frames, before: str, shot: Shot, request, on_step: OnStep
) -> Frames:
    """The first frames of a shot, made in one window with the end of the shot before it."""
    window = request.frames
    known = min(_cut_context(pipe, window), lengths.whole(pipe, len(clip)))
    # The end of the earlier shot stands right before the cut, in the middle of the window.
    after = shot.prompts(board.style)[0][1]
    words = after.split(" ", 1)
    if words[0] in ("a", "an") and len(words) > 1:
        after = f"the {words[1]}"  # as captions of several shots speak of the same subject
    canvas = canvas_of.of_clip(clip[-known:], window, at=0)
    cut = known + window // 2 - _cut_context(pipe, window)
    asked = dataclasses.replace(request, prompt=before + CUT + after)
    latents = pipe.denoise(
        pipe.noise([asked]),
        asked,
        texts.embed(pipe, [asked]),
        pipe.conditions(asked, canvases=[canvas]),
        on_step=on_step,
    )
    return to_bytes(pipe.decode(latents))[0, cut:]


def _go_on(
    pipe, board: Board, part: Part, request, given: Frames | None, begun: Frames | None, on_step
) -> Iterator[Frames]:
    """A whole shot from the frames that it goes on from; `begun` are those that are its own."""
    own = 0 if begun is None else len(begun)
    if own:
        yield begun[: part.frames]
    if own >= part.frames:
        return
    window, known = request.frames, given
    if own > 1:
        known = begun[-lengths.whole(pipe, min(own, lengths.overlap_of(pipe, window))) :]
    held = 0 if known is None else len(known)
    step = pipe.vae.config.scale_factor_temporal
    total = max(window, 1 + -(-(held + part.frames - own - 1) // step) * step)
    begin = own - held if own else -held  # of the sweep, in frames of the shot
    prompt = _timed(part.shot.prompts(board.style), begin, total, request.fps, least=step)
    request = dataclasses.replace(request, prompt=prompt)
    if known is not None and part.picture is None:  # the first window, too, goes on
        request = request.going_on()
    film = windows.film(
        pipe,
        lambda *_: [request],
        Sweep(total, window, lengths.overlap_of(pipe, window)),
        canvases=None if known is None else [canvas_of.of_clip(known, held, at=0)],
        on_step=on_step,
    )
    end = held + part.frames - own  # in frames of the sweep, whose last window may be longer
    at = 0
    for (made,) in film:
        fresh = made[max(held - at, 0) : max(end - at, 0)]
        at += len(made)
        if len(fresh):
            yield fresh


def _timed(
    prompts: Sequence[tuple[float, str]], begin: int, total: int, fps: float | int, *, least: int
) -> str:
    """The prompt of a sweep of `total` frames that begins at frame `begin` of a shot.

    What is left of a span in it and shorter than `least` frames is left to its neighbour.
    """
    spans: list[timed.Segment] = []
    ends = [at for at, _ in prompts[1:]] + [math.inf]
    for (at, text), end in zip(prompts, ends, strict=True):
        first, last = max(at - begin / fps, 0.0), min(end - begin / fps, total / fps)
        if last - first >= least / fps - 1e-9:
            spans.append(timed.Segment(first if spans else 0.0, last, text))
    if not spans:
        return prompts[-1][1]
    return spans[0].text if len(spans) == 1 else timed.render(spans)
