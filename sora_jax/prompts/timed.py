"""Time-stamped prompts: `[0s-1s] a red ball rolls left [1s-2s] the red ball stays still`.

A stamp is [START-END] in seconds, with or without the s. Stamps stand in the order of time and do
not overlap; what lies between two of them, and behind the last, belongs to the prompt before it.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sora_jax.prompts import weighted
from sora_jax.text.tokenizer import Tokenizer

_NUMBER = r"(\d+\.?\d*|\.\d+)\s*s?"
STAMP = re.compile(rf"\[\s*{_NUMBER}\s*[-–]\s*{_NUMBER}\s*\]")
# From one time to another, or a time with its unit, and nothing else in the brackets; those of the
# first may lack their end. So [16:9], [80s style] and [3 to 5 children] are text.
_TIME, _UNIT = r"-?[\d.,:]+", r"\s*(?:s|secs?|seconds?)"
_LIKE_A_STAMP = re.compile(
    rf"\[\s*(?:{_TIME}(?:{_UNIT})?\s*(?:[-–—]|to)\s*{_TIME}(?:{_UNIT})?"
    rf"(?:\s*\]|[^\[\]]*(?=\[|\Z))|{_TIME}{_UNIT}\s*\])"
)
_SLACK = 1e-3  # seconds, as of a time that is rounded
_SHAPE = "write [START-END] in seconds, such as [0s-1.5s]"


class Segment(NamedTuple):
    """A prompt and the seconds of the video, [start, end), that it describes."""

    start: float
    end: float
    text: str


def is_timed(prompt: str) -> bool:
    """Whether `prompt` has a stamp, or what was meant as one, and is for `parse`."""
    return _LIKE_A_STAMP.search(prompt) is not None


def split(prompt: str) -> tuple[Segment, ...]:
    """The segments of `prompt` as they are written, gaps and all.

    Raises:
      ValueError: no stamp, a malformed one, one without a text, or wrong in order; one line.
    """
    for found in _LIKE_A_STAMP.finditer(prompt):
        if not STAMP.fullmatch(found[0]):
            raise ValueError(f"time stamp {found[0]!r}: {_SHAPE}.")
    lead, *fields = STAMP.split(prompt)
    if not fields:
        raise ValueError(f"the prompt has no time stamp; {_SHAPE}.")
    if lead.strip():
        raise ValueError(
            f"{lead.strip()!r} stands before the first time stamp; give it one, or leave it out."
        )
    segments = [
        Segment(float(start), float(end), text.strip())
        for start, end, text in zip(fields[::3], fields[1::3], fields[2::3], strict=True)
    ]
    for segment in segments:
        if segment.start >= segment.end:
            raise ValueError(f"{_stamp(segment)} ends before it has begun; {_SHAPE}.")
        if not segment.text:
            raise ValueError(f"{_stamp(segment)} has no prompt; write a sentence behind it.")
    for before, after in itertools.pairwise(segments):
        if after.start < before.end:
            raise ValueError(
                f"{_stamp(after)} begins before {_stamp(before)} has ended; write the stamps in "
                "the order of time, without overlap."
            )
    return tuple(segments)


def change(prompt: str, how: Callable[[str], str]) -> str:
    """`prompt` as `how` changes it, or the sentence behind each of its stamps.

    Raises:
      ValueError: as `split`, of a time-stamped prompt.
    """
    if not is_timed(prompt):
        return how(prompt)
    return render([segment._replace(text=how(segment.text)) for segment in split(prompt)])


def spans(caption: str) -> tuple[Segment, ...]:
    """The segments of a training caption: of one without stamps, or with wrong ones, a single one.

    Captions are found, not written for this program: what `split` refuses is only text here.
    """
    try:
        return split(caption)
    except ValueError:
        return (Segment(0.0, math.inf, caption),)


def parse(prompt: str, *, duration: float) -> tuple[Segment, ...]:
    """The segments of `prompt`, from 0 to `duration` without a gap.

    Args:
      duration: of the video in seconds, frames / fps.

    Raises:
      ValueError: as `split`; or a beginning that no prompt describes, or a stamp behind the end.
    """
    segments = split(prompt)
    if segments[0].start > 0:
        raise ValueError(
            f"{_stamp(segments[0])} comes first, and nothing says what is seen before; begin with "
            f"[0s-{_told(segments[0].start)}s] or [0s-{_told(segments[0].end)}s]."
        )
    for segment in segments:
        if segment.end > duration + _SLACK:
            raise ValueError(
                f"{_stamp(segment)} ends behind the video, which lasts {_told(duration)} s; "
                "shorten it, or ask for more frames."
            )
    ends = [*(after.start for after in segments[1:]), duration]
    return tuple(s._replace(end=float(end)) for s, end in zip(segments, ends, strict=True))


def render(segments: Sequence[Segment]) -> str:
    """The prompt that `split` reads as `segments`, their seconds to the last bit."""
    seconds = functools.partial(np.format_float_positional, trim="-")
    return " ".join(f"[{seconds(s.start)}s-{seconds(s.end)}s] {s.text}" for s in segments)


def truncate(prompt: str, tokenizer: Tokenizer, max_length: int) -> tuple[str, bool]:
    """As `weighted.truncate`; of a time-stamped prompt, each segment by itself.

    Raises:
      ValueError: as `split` and `weighted.parse`.
    """
    if not is_timed(prompt):
        return weighted.truncate(prompt, tokenizer, max_length)
    segments = split(prompt)
    cut = [weighted.truncate(segment.text, tokenizer, max_length) for segment in segments]
    kept = [s._replace(text=text) for s, (text, _) in zip(segments, cut, strict=True)]
    return render(kept), any(was_cut for _, was_cut in cut)


def without_stamps(text: str) -> str:
    """`text` without stamps and what looks like them, so that `is_timed` is False."""
    return " ".join(_LIKE_A_STAMP.sub(" ", text).split()) if is_timed(text) else text


def as_one(caption: str) -> str:
    """A training caption without stamps, for a model that is to see a single text.

    As in `spans`, what `split` refuses is only text.
    """
    try:
        segments = split(caption)
    except ValueError:
        return caption
    return ". ".join(segment.text.rstrip(".") for segment in segments)


def latent_prompts(
    segments: Sequence[Segment], *, frames: int, fps: float, temporal: int
) -> Int[np.ndarray, " f"]:
    """For each latent frame, the index of the segment that holds the middle of its time.

    The first latent frame is the first video frame, each later one the next `temporal`; a video
    frame is seen from i / fps to (i + 1) / fps.

    Args:
      segments: without gaps, as `parse` gives them.
      temporal: video frames in a latent one, the VAE's `scale_factor_temporal`.

    Raises:
      ValueError: a segment too short to hold the middle of any latent frame.
    """
    indices = _of_latents(segments, frames=frames, fps=fps, temporal=temporal)
    for i, segment in enumerate(segments):
        if i not in indices:
            raise ValueError(
                f"{_stamp(segment)} is too short: a latent frame is {temporal / fps:g} s here, and "
                "none has its middle in there; make it longer."
            )
    return indices


def latent_texts(
    caption: str, *, frames: int, fps: float, temporal: int
) -> tuple[list[str], Int[np.ndarray, " f"]]:
    """The texts of a training caption that are seen, and which of them each latent frame follows.

    Those of `spans`; what comes behind the end of the clip, or is too short, is left out.
    """
    segments = spans(caption)
    found = _of_latents(segments, frames=frames, fps=fps, temporal=temporal)
    seen, indices = np.unique(found, return_inverse=True)
    return [segments[i].text for i in seen], indices.astype(np.int32)


def _of_latents(segments, *, frames, fps, temporal) -> Int[np.ndarray, " f"]:
    later = np.arange(1, frames, temporal)
    middles = np.concatenate([[0.5], later + temporal / 2]) / fps
    starts = np.array([segment.start for segment in segments])
    indices = np.searchsorted(starts, middles, side="right") - 1
    return np.maximum(indices, 0).astype(np.int32)


def _stamp(segment: Segment) -> str:
    return f"[{_told(segment.start)}s-{_told(segment.end)}s]"


def _told(seconds: float) -> str:
    """Seconds for a reader, no further off than what `parse` lets pass."""
    return np.format_float_positional(seconds, precision=3, trim="-")
