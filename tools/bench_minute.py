"""Measures films of a minute: peak memory against 10 s, what is kept to the end, and drift.

python tools/bench_minute.py [--checkpoint DIR] [--films 16] [--seconds 60] [--rolling]
    [--kv-cache N] [--past-guidance-interval LO HI] [--verbs stays] [--films-only] [--out FILE.json]

Memory: `sora-jax sample --seconds S` in a process of its own, its peak resident size. Films, by
windows one after the other, or in one that rolls: of prompts whose verb goes on, in batches; the
oracle reads colour and shape in the last 2 s, and brightness and saturation there are compared
with those of the first 2 s. Of subjects that stay still, the PSNR of the last frame against one of
the first second. Shares have 95 % intervals.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ONGOING = ("bounces", "spins", "stays")
ENDS = 17  # frames that are judged at each end
EARLY = 8  # the frame that the last one is compared with, where nothing moves
BATCH = 8
TARGETS = {"memory_ratio": 1.1, "kept": 0.9, "drift": 0.1}


def memory(checkpoint: str, seconds: float, extra: list[str]) -> tuple[float, float]:
    """(peak resident GiB, seconds) of the command that makes one film."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "sora_jax.cli", "sample"),
            *("--prompt", "a red ball spins in the meadow", "--checkpoint", checkpoint),
            *("--seconds", str(seconds), "--out", str(Path(folder) / "film.mp4")),
            *extra,
        ]
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        return usage.ru_maxrss / 2**20, time.perf_counter() - begun


def of_memory(args: argparse.Namespace, extra: list[str]) -> dict:
    """What a film of 10 s and one of `args.seconds` take."""
    short, long = (memory(args.checkpoint, seconds, extra) for seconds in (10, args.seconds))
    return {
        "memory_gib": {"10 s": short[0], f"{args.seconds:g} s": long[0]},
        "command_seconds": {"10 s": short[1], f"{args.seconds:g} s": long[1]},
        "memory_ratio": long[0] / short[0],
    }


def films(args: argparse.Namespace) -> list[dict]:
    """What the oracle and plain colours say of both ends of each film."""
    import cv2

    import sora_jax
    from sora_jax import cli
    from sora_jax.data.paperworld.source import seen_prompts
    from sora_jax.evaluate import paperworld, scores
    from sora_jax.generate import lengths, rolling, windows
    from sora_jax.generate.windows import Sweep

    cli.setup_jax()
    pipe, count, seed = sora_jax.load(args.checkpoint), args.films, args.seed
    among = 18 * count // len(args.verbs)
    prompts = [p for p in seen_prompts(among, seed=seed) if p.scene.subject.verb in args.verbs]
    total, window = lengths.seconds_to_frames(pipe, args.seconds), lengths.window_of(pipe)

    def look(frames: np.ndarray) -> tuple[float, float]:
        hsv = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2HSV) for frame in frames])
        return float(hsv[..., 2].mean()), float(hsv[..., 1].mean())

    def apart(frame: np.ndarray, other: np.ndarray) -> float:
        return paperworld.psnr(frame[None, None], other[None, None])[0]

    records = []
    for begin in range(0, count, BATCH):
        chosen = prompts[begin : min(begin + BATCH, count)]
        requests = [
            pipe.request(
                p.text,
                frames=window,
                seed=seed + begin + i,
                kv_cache=args.kv_cache,
                past_guidance_interval=args.past_guidance_interval,
            )
            for i, p in enumerate(chosen)
        ]
        sweep = Sweep(total, window, lengths.overlap_of(pipe, window))
        first = last = None
        clock = time.perf_counter()
        by_windows = lambda *_, r=requests: r  # noqa: E731
        if args.rolling:
            parts = rolling.film(pipe, requests, sweep)
        else:
            parts = windows.film(pipe, by_windows, sweep)
        for part in parts:
            if first is None or first.shape[1] < ENDS:
                first = part if first is None else np.concatenate([first, part], axis=1)
                first = first[:, :ENDS]
            last = part if last is None else np.concatenate([last, part], axis=1)[:, -ENDS:]
        spent = (time.perf_counter() - clock) / len(chosen)
        for prompt, head, tail in zip(chosen, first, last, strict=True):
            right = [scores.judge(clip, prompt.scene)["right"] for clip in (head, tail)]
            looks = np.array([look(clip) for clip in (head, tail)])
            brightness, saturation = np.abs(looks[1] / looks[0] - 1)
            still = prompt.scene.subject.verb == "stays"
            records.append(
                {
                    "prompt": prompt.text,
                    "begin": {name: right[0][name] for name in ("colour", "shape", "place")},
                    "end": {name: right[1][name] for name in ("colour", "shape", "place")},
                    "brightness": float(brightness),
                    "saturation": float(saturation),
                    "psnr": apart(head[EARLY], tail[-1]) if still else None,
                    "seconds": spent,
                }
            )
        print(f"{len(records)}/{count} films", file=sys.stderr, flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="paperworld")
    parser.add_argument("--films", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--rolling", action="store_true", help="one window that rolls")
    parser.add_argument("--kv-cache", type=int, default=1, help="as `sora-jax sample` takes it")
    parser.add_argument("--past-guidance-interval", type=float, nargs=2, help="likewise")
    parser.add_argument("--verbs", nargs="+", choices=ONGOING, default=ONGOING)
    parser.add_argument("--films-only", action="store_true", help="do not measure memory")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    extra = ["--rolling"] if args.rolling else []
    extra += ["--kv-cache", str(args.kv_cache)]
    if args.past_guidance_interval is not None:
        extra += ["--past-guidance-interval", *map(str, args.past_guidance_interval)]
    result = {} if args.films_only else of_memory(args, extra)
    records = films(args)
    from sora_jax.evaluate.scores import rate

    def share(rights: list[bool]) -> dict:
        return rate(sum(rights), len(rights)) if rights else {}

    names = ("colour", "shape", "place")
    stills = [r["psnr"] for r in records if r["psnr"] is not None]
    result |= {
        "begin": {n: share([r["begin"][n] for r in records]) for n in names},
        "end": {n: share([r["end"][n] for r in records]) for n in names},
        # Of what was there at the beginning.
        "kept": {n: share([r["end"][n] for r in records if r["begin"][n]]) for n in names},
        "drift_brightness": float(np.max([r["brightness"] for r in records])),
        "drift_saturation": float(np.max([r["saturation"] for r in records])),
        "drift_within_10_percent": share(
            [max(r["brightness"], r["saturation"]) <= TARGETS["drift"] for r in records]
        ),
        "still_psnr_median": float(np.median(stills)) if stills else None,
        "seconds_per_film": float(np.mean([r["seconds"] for r in records])),
        "targets": TARGETS,
        "films": records,
    }
    text = json.dumps(result, indent=2)
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "films"}, indent=2))


if __name__ == "__main__":
    main()
