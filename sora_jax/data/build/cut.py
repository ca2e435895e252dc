"""Shots to clips of allowed lengths: pure functions of times and indices."""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sora_jax.data.build.settings import CutSettings, LengthSettings

# Of a frame: forgives time stamps in whole milliseconds.
SLACK = 0.25


class Span(NamedTuple):
    """Frames first <= i < last of the scan, within a shot that spans shot_first to shot_last."""

    first: int
    last: int
    shot_first: int
    shot_last: int


def cut_shots(
    times: Float[np.ndarray, " n_plus_1"],
    cuts: Sequence[int],
    *,
    cut: CutSettings | None,
    length: LengthSettings | None,
) -> list[Span]:
    """Clips of every shot in order: no clip crosses a cut, none overlap.

    A shot longer than `cut.max_seconds` is cut into the fewest equal parts that fit; where these
    would be shorter than `length.min_seconds`, into parts of the greatest length and a rest. A
    shot (or rest) that is too short is a clip too: the length filter names it.

    Args:
      times: seconds at which the frames start, and the last one ends.
      cuts: indices, ascending, of the frames that begin a new shot.
    """
    bounds = [0, *cuts, len(times) - 1]
    spans = []
    for first, last in itertools.pairwise(bounds):
        if cut is None:
            spans.append(Span(first, last, first, last))
            continue
        inner = _without_margins(times, first, last, cut.margin_seconds)
        shortest = length.min_seconds if length else 0.0
        edges = _part_edges(times, *inner, longest=cut.max_seconds, shortest=shortest)
        spans += [Span(a, b, first, last) for a, b in itertools.pairwise(edges)]
    return spans


def _without_margins(times: np.ndarray, first: int, last: int, margin: float) -> tuple[int, int]:
    """The frames at least `margin` seconds from both ends; one in the middle if there are none."""
    begin = _frame_at(times, times[first] + margin)
    end = _frame_at(times, times[last] - margin)
    if begin >= end:
        middle = (first + last) // 2
        return middle, middle + 1
    return begin, end


def _frame_at(times: np.ndarray, seconds: float) -> int:
    """The first frame that starts at `seconds` or later, or less than a millisecond before."""
    return int(np.searchsorted(times, seconds - 1e-3))


def _part_edges(
    times: np.ndarray, first: int, last: int, *, longest: float, shortest: float
) -> list[int]:
    edges = [first]
    while edges[-1] < last:
        begin = times[edges[-1]]
        rest = float(times[last] - begin)
        parts = int(np.ceil(rest / longest - 1e-6))
        if parts <= 1:
            edges.append(last)
            break
        part = rest / parts if rest / parts >= shortest else longest
        edge = _frame_at(times, begin + part)
        if times[edge] - begin > longest + 1e-3:
            edge -= 1
        edges.append(max(edge, edges[-1] + 1))
    return edges


def chosen_spans(count: int, max_clips: int) -> set[int]:
    """Which of `count` clips to keep: all, or `max_clips` of them spread evenly."""
    if not max_clips or count <= max_clips:
        return set(range(count))
    return {int((2 * k + 1) * count / (2 * max_clips)) for k in range(max_clips)}


def output_rate(rate: Fraction, fps: float | int) -> Fraction:
    """Frames a second of a written clip: the source's own, or `fps` if that is lower.

    Frames are never repeated to reach a rate: a model would learn the stutter.
    """
    if not fps or rate <= fps:
        return rate
    return Fraction(fps).limit_denominator(1001)


def frame_count(seconds: float, rate: Fraction) -> int:
    """How many frames a clip of `seconds` has at `rate`; one at least."""
    return max(1, int(seconds * rate + SLACK))
