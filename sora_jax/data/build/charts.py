"""Inline SVG for report.html: histograms, tallies, and the narrowing of the funnel.

Colours come from the page's classes, so that one picture serves light and dark.
"""

import math
from collections.abc import Iterable
from html import escape
from typing import Any

from sora_jax.data.build.words import count, short

WIDTH, HEIGHT = 320, 128  # of a histogram, in the page's pixels
TOP, BOTTOM = 16, 18  # room for the highest count and for the axis
FEWEST_BARS = 10  # so that a single value is not a wall
TALLIED = 8
# In the order they are shown; scores of plug-ins follow.
TITLES = {
    "duration": "Duration", "aspect": "Aspect", "motion": "Motion", "sharpness": "Sharpness",
    "luma": "Brightness", "contrast": "Contrast", "frozen": "Longest freeze",
    "caption": "Caption length", "frames": "Frames",
}  # fmt: skip
TALLIES = {"size": "Size", "fps": "Frames a second", "caption_kind": "Captions by kind",
           "codec": "Codecs of the files"}  # fmt: skip
RATIOS = {"9:16": 9 / 16, "3:4": 3 / 4, "1:1": 1, "4:3": 4 / 3, "16:9": 16 / 9, "21:9": 21 / 9}


def titled(histograms: Iterable[str]) -> list[tuple[str, str]]:
    """(name, title) of histograms in the order they are shown."""
    names = set(histograms)
    order = [name for name in TITLES if name in names] + sorted(names - set(TITLES))
    return [(name, TITLES.get(name, name.capitalize())) for name in order]


def narrowing(before: float | int, after: float | int) -> str:
    """The silhouette of one stage: from share `before` to `after` of all, what left beside it."""
    before, after = 100 * before, 100 * after
    curve = f"C{before:.2f},55 {after:.2f},45 {after:.2f},100"
    kept = f"M0,0H{before:.2f}{curve}H0Z"
    gone = f"M{before:.2f},0{curve}H{before:.2f}Z" if after < before else ""
    return (
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="kept" d="{kept}"/>' + (f'<path class="gone" d="{gone}"/>' if gone else "")
    ) + "</svg>"


def histogram(title: str, name: str, data: dict[str, Any]) -> str:
    """A figure: bars of kept clips, dropped ones on top of them."""
    edges, kept, dropped = _padded(data)
    log = data["scale"] == "log"
    highest = max(map(sum, zip(kept, dropped, strict=True))) or 1
    floor, room = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    step = WIDTH / len(kept)
    bars = []
    for i, (k, d) in enumerate(zip(kept, dropped, strict=True)):
        if not k + d:
            continue
        x, wide = i * step, max(step - 1.5, 1)
        # What is there is seen: at least a pixel and a half.
        k_high = max(k / highest * room, 1.5) if k else 0
        d_high = max(d / highest * room, 1.5) if d else 0
        told = f"{short(edges[i])} to {short(edges[i + 1])}: {count(k)} kept"
        told += f", {count(d)} dropped" if d else ""
        bars.append(
            f"<g><title>{escape(told)}</title>"
            + _bar("kept", x, floor - k_high, wide, k_high)
            + _bar("dropped", x, floor - k_high - d_high, wide, d_high)
            + "</g>"
        )
    ticks = "".join(
        f'<text x="{x * WIDTH:.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{escape(label)}</text>'
        for x, anchor, label in _ticks(name, edges, log)
    )
    return (
        f'<figure><figcaption class="top"><h3>{escape(title)}</h3><span>{_told(data)}</span>'
        f"<p>{escape(data['unit']) or '&nbsp;'}</p></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}: {_told(data)}">'
        f'<line class="axis" x1="0" x2="{WIDTH}" y1="{TOP}" y2="{TOP}"/>'
        f'<text x="0" y="{TOP - 4}">{count(highest)}</text>'
        f"{''.join(bars)}"
        f'<line class="axis" x1="0" x2="{WIDTH}" y1="{floor + 0.5}" y2="{floor + 0.5}"/>'
        f"{ticks}</svg></figure>"
    )


def tally(title: str, counts: dict[str, int]) -> str:
    """A figure of horizontal bars: the most frequent, and how many others there are."""
    shown = list(counts.items())[:TALLIED]
    most = max(counts.values())
    rows = "".join(
        f'<span>{escape(word)}</span><i style="width:{100 * n / most:.4g}%"></i><b>{count(n)}</b>'
        for word, n in shown
    )
    rest = len(counts) - len(shown)
    note = f"and {count(rest)} more" if rest else ""
    return (
        f'<figure><figcaption class="top"><h3>{escape(title)}</h3><span>{note}</span></figcaption>'
        f'<div class="tally">{rows}</div></figure>'
    )


def _bar(kind: str, x: float | int, y: float | int, wide: float | int, high: float | int) -> str:
    if not high:
        return ""
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}"/>'


def _told(data: dict[str, Any]) -> str:
    """The words beside the title: the median, and what lies outside of the bars."""
    parts = [f"median {short(data['median'])}"] if "median" in data else []
    for words, (kept, dropped) in (("below", data["below"]), ("above", data["above"])):
        if kept + dropped:
            parts.append(f"{count(kept + dropped)} {words}")
    return escape(", ".join(parts))


def _padded(data: dict[str, Any]) -> tuple[list[float | int], list[int], list[int]]:
    """Edges and counts with empty bars around few ones."""
    edges, kept, dropped = list(data["edges"]), list(data["kept"]), list(data["dropped"])
    linear = data["scale"] == "linear"
    width, ratio = edges[1] - edges[0], edges[1] / edges[0] if edges[0] else 0
    before = True
    while len(kept) < FEWEST_BARS:
        if before and (not linear or edges[0] - width > -1e-9):
            edges.insert(0, edges[0] - width if linear else edges[0] / ratio)
            kept.insert(0, 0), dropped.insert(0, 0)
        else:
            edges.append(edges[-1] + width if linear else edges[-1] * ratio)
            kept.append(0), dropped.append(0)
        before = not before
    return edges, kept, dropped


def _ticks(name: str, edges: list[float | int], log: bool) -> list[tuple[float | int, str, str]]:
    """(position from 0 to 1, anchor, label), no two of them on top of each other."""
    low, high = edges[0], edges[-1]
    if name == "aspect":
        wanted = sorted(((v, label) for label, v in RATIOS.items()), key=lambda t: abs(t[0] - 1))
    elif log:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        wanted = [(m * 10.0**p, short(m * 10.0**p)) for m in (1, 3) for p in tens]
    else:
        step = _nice((high - low) / 5)
        first = math.ceil(low / step - 1e-9)
        wanted = [(i * step, short(i * step)) for i in range(first, int(high / step + 1e-9) + 1)]
    placed: list[tuple[float | int, str, str]] = []
    for value, label in wanted:
        if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
            continue
        x = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        if all(abs(x - other) > 0.11 for other, _, _ in placed):
            anchor = "start" if x < 0.03 else "end" if x > 0.97 else "middle"
            placed.append((x, anchor, label))
    return sorted(placed)


def _nice(step: float | int) -> float | int:
    """The next of 1, 2 and 5 times a power of ten that is not below `step`."""
    ten = 10.0 ** math.floor(math.log10(step))
    return next(m * ten for m in (1, 2, 5, 10) if m * ten >= step * (1 - 1e-9))
