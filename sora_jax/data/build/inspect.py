"""`sora-jax data inspect`: what a built set, or any folder of raw videos, holds."""

import concurrent.futures
import json
import os
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sora_jax.data.build import places, terminal
from sora_jax.data.build.histograms import Linear, Log, Sample, Tally, stable_hash
from sora_jax.data.build.inputs import InputFile, find_inputs
from sora_jax.data.build.media import Media, MediaInfo
from sora_jax.data.build.staging import MANIFEST, built_manifest
from sora_jax.data.build.words import count, plural, size, span

PROBED = 2_000  # of a raw folder's files, chosen by a hash of their names
PROBES_AT_ONCE = 8
NAMED = 8  # of files left out, warned of or unreadable
CLIPS_NAMED = 6


def inspect(path: str | os.PathLike, console: Console | None = None) -> None:
    """Prints what lies in `path`: a set that `data build` made, or raw videos and images.

    Raises:
      ValueError: nothing there, an unfinished or damaged set, or no video; one line.
    """
    console = console or Console()
    path = os.fspath(path)
    places.check_scheme(path)
    folder = epath.Path(places.absolute(path))
    if (folder / MANIFEST).exists():
        built_manifest(folder)
        _built(folder, path, console)
    elif (folder / ".build").exists():
        raise ValueError(f"{path}: the build is not finished; run the same command again.")
    else:
        _raw(find_inputs(path), path, console)


def _built(folder: epath.Path, name: str, console: Console) -> None:
    report, manifest = (_json(folder / f"{part}.json", name) for part in ("report", "manifest"))
    try:
        with np.load(_local(folder / "index.npz")) as index:
            frames, length = int(index["num_frames"].sum()), len(index["num_frames"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{name}/index.npz cannot be read ({error}); `sora-jax data verify` tells what else is "
            "damaged."
        ) from error
    if length != manifest["records"]:
        raise ValueError(
            f"{name}: index.npz lists {length} clips, manifest.json {manifest['records']}; run "
            "`sora-jax data verify`, then build the set again."
        )
    totals = report["totals"]
    terminal.heading(console, name, f"{count(totals['clips_kept'])} of "
                     f"{plural(totals['clips_cut'], 'clip')} kept")  # fmt: skip
    captioned = totals["clips_kept"] - totals["clips_without_caption"]
    shard_bytes = sum(shard["bytes"] for shard in manifest["shards"])
    facts = {
        "video": f"{span(totals['seconds_kept'])} of {span(totals['seconds_read'])} read",
        "frames": count(frames),
        "images": count(totals["images_kept"]) if totals["images_kept"] else "",
        "captions": f"{count(totals['captions'])}, on {plural(captioned, 'clip')}",
        "stored": f"{size(shard_bytes)} in {plural(len(manifest['shards']), 'shard')}",
        "files": f"{count(totals['files_read'])} read, {count(totals['files_left_out'])} left out",
        "written by": f"sora_jax {manifest['version']}",
    }
    terminal.facts(console, facts)
    console.print(_funnel(report))
    terminal.histograms(console, report["histograms"])
    terminal.tallies(console, report["tallies"])
    _clips(report["clips_shown"], console)
    left_out = report["files_left_out"]
    named = [(f["source"], f"{f['stage']}: {f['reason']}") for f in left_out["files"]]
    terminal.named(console, "Files left out", named, totals["files_left_out"], most=NAMED)
    warned = [(f["source"], f["warning"]) for f in report["warnings"]["files"]]
    terminal.named(console, "Used, with a warning", warned, report["warnings"]["count"], most=NAMED)


def _json(path: epath.Path, name: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}/{path.name} cannot be read ({type(error).__name__}); `sora-jax data verify` "
            "tells what else is damaged."
        ) from error


def _local(path: epath.Path) -> Any:
    """A file that numpy can read, wherever `path` lies."""
    return path.open("rb")


def _funnel(report: dict[str, Any]) -> Table:
    totals = report["totals"]
    whole = max(totals["clips_cut"], 1)
    table = Table(title="What each stage kept", **terminal.STYLE)
    table.add_column("stage")
    table.add_column("", no_wrap=True)
    for heading in ("kept", "dropped"):
        table.add_column(heading, justify="right")
    table.add_column("why", style="dim", overflow="fold")
    table.add_row("clips cut", terminal.bar(1, 0), count(totals["clips_cut"]), "", "")
    for stage in report["stages"]:
        if stage["stage"] == "cut" and not stage["dropped"]:
            continue
        reasons = "; ".join(list(stage["reasons"])[:2])
        shape = terminal.bar(stage["kept"] / whole, stage["dropped"] / whole)
        dropped = count(stage["dropped"]) if stage["dropped"] else ""
        style = "" if dropped else "dim"
        why = terminal.plain(reasons)
        table.add_row(
            terminal.plain(stage["stage"]), shape, count(stage["kept"]), dropped, why, style=style
        )
    return table


