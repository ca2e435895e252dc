"""Filters: from what was measured of a clip to None, or the reason why it is dropped.

Every reason states what was measured and the limit.
"""

import math
from typing import NamedTuple

import numpy as np

from sora_jax.data.build.cut import Span
from sora_jax.data.build.scan import Scan
from sora_jax.data.build.settings import (
    BlurSettings,
    BrightnessSettings,
    BuildSettings,
    FreezeSettings,
    LengthSettings,
    LetterboxSettings,
    MotionSettings,
    ScoreSettings,
)


class ClipStats(NamedTuple):
    """What is known of one clip after the first pass; units as in settings.SCORE_UNITS."""

    seconds: float  # 0 for an image
    num_frames: int  # as it will be written
    is_image: bool
    luma: float
    contrast: float
    sharpness: float
    motion: float | None  # None: too short to measure, or an image
    frozen: float

    @property
    def scores(self) -> dict[str, float]:
        names = ("luma", "contrast", "sharpness", "motion", "frozen")
        values = {name: getattr(self, name) for name in names}
        if self.is_image:
            del values["frozen"]
        return {name: rounded(value) for name, value in values.items() if value is not None}


class Crop(NamedTuple):
    """Borders to cut off, as fractions of the height (top, bottom) and width (left, right)."""

    top: float = 0.0
    bottom: float = 0.0
    left: float = 0.0
    right: float = 0.0


def clip_stats(
    scan: Scan, span: Span, *, num_frames: int, is_image: bool, still: float = 0.0
) -> ClipStats:
    """Statistics of the frames of `span`.

    Args:
      still: mean change of luma between two frames that counts as none.
    """
    frames = slice(span.first, span.last)
    flow = scan.flow
    inside = (flow.first >= span.first) & (flow.second < span.last)
    motion = float(flow.speed[inside].mean()) if inside.any() else None
    if motion is None and not is_image and span.last - span.first > 1:
        # A clip shorter than the time between two flows takes that of the flow that covers it.
        covering = (flow.first < span.last) & (flow.second >= span.first)
        motion = float(flow.speed[covering].mean()) if covering.any() else None
    return ClipStats(
        seconds=0.0 if is_image else float(scan.times[span.last] - scan.times[span.first]),
        num_frames=num_frames,
        is_image=is_image,
        luma=float(scan.luma[frames].mean()),
        contrast=float(scan.contrast[frames].mean()),
        sharpness=float(np.median(scan.sharpness[frames])),
        motion=None if is_image else motion,
        frozen=0.0 if is_image else _longest_freeze(scan, span, still),
    )


def _longest_freeze(scan: Scan, span: Span, still: float) -> float:
    """Seconds by which the longest stretch without change outlasts an ordinary frame."""
    # One of the file: in a clip that is a single long frame, that frame would be the ordinary one.
    ordinary = 1 / float(scan.rate)
    times = scan.times[span.first : span.last + 1]
    moved = np.flatnonzero(scan.difference[span.first + 1 : span.last] > still) + 1
    edges = times[np.concatenate([[0], moved, [span.last - span.first]])]
    return round(max(0.0, float(np.diff(edges).max()) - ordinary), 6)


def too_short(stats: ClipStats, settings: LengthSettings) -> str | None:
    if stats.is_image:
        return None
    # A thousandth of a second forgives time stamps in whole milliseconds.
    if stats.seconds < settings.min_seconds - 1e-3:
        return f"too short ({stats.seconds:.3g} of {settings.min_seconds:g} s)"
    if stats.num_frames < settings.min_frames:
        return f"too short ({stats.num_frames} of {settings.min_frames} frames)"
    return None


def bad_brightness(stats: ClipStats, settings: BrightnessSettings) -> str | None:
    if stats.luma < settings.min_luma:
        return f"too dark (mean luma {stats.luma:.3g}, at least {settings.min_luma:g})"
    if stats.luma > settings.max_luma:
        return f"too bright (mean luma {stats.luma:.4g}, at most {settings.max_luma:g})"
    if stats.contrast < settings.min_contrast:
        return f"too flat (contrast {stats.contrast:.3g}, at least {settings.min_contrast:g})"
    return None


def frozen(stats: ClipStats, settings: FreezeSettings) -> str | None:
    if not stats.is_image and stats.frozen > settings.max_seconds:
        return f"frozen (for {stats.frozen:.3g} s, at most {settings.max_seconds:g} s)"
    return None


def bad_motion(stats: ClipStats, settings: MotionSettings) -> str | None:
    """Clips too short to measure stay, as images do."""
    if stats.motion is None:
        return None
    if stats.motion < settings.min:
        return f"too little motion ({stats.motion:.2g} of {settings.min:g} %/s)"
    if stats.motion > settings.max:
        return f"too much motion ({stats.motion:.4g} %/s, at most {settings.max:g})"
    return None


def blurred(stats: ClipStats, settings: BlurSettings) -> str | None:
    if stats.sharpness < settings.min_sharpness:
        return f"blurred (sharpness {stats.sharpness:.3g}, at least {settings.min_sharpness:g})"
    return None


def bad_score(value: float, settings: ScoreSettings) -> str | None:
    if not math.isfinite(value):
        return f"{settings.name} is {value}: {settings.function} cannot tell"
    if settings.min is not None and value < settings.min:
        return f"{settings.name} too low ({value:.3g}, at least {settings.min:g})"
    if settings.max is not None and value > settings.max:
        return f"{settings.name} too high ({value:.3g}, at most {settings.max:g})"
    return None


# In the order they are asked; each with the section of its settings.
FILTERS = (
    ("length", too_short),
    ("brightness", bad_brightness),
    ("freeze", frozen),
    ("motion", bad_motion),
    ("blur", blurred),
)


def first_reason(stats: ClipStats, settings: BuildSettings) -> dict[str, str] | None:
    """The first filter that drops the clip, with its reason; None keeps it."""
    for stage, judge in FILTERS:
        section = getattr(settings, stage)
        reason = judge(stats, section) if section else None
        if reason:
            return {"stage": stage, "reason": reason}
    return None


def letterbox(scan: Scan, span: Span, settings: LetterboxSettings | None) -> Crop:
    """The borders that are dark in every frame of the shot that the clip is from.

    Where a border lies is known to one row of the reduced frames, and that row goes too: up to
    0.4 % of a 16:9 picture's width is lost, and no dark fringe stays. Logos or subtitles in the
    border keep it whole.
    """
    if settings is None:
        return Crop()
    bars = scan.bars[span.shot_first : span.shot_last].min(axis=0)
    edges = []
    for side, pair in zip(scan.size, (bars[:2], bars[2:]), strict=True):
        uneven = abs(int(pair[0]) - int(pair[1])) > max(2, 0.1 * pair.max())
        if pair.sum() >= side // 2 or (settings.symmetric and uneven):
            pair = (0, 0)
        edges += [(bar + 1) / side if bar >= max(1, settings.min_fraction * side) else 0.0
                  for bar in map(int, pair)]  # fmt: skip
    return Crop(*edges)


def rounded(value: float) -> float:
    """Six digits: what float32 holds, so that a score reads back as it was."""
    return float(f"{value:.6g}")
