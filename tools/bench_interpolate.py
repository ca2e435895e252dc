"""Compares frames between frames with true renderings at twice the rate.

python tools/bench_interpolate.py [--checkpoint DIR] [--videos 16] [--strengths 0.1 0.35 0.6]
    [--out FILE.png]

Of the frames between alone: PSNR, the 99th percentile of gradients over the truth's, and whether
the oracle reads shape and verb of them. Blended frames, moved ones (`generate.between`), and these
drawn anew.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

STILL = ("stays",)  # whose frames are all alike


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="paperworld")
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.1, 0.35, 0.6])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a picture: the worst moved frame, each way")
    return parser.parse_args(arguments)


def edges(frames: np.ndarray) -> float:
    grey = frames.astype(np.float32).mean(axis=-1)
    return float(np.percentile(np.hypot(*np.gradient(grey, axis=(1, 2))), 99))


def error(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error of each frame."""
    return np.mean(np.square(frames.astype(np.float32) - truth), axis=(1, 2, 3))


def main() -> None:
    args = parse()

    import sora_jax
    from sora_jax import cli
    from sora_jax.data.paperworld.render import render
    from sora_jax.data.paperworld.source import seen_prompts
    from sora_jax.evaluate import scores
    from sora_jax.evaluate.intervals import median_interval
    from sora_jax.generate.between import between
    from sora_jax.generate.denoise import check_strength
    from sora_jax.generate.tasks import interpolate
    from sora_jax.video_io.sheet import save_image

    try:
        for strength in args.strengths:
            check_strength(strength)
    except ValueError as refused:
        print(f"bench_interpolate: {refused}", file=sys.stderr)
        sys.exit(2)
    cli.setup_jax()
    pipe, found, shown = sora_jax.load(args.checkpoint), {}, []
    moving = [
        prompt
        for prompt in seen_prompts(3 * args.videos, seed=args.seed)
        if prompt.scene.subject.verb not in STILL
    ][: args.videos]
    for i, (text, scene) in enumerate(moving):
        clip = render(scene)
        shots = tuple(dataclasses.replace(s, frames=2 * s.frames - 1) for s in scene.shots)
        truth = render(dataclasses.replace(scene, fps=2 * scene.fps, shots=shots))
        blended = np.rint((clip[:-1].astype(np.float32) + clip[1:]) / 2).astype(np.uint8)
        ways = {"blended": blended, "moved": between(clip, 2)[1::2]}
        for strength in args.strengths:
            made = interpolate(pipe, text, clip, strength=strength, seed=i)
            ways[f"drawn anew, {strength:g}"] = made.frames[1::2]
        for name, frames in (ways | {"truth": truth[1::2]}).items():
            right = scores.judge(frames, scene)["right"]
            row = {
                "PSNR, dB": float(
                    10 * np.log10(255**2 / max(error(frames, truth[1::2]).mean(), 1e-9))
                ),
                "edges": edges(frames) / edges(truth[1::2]),
                "shape": float(right["shape"]),
                "verb": float(right["verb"]),
            }
            found.setdefault(name, []).append(row)
        worst = int(error(ways["moved"], truth[1::2]).argmax())
        row = [*ways.values(), truth[1::2]]
        shown.append(np.concatenate([frames[worst] for frames in row], axis=1))
        print(f"{i + 1}/{len(moving)} videos", file=sys.stderr, flush=True)
    for name, rows in found.items():
        told: dict[str, object] = {"way": name}
        for key in ("PSNR, dB", "edges"):
            values = [row[key] for row in rows]
            ends = median_interval(values) or ()
            told[key] = [round(float(v), 2) for v in (np.median(values), *ends)]
        for key in ("shape", "verb"):
            told[key] = round(float(np.mean([row[key] for row in rows])), 3)
        print(json.dumps(told))
    if args.out is not None:
        save_image(args.out, np.concatenate(shown))


if __name__ == "__main__":
    main()
