"""Times sampling with the feature cache and without, in turns, and scores what both make.

python tools/bench_cache.py --thresholds 0.05 0.07 0.1 --fewer-steps 12 --prompts 64
python tools/bench_cache.py --thresholds --guidance-intervals 0.3,1 0,0.9  # guidance there alone

Each batch of prompts is made in every way before the next one, so that a machine's ups and downs
fall on all alike; times and ratios are medians over batches.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def interval(text: str) -> tuple[float, float]:
    lo, hi = map(float, text.split(","))
    return lo, hi


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="paperworld", help="folder or shipped name")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.05, 0.07, 0.1, 0.15])
    parser.add_argument(
        "--fewer-steps", type=int, nargs="*", default=[], help="also without cache in so many"
    )
    parser.add_argument(
        "--guidance-intervals",
        type=interval,
        nargs="*",
        default=[],
        metavar="LO,HI",
        help="also without cache, guided at these flow times alone",
    )
    parser.add_argument("--prompts", type=int, default=64, help="videos made in each way")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=1, help="of scenes and noise; eval uses 0")
    parser.add_argument("--split", choices=("seen", "heldout"), default="heldout")
    parser.add_argument("--out", type=Path, help="also write the rows here, as .json")
    return parser.parse_args(arguments)


class Timed:
    """A pipeline that keeps the seconds of the last run's stages."""

    def __init__(self, pipe):
        self._pipe, self.seconds = pipe, {}

    def __getattr__(self, name):
        return getattr(self._pipe, name)

    def run(self, requests):
        return self._pipe.run(requests, on_stage=self.seconds.__setitem__)


class Way:
    """What was made with some settings: seconds (denoising, all) a batch, records, PSNR in dB."""

    def __init__(self, pipe: Timed, **options: Any):
        self._pipe, self.options = pipe, options
        self.seconds, self.records, self.psnr = [], [], []

    def make(self, prompts, seed: int):
        """Frames and records of one batch."""
        import numpy as np

        from sora_jax.evaluate.paperworld import score_prompts

        frames = []
        section = score_prompts(
            self._pipe,
            prompts,
            first_seed=seed,
            batch_size=len(prompts),
            options=self.options,
            on_video=lambda record, video: frames.append(video),
        )
        return np.stack(frames), section["records"]

    def row(self, exact: "Way") -> dict[str, Any]:
        import numpy as np

        from sora_jax.evaluate import scores

        request = self._pipe.request("a", **self.options)
        rates = scores.rates(self.records)
        pairs = [
            (before["right"][name], after["right"][name])
            for before, after in zip(exact.records, self.records, strict=True)
            for name in scores.ATTRIBUTES
        ]
        return {
            "threshold": request.cache_threshold,
            "steps": request.steps,
            "computed": int(self._pipe.denoise.computed(request).sum()),
            "guidance_interval": list(request.guidance_interval),
            "forwards": self._pipe.denoise.forwards(request),
            "seconds": np.median(self.seconds, axis=0).tolist(),
            "faster": np.median(np.divide(exact.seconds, self.seconds), axis=0).tolist(),
            "psnr": float(np.median(self.psnr)),
            "lost": sum(before and not after for before, after in pairs),
            "won": sum(after and not before for before, after in pairs),
            **{name: rates[name]["rate"] for name in (*scores.ATTRIBUTES, "all")},
        }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way, without the cache first.

    Raises:
      ValueError: a setting out of range, or prompts that fill no whole batches.
    """
    import sora_jax
    from sora_jax.evaluate import paperworld
    from sora_jax.progress import Progress

    if args.prompts < 1 or args.batch_size < 1 or args.prompts % args.batch_size:
        raise ValueError(f"--prompts {args.prompts} must be a multiple of --batch-size.")
    pipe = Timed(sora_jax.load(args.checkpoint))
    options = [{"cache_threshold": t, "steps": args.steps} for t in (0.0, *args.thresholds)]
    options += [{"steps": n} for n in args.fewer_steps]
    options += [{"guidance_interval": i, "steps": args.steps} for i in args.guidance_intervals]
    ways = [Way(pipe, **o) for o in options]
    for way in ways:
        pipe.request("a check", **way.options)
    settings = paperworld.scene_settings(pipe)
    prompts = paperworld.SPLITS[args.split](args.prompts, settings=settings, seed=args.seed)
    batches = list(paperworld.batches(prompts, args.batch_size))
    with Progress("batches", total=len(ways) * (1 + len(batches)), unit="batches") as progress:
        for number, way in enumerate(ways):  # compiles
            way.make(batches[0], args.seed)
            progress.update(number + 1)
        for i, batch in enumerate(batches):
            exact = None
            for number, way in enumerate(ways):
                frames, records = way.make(batch, args.seed + i * args.batch_size)
                exact = frames if exact is None else exact
                way.records += records
                way.psnr += paperworld.psnr(frames, exact)
                way.seconds.append((pipe.seconds["denoise"], sum(pipe.seconds.values())))
                progress.update(len(ways) * (1 + i) + number + 1)
    return [way.row(ways[0]) for way in ways]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    from sora_jax.evaluate import scores

    names = (*scores.ATTRIBUTES, "all")
    heads = ["threshold", "guided", "blocks run", "denoising, s", "in all, s", "PSNR, dB", *names]
    lines = [[*heads, "attributes lost, won"], ["---"] * (len(heads) + 1)]
    for row in rows:
        times = [f"{s:.2f} ({f:.2f})" for s, f in zip(row["seconds"], row["faster"], strict=True)]
        lines.append(
            [
                f"{row['threshold']:g}",
                "{:g} to {:g}".format(*row["guidance_interval"]),
                f"{row['computed']} of {row['steps']}",
                *times,
                "exact" if row is rows[0] else f"{row['psnr']:.1f}",
                *(f"{row[name]:.3f}" for name in names),
                f"{row['lost']}, {row['won']}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(name: str, parse: Callable, measure: Callable, table: Callable) -> int:
    """A benchmark's command: rows as a table, and as JSON where `--out` asks for it."""
    from sora_jax import video_io
    from sora_jax.cli import setup_jax

    try:
        args = parse()
        setup_jax()
        if args.out:
            video_io.check_output_path(args.out, allowed=(".json",))
        rows = measure(args)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if args.out:
        with video_io.atomic_path(args.out) as temporary:
            temporary.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run("bench_cache", parse, measure, table))
