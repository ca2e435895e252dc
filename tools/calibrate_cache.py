"""Measures how fast a checkpoint's features change, and writes it into its sampling.json.

python tools/calibrate_cache.py --checkpoint DIR

`sora-jax sample --cache-threshold` needs it; see sora_jax/diffusion/feature_cache.py.
"""

import argparse
import dataclasses
import sys


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="paperworld", help="folder or shipped name")
    parser.add_argument(
        "--prompts-file", metavar="FILE", help="one prompt a line; default: Paperworld's"
    )
    parser.add_argument("--prompts", type=int, default=16, help="how many of them to use")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=2, help="of the noise; eval uses 0")
    parser.add_argument("--steps", type=int, help="default: twice the checkpoint's")
    parser.add_argument("--image", metavar="FILE", help="for image-to-video models")
    parser.add_argument("--last-image", metavar="FILE", help="the same")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    from pathlib import Path

    from rich.console import Console

    import sora_jax
    from sora_jax import video_io
    from sora_jax.cli import setup_jax
    from sora_jax.convert import folder
    from sora_jax.diffusion import sampler
    from sora_jax.generate import calibration
    from sora_jax.progress import Progress

    errors = Console(stderr=True, highlight=False)
    setup_jax()
    try:
        where = sora_jax.weights_folder(args.checkpoint)
        pipe = sora_jax.load(args.checkpoint)
        steps = args.steps or 2 * pipe.sampling.steps
        once = sampler.num_evaluations(pipe.sampling.solver, 1) == 1
        requests = [
            pipe.request(
                prompt,
                seed=args.seed + i,
                steps=steps,
                cache_threshold=0.0,
                solver=pipe.sampling.solver if once else "unipc",
            )
            for i, prompt in enumerate(_prompts(args, pipe))
        ]
        size = min(args.batch_size, len(requests))
        batches = [requests[i : i + size] for i in range(0, len(requests) - size + 1, size)]
        pictures = [
            None if path is None else video_io.read_video(path, num_frames=1).frames[0]
            for path in (args.image, args.last_image)
        ]
        with Progress("measuring", total=len(batches) * steps) as progress:
            done = iter(range(1, len(batches) * steps + 1))
            curve = calibration.change_curve(
                pipe, batches, pictures=pictures, on_step=lambda: progress.update(next(done))
            )
    except ValueError as error:
        errors.print(f"calibrate_cache: {error}", markup=False, soft_wrap=True)
        return 2
    path = Path(where) / "sampling.json"
    values = folder.read_json(path) if path.is_file() else dataclasses.asdict(pipe.sampling)
    folder.write_json(path, values | {"feature_cache": dataclasses.asdict(curve)})
    print(path)
    return 0


def _prompts(args: argparse.Namespace, pipe) -> list[str]:
    """Raises ValueError where there is none."""
    if args.prompts_file is not None:
        with open(args.prompts_file, encoding="utf-8") as file:
            prompts = [line.strip() for line in file if line.strip()]
    else:
        from sora_jax.data.paperworld.source import seen_prompts
        from sora_jax.evaluate.paperworld import scene_settings

        settings = scene_settings(pipe)
        prompts = [p.text for p in seen_prompts(args.prompts, settings=settings, seed=args.seed)]
    if args.prompts < 1 or not prompts:
        raise ValueError("no prompts; give --prompts 1 or more, and a file with one a line.")
    return prompts[: args.prompts]


if __name__ == "__main__":
    sys.exit(main())
