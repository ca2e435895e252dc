"""Times films that keep keys and values of their past, and ones that do not, and scores both.

python tools/bench_kv_cache.py --every 2 6 24 --films 24 --seconds 6 [--rolling]

Each batch of films is made in every way before the next one, so that a machine's ups and downs
fall on all alike; times and ratios are medians over batches. PSNR is of the frames after the
first window, against those of every step's own keys and values; the oracle reads the last 2 s.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_cache import run

JUDGED = 17  # frames at the end
ONGOING = ("bounces", "spins", "stays")  # what the end of a film still shows
ATTRIBUTES = ("colour", "shape", "place", "verb")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="paperworld", help="folder or shipped name")
    parser.add_argument("--every", type=int, nargs="+", default=[2, 6, 24], help="--kv-cache")
    parser.add_argument("--films", type=int, default=24, help="made in each way")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rolling", action="store_true", help="one window that rolls")
    parser.add_argument("--seed", type=int, default=5, help="of scenes and noise")
    parser.add_argument("--out", type=Path, help="also write the rows here, as .json")
    args = parser.parse_args(arguments)
    if args.films < 1 or args.batch_size < 1 or args.films % args.batch_size:
        raise ValueError(f"--films {args.films} must be a multiple of --batch-size.")
    return args


@dataclasses.dataclass
class Way:
    """Films made with one `kv_cache`: seconds a film, by batch; what was right; PSNR in dB."""

    every: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    right: list[dict[str, bool]] = dataclasses.field(default_factory=list)
    psnr: list[float] = dataclasses.field(default_factory=list)

    def row(self, exact: "Way") -> dict[str, Any]:
        pairs = [
            (before[name], after[name])
            for before, after in zip(exact.right, self.right, strict=True)
            for name in ATTRIBUTES
        ]
        return {
            "every": self.every,
            "seconds": float(np.median(self.seconds)),
            "faster": float(np.median(np.divide(exact.seconds, self.seconds))),
            "psnr": float(np.median(self.psnr)) if self is not exact else None,
            "psnr_least": min(self.psnr) if self is not exact else None,
            "lost": sum(before and not after for before, after in pairs),
            "won": sum(after and not before for before, after in pairs),
            "films": len(self.right),
            **{name: float(np.mean([r[name] for r in self.right])) for name in ATTRIBUTES},
        }


def films(pipe, prompts: list[Any], args: argparse.Namespace, every: int, seed: int) -> np.ndarray:
    """Frames (b, F, H, W, 3) of a batch."""
    from sora_jax.generate import lengths, rolling, windows

    total, window = lengths.seconds_to_frames(pipe, args.seconds), lengths.window_of(pipe)
    sweep = windows.Sweep(total, window, lengths.overlap_of(pipe, window))
    requests = [
        pipe.request(prompt.text, frames=window, seed=seed + i, kv_cache=every)
        for i, prompt in enumerate(prompts)
    ]
    if args.rolling:
        parts: Iterator[np.ndarray] = rolling.film(pipe, requests, sweep)
    else:
        parts = windows.film(pipe, lambda *_: requests, sweep)
    return np.concatenate(list(parts), axis=1)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way, every step's own keys and values first."""
    import sora_jax
    from sora_jax.data.paperworld.source import seen_prompts
    from sora_jax.evaluate import paperworld, scores
    from sora_jax.generate import lengths
    from sora_jax.progress import Progress

    pipe = sora_jax.load(args.checkpoint)
    ways = [Way(every) for every in (1, *args.every)]
    for way in ways:
        pipe.request("a check", kv_cache=way.every)
    prompts = [
        prompt
        for prompt in seen_prompts(6 * args.films, seed=args.seed)
        if prompt.scene.subject.verb in ONGOING
    ][: args.films]
    first = lengths.window_of(pipe)
    if lengths.seconds_to_frames(pipe, args.seconds) <= first:
        raise ValueError(f"--seconds {args.seconds:g} is one window, which has no past; use more.")
    batches = list(paperworld.batches(prompts, args.batch_size))
    with Progress("batches", total=len(ways) * (1 + len(batches)), unit="batches") as progress:
        for number, way in enumerate(ways):  # compiles
            films(pipe, batches[0], args, way.every, args.seed)
            progress.update(number + 1)
        for i, batch in enumerate(batches):
            exact = None
            for number, way in enumerate(ways):
                begun = time.perf_counter()
                made = films(pipe, batch, args, way.every, args.seed + i * args.batch_size)
                way.seconds.append((time.perf_counter() - begun) / len(batch))
                exact = made if exact is None else exact
                way.psnr += paperworld.psnr(made[:, first:], exact[:, first:])
                judged = [
                    scores.judge(clip[-JUDGED:], prompt.scene)["right"]
                    for clip, prompt in zip(made, batch, strict=True)
                ]
                way.right += [{name: bool(right[name]) for name in ATTRIBUTES} for right in judged]
                progress.update(len(ways) * (1 + i) + number + 1)
    return [way.row(ways[0]) for way in ways]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    heads = ["`--kv-cache`", "a film, s (times as fast)", "PSNR, dB (least)", *ATTRIBUTES]
    lines = [[*heads, "lost, won"], ["---"] * (len(heads) + 1)]
    for row in rows:
        exact = row["psnr"] is None
        near = "exact" if exact else f"{row['psnr']:.1f} ({row['psnr_least']:.1f})"
        rates = [f"{row[name]:.3f}" for name in ATTRIBUTES]
        told = "" if exact else f"{row['lost']}, {row['won']}"
        spent = f"{row['seconds']:.1f} ({row['faster']:.2f})"
        lines.append([str(row["every"]), spent, near, *rates, told])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(run("bench_kv_cache", parse, measure, table))