def _clips(clips: Sequence[dict[str, Any]], console: Console) -> None:
    if not clips:
        return
    few = sorted(clips, key=lambda clip: stable_hash(clip["key"]))[:CLIPS_NAMED]
    table = Table(title="Some clips", show_header=False, **terminal.STYLE)
    table.add_column(ratio=2, overflow="fold")
    table.add_column(ratio=3, overflow="fold")
    for clip in sorted(few, key=lambda clip: clip["key"]):
        what = Text(f"\n{clip['width']}×{clip['height']}, ", style="dim")
        what.append(plural(clip["num_frames"], "frame"))
        if clip["num_frames"] > 1:
            what.append(f" at {clip['fps']:.4g}/s")
        said = Text()
        kinds = [*clip["caption_kinds"], *[""] * len(clip["captions"])]
        for kind, caption in zip(kinds, clip["captions"], strict=False):
            label = terminal.plain(f"{kind}  " if kind else "")
            label.stylize("dim")
            said.append_text(label)
            said.append_text(terminal.plain(caption)).append("\n")
        said.rstrip()
        said = said if clip["captions"] else Text("no caption", style="dim")
        table.add_row(terminal.plain(clip["key"]) + what, said)
    console.print(table)


def _raw(files: list[InputFile], name: str, console: Console) -> None:
    """Counts, durations, sizes and captions of files that nothing was built from yet."""
    captioned = sum(bool(file.captions) for file in files)
    kinds = Tally()
    for file in files:
        for kind, _ in file.captions:
            kinds.add(kind)
    probed, infos, broken = _probe(files)
    seconds = sum(info.seconds for info in infos)
    images = sum(info.is_image for info in infos)
    terminal.heading(console, name, f"{plural(len(files), 'file')}, nothing built from them yet")
    some = f" (of {count(probed)} looked at)" if probed < len(files) else ""
    facts = {
        "videos": f"{count(len(infos) - images)}{some}",
        "images": f"{count(images)}{some}" if images else "",
        "duration": f"{span(seconds)}, as declared" if seconds else "",
        "captions": f"{count(captioned)} of {plural(len(files), 'file')} have one",
        "unreadable": f"{count(len(broken))}{some}",
    }
    terminal.facts(console, facts)
    histograms = {
        "duration": Linear(0.05, 100_000, "seconds"),
        "aspect": Log(-4, 4, "width / height", per_octave=8, centred=True),
        "caption": Linear(1, 2_000, "words"),
    }
    tallies = {"size": Tally(), "fps": Tally(), "codec": Tally(), "caption_kind": kinds}
    for info in infos:
        histograms["aspect"].add(info.width / info.height)
        tallies["size"].add(f"{info.width}×{info.height}")
        tallies["codec"].add(info.codec)
        if not info.is_image:
            histograms["duration"].add(info.seconds)
            tallies["fps"].add(f"{info.fps:.2f}".rstrip("0").rstrip("."))
    for file in files:
        for _, text in file.captions:
            histograms["caption"].add(len(text.split()))
    terminal.histograms(console, {n: h.as_dict() for n, h in histograms.items() if h})
    terminal.tallies(console, {n: tally.as_dict() for n, tally in tallies.items()})
    terminal.named(console, "Unreadable", broken, len(broken), most=NAMED)


def _probe(files: Sequence[InputFile]) -> tuple[int, list[MediaInfo], list[tuple[str, str]]]:
    """How many files were looked at, what those that open hold, and why the others do not."""
    chosen = Sample(PROBED)
    for file in files:
        if not places.is_remote(file.path):
            chosen.add(file.key, file)
    chosen = list(chosen)
    infos, broken = [], []
    with concurrent.futures.ThreadPoolExecutor(PROBES_AT_ONCE) as pool:
        for file, found in zip(chosen, pool.map(_probe_one, chosen), strict=True):
            if isinstance(found, MediaInfo):
                infos.append(found)
            else:
                broken.append((file.key, found))
    return len(chosen), infos, broken


def _probe_one(file: InputFile) -> MediaInfo | str:
    try:
        with Media(file.path) as media:
            return media.info
    except ValueError as error:
        return str(error)
