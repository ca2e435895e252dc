"""report.html: one file without scripts or links, from what report.json holds and a few frames."""

import base64
import importlib.resources
import io
import string
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

import sora_jax
from sora_jax.data.build import charts
from sora_jax.data.build.words import count, plural, size, span

THUMBNAIL = 448  # pixels of a picture's longer side, at twice the size shown
FILES_SHOWN = 200  # of those left out; report.json names more
FILES_OPEN = 12  # up to so many are shown without a click
Shown = Sequence[tuple[dict[str, Any], np.ndarray | None]]


def page(result: dict[str, Any], shown: Shown) -> str:
    """The whole page.

    Args:
      result: what report.json holds.
      shown: clips of `clips_shown` with their frames, uint8 (F H W 3) or (H W 3), or None.
    """
    template = importlib.resources.files(__package__).joinpath("report.html.tmpl")
    sections = [
        _funnel(result),
        _histograms(result),
        _sheet(shown, result["totals"]["clips_kept"]),
        _dropped(result["stages"]),
        _left_out(result),
        _warnings(result),
        _settings(result["settings"]),
    ]
    return string.Template(template.read_text("utf-8")).substitute(
        title=escape(_headline(result["totals"])),
        headline=escape(_headline(result["totals"])),
        lead=escape(_lead(result["totals"])),
        facts=_facts(result["totals"]),
        sections="\n".join(section for section in sections if section),
        footer=f"Written by sora_jax {escape(sora_jax.__version__)}. Full numbers: report.json.",
    )


def _headline(totals: dict[str, Any]) -> str:
    if not totals["clips_kept"]:
        return "No clip was kept"
    kept, cut = totals["clips_kept"], totals["clips_cut"]
    if kept == cut:
        return f"{plural(kept, 'clip')} kept, none dropped"
    return f"{count(kept)} of {plural(cut, 'clip')} kept"


def _lead(totals: dict[str, Any]) -> str:
    words = f"{span(totals['seconds_kept'])} of video, out of {span(totals['seconds_read'])} in "
    words += plural(totals["files_read"], "file")
    if totals["images_kept"]:
        words += f", {plural(totals['images_kept'], 'still image')} among the clips"
    left_out = totals["files_left_out"]
    are = "is" if left_out == 1 else "are"
    return words + (f". {plural(left_out, 'file')} could not be used and {are} named below." if
                    left_out else ". Every file could be read.")  # fmt: skip


def _facts(totals: dict[str, Any]) -> str:
    clips = totals["clips_kept"]
    captioned = clips - totals["clips_without_caption"]
    each = totals["bytes_kept"] / clips if clips else 0
    shares = [
        ("Clips", count(clips), _percent(clips, totals["clips_cut"], "of those cut")),
        ("Video", span(totals["seconds_kept"]),
         _percent(totals["seconds_kept"], totals["seconds_read"], "of what was read")),
        ("Frames", count(totals["frames_kept"]), ""),
        ("Stored", size(totals["bytes_kept"]), f"{size(each)} a clip" if clips else ""),
        ("With caption", count(captioned), f"{plural(totals['captions'], 'caption')} in all"),
        ("Files left out", count(totals["files_left_out"]), f"of {count(totals['files'])}"),
    ]  # fmt: skip
    return "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"
        for name, value, note in shares
    )


def _percent(part: float | int, whole: float | int, of: str) -> str:
    return f"{100 * part / whole:.3g} % {of}" if whole else ""


def _section(title: str, note: str, body: str) -> str:
    return (
        f'<section><div class="head"><h2>{title}</h2><span class="soft">{note}</span></div>'
        f"{body}</section>"
    )


def _funnel(result: dict[str, Any]) -> str:
    totals, stages = result["totals"], result["stages"]
    if not totals["clips_cut"]:
        return ""
    whole = totals["clips_cut"]
    rows = [_funnel_row("clips cut", 1, 1, whole, f"{span(totals['seconds_cut'])} of video")]
    for stage in stages:
        why = ""
        if stage["stage"] == "cut" and not stage["dropped"]:
            continue
        if stage["dropped"]:
            reasons = list(stage["reasons"])[:2]
            why = f"<b>−{count(stage['dropped'])}</b> {escape('; '.join(reasons))}"
        rows.append(
            _funnel_row(
                stage["stage"], stage["clips_in"] / whole, stage["kept"] / whole, stage["kept"], why
            )
        )
    last = f"{span(totals['seconds_kept'])} of video"
    share = totals["clips_kept"] / whole
    rows.append(_funnel_row("kept", share, share, totals["clips_kept"], last, end=True))
    note = "Clips that each stage handed on, in order"
    return _section("What each stage kept", note, f'<ol class="funnel">{"".join(rows)}</ol>')


def _funnel_row(
    name: str, before: float | int, after: float | int, left: int, why: str, *, end: bool = False
) -> str:
    kind = "end" if end else "" if why else "idle"
    return (
        f'<li class="{kind}"><div class="shape">{charts.narrowing(before, after)}</div>'
        f'<span class="name">{escape(name)}</span><span class="left">{count(left)}</span>'
        f'<span class="why">{why}</span></li>'
    )


def _histograms(result: dict[str, Any]) -> str:
    histograms, tallies = result["histograms"], result["tallies"]
    figures = [charts.histogram(title, n, histograms[n]) for n, title in charts.titled(histograms)]
    named = charts.TALLIES.items()
    figures += [charts.tally(title, tallies[n]) for n, title in named if tallies.get(n)]
    if not figures:
        return ""
    note = '<span class="key">kept</span>&ensp; <span class="key d">dropped</span>'
    return _section("The clips in numbers", note, f'<div class="charts">{"".join(figures)}</div>')


