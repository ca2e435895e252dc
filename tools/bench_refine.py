"""Compares refined videos with cubic enlargement, by true renderings at the larger size.

python tools/bench_refine.py [--checkpoint DIR] [--videos 8] [--strengths 0.2 0.35 0.5]

Frames of every way: energy above half of the highest frequency against the truth's in dB (0 is as
much), how far that energy is where the truth has it (correlation), the 99th percentile of
gradients over the truth's, and PSNR; medians of videos, with 95 % intervals from six videos on.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import numpy as np

SCALE = 2


def grey(frames: np.ndarray) -> np.ndarray:
    return frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def fine(frames: np.ndarray) -> np.ndarray:
    """What is above half of the highest frequency along either axis."""
    spectrum = np.fft.fft2(grey(frames))
    rows, columns = (np.abs(np.fft.fftfreq(n)) for n in spectrum.shape[1:])
    return np.fft.ifft2(spectrum * (np.maximum(rows[:, None], columns) > 0.25)).real


def edges(frames: np.ndarray) -> float:
    rows, columns = np.gradient(grey(frames), axis=(1, 2))
    return float(np.percentile(np.hypot(rows, columns), 99))


def compare(frames: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    ours, theirs = fine(frames), fine(truth)
    error = np.mean(np.square(frames.astype(np.float32) - truth))
    return {
        "fine, dB": float(10 * np.log10(np.mean(ours**2) / np.mean(theirs**2))),
        "correlation": float(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]),
        "edges": edges(frames) / edges(truth),
        "PSNR, dB": float(10 * np.log10(255**2 / error)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="paperworld")
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.2, 0.35, 0.5])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a picture of the middle frames, as .png")
    args = parser.parse_args()

    import sora_jax
    from sora_jax import cli
    from sora_jax.data.paperworld.render import render
    from sora_jax.data.paperworld.source import seen_prompts
    from sora_jax.evaluate.intervals import median_interval
    from sora_jax.generate.refine import enlarged, refine
    from sora_jax.generate.video import to_bytes
    from sora_jax.video_io.sheet import save_image

    cli.setup_jax()
    pipe = sora_jax.load(args.checkpoint)
    found, shown = {}, []
    for i, (text, scene) in enumerate(seen_prompts(args.videos, seed=args.seed)):
        clip = render(scene)
        size = {"width": SCALE * scene.width, "height": SCALE * scene.height}
        truth = render(dataclasses.replace(scene, **size))
        large = functools.partial(enlarged, clip, scale=SCALE, multiple=pipe.cell[1:])
        ways = {"cubic": large(sharpen=False), "cubic, sharpened": large()}
        for strength in args.strengths:
            video = refine(pipe, text, clip, scale=SCALE, strength=strength, seed=i)
            ways[f"refined, {strength:g}"] = video.frames
        draft = ways["cubic, sharpened"]
        through, before = (pipe.decode(pipe.encode(v[None]))[0] for v in (truth, draft))
        ways["truth through the VAE"] = to_bytes(through)
        # The most that refining can do: it changes the enlargement by what the VAE can tell.
        ways["its change of the sharpened"] = to_bytes(draft / 127.5 - 1 + through - before)
        for name, frames in ways.items():
            found.setdefault(name, []).append(compare(frames, truth))
        row = [*ways.values(), truth]
        shown.append(np.concatenate([frames[len(frames) // 2] for frames in row], axis=1))
        print(f"{i + 1}/{args.videos} videos", file=sys.stderr, flush=True)
    for name, rows in found.items():
        told = {}
        for key in rows[0]:
            values = [row[key] for row in rows]
            told[key] = [
                round(float(v), 3) for v in (np.median(values), *(median_interval(values) or ()))
            ]
        print(json.dumps({"way": name} | told))
    if args.out is not None:
        save_image(args.out, np.concatenate(shown))


if __name__ == "__main__":
    main()