def _sheet(shown: Shown, kept: int) -> str:
    if not shown:
        return ""
    note = "all of them" if len(shown) == kept else f"{len(shown)} at random, of {count(kept)}"
    body = "".join(_clip(clip, frames) for clip, frames in shown)
    return _section("Clips, as they were written", note, f'<div class="sheet">{body}</div>')


def _clip(clip: dict[str, Any], frames: np.ndarray | None) -> str:
    captions = []
    kinds = [*clip["caption_kinds"], *[""] * len(clip["captions"])]
    for i, (caption, kind) in enumerate(zip(clip["captions"], kinds, strict=False)):
        label = f'<span class="kind">{escape(kind)}</span>' if kind else ""
        captions.append(f'<p class="{"more" if i else ""}">{label}{escape(caption)}</p>')
    if not any(clip["captions"]):
        captions = ['<p class="more">No caption.</p>']
    what = [f"{clip['width']}×{clip['height']}"]
    if clip["num_frames"] > 1:
        what.append(f"{plural(clip['num_frames'], 'frame')} at {clip['fps']:.4g} a second")
    return (
        f'<figure class="clip">{_pictures(frames, clip)}<figcaption>{"".join(captions)}'
        f'<p class="at"><span class="mono">{escape(clip["key"])}</span><br>{", ".join(what)}</p>'
        "</figcaption></figure>"
    )


def _pictures(frames: np.ndarray | None, clip: dict[str, Any]) -> str:
    """The middle frame, large, with the first and the last beside it; three in a row if tall."""
    if frames is None or not len(frames):
        return '<div class="frames none">no picture</div>'
    if frames.ndim == 3:
        frames = frames[None]
    count_ = len(frames)
    _, height, width, _ = frames.shape
    tall = height > width
    if count_ == 1:
        chosen, kind = [0], "one"
    elif tall:
        chosen, kind = [0, count_ // 2, count_ - 1], "tall"
    else:
        chosen, kind = [count_ // 2, 0, count_ - 1], ""
    # The middle of a wide clip is shown twice as large as the others.
    sides = [THUMBNAIL if kind == "one" or (i == 0 and not tall) else THUMBNAIL // 2
             for i in range(len(chosen))]  # fmt: skip
    sides = [side * 3 // 2 for side in sides] if tall else sides
    pictures = "".join(
        f'<img alt="" src="{_data_uri(frames[i], side)}">'
        for i, side in zip(chosen, sides, strict=True)
    )
    label = escape(f"Frames of {clip['key']}")
    return f'<div class="frames {kind}" role="img" aria-label="{label}">{pictures}</div>'


def _data_uri(frame: np.ndarray, side: int) -> str:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(frame))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


def _dropped(stages: Sequence[dict[str, Any]]) -> str:
    rows = []
    for stage in stages:
        if stage["dropped"]:
            examples = "".join(
                f'<li><span class="mono">{escape(example["key"])}</span>'
                f'<span class="soft">{escape(example["reason"])}</span></li>'
                for example in stage["examples"]
            )
            name, number = escape(stage["stage"]), count(stage["dropped"])
            head = f'<h3>{name}<br><span class="soft">{number} dropped</span></h3>'
            rows.append(f"<div>{head}<ul>{examples}</ul></div>")
    if not rows:
        return ""
    note = "a few of each stage"
    return _section("Dropped, and why", note, f'<div class="rows">{"".join(rows)}</div>')


def _left_out(result: dict[str, Any]) -> str:
    left_out, number = result["files_left_out"], result["totals"]["files_left_out"]
    if not number:
        return ""
    rows = []
    for reason, times in left_out["by_reason"].items():
        rows.append(f"<tr><td>{plural(times, 'file')}</td><td>{escape(reason)}</td></tr>")
    named = "".join(
        f'<tr><td class="mono">{escape(file["source"])}</td>'
        f"<td>{escape(file['stage'])}: {escape(file['reason'])}</td></tr>"
        for file in left_out["files"][:FILES_SHOWN]
    )
    few = min(len(left_out["files"]), FILES_SHOWN)
    opened = " open" if few <= FILES_OPEN else ""
    each = "each" if few == number else f"{count(few)} of {count(number)}"
    note = ", ".join(f"{count(n)} at {escape(stage)}" for stage, n in left_out["by_stage"].items())
    body = (
        f'<table class="counts">{"".join(rows)}</table>'
        f"<details{opened}><summary>{each.capitalize()} by name</summary>"
        f"<table>{named}</table></details>"
    )
    return _section("Files left out", note, body)


def _warnings(result: dict[str, Any]) -> str:
    warnings = result["warnings"]
    if not warnings["count"]:
        return ""
    named = "".join(
        f'<tr><td class="mono">{escape(file["source"])}</td><td>{escape(file["warning"])}</td></tr>'
        for file in warnings["files"][:FILES_SHOWN]
    )
    few = min(len(warnings["files"]), FILES_SHOWN)
    summary = "By name" if few == warnings["count"] else f"{count(few)} of them by name"
    body = f"<details><summary>{summary}</summary><table>{named}</table></details>"
    return _section("Used, with a warning", plural(warnings["count"], "file"), body)


def _settings(settings: dict[str, Any]) -> str:
    if not settings:
        return ""
    rows = "".join(
        f'<tr><td class="mono">{escape(name)}</td><td class="mono">{escape(value)}</td></tr>'
        for name, value in _flat(settings)
    )
    body = f"<details><summary>Every setting of this build</summary><table>{rows}</table></details>"
    return _section("Settings", "", body)


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", repr(value)))
    return flat
