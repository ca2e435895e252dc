"""Prints how guidance and the number of steps change what the oracle reads, best row first.

python tools/sweep_guidance.py --checkpoint paperworld --guidance 1 2 3 5 --steps 10 20 30
"""

import argparse
import json
import sys
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="paperworld", help="folder or shipped name")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 1.5, 2, 3, 4, 6])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 30])
    parser.add_argument(
        "--blocks",
        nargs="+",
        metavar="BLOCK,...",
        default=[None],
        help="of guidance: such as 4, or 3,4, or none (default: the checkpoint's)",
    )
    parser.add_argument("--prompts", type=int, default=64, help="videos for each row")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1, help="of scenes and noise; eval uses 0")
    parser.add_argument(
        "--split",
        choices=("seen", "heldout"),
        default="seen",
        help="tuning on held-out prompts spoils them as a test",
    )
    parser.add_argument("--out", type=Path, help="also write the rows here, as .json")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    from rich.console import Console
    from rich.table import Table

    import sora_jax
    from sora_jax import video_io
    from sora_jax.evaluate import scores
    from sora_jax.evaluate.sweep import sweep

    names = (*scores.ATTRIBUTES, "all")
    console, errors = Console(), Console(stderr=True)

    def blocks_of(text: str | None) -> tuple[int, ...] | None:
        if text in (None, "none"):
            return None if text is None else ()
        try:
            return tuple(map(int, text.split(",")))
        except ValueError:
            raise ValueError(f"--blocks {text}: give numbers, such as 3,4, or none.") from None

    def cells(row: dict) -> list[str]:
        rates = [f"{row['attributes'][name]['rate']:.3f}" for name in names]
        blocks = row["guidance_blocks"]
        return [
            f"{row['guidance']:g}",
            str(row["steps"]),
            "default" if blocks is None else ",".join(map(str, blocks)) or "none",
            *rates,
            f"{row['seconds_per_video']:.2f}",
        ]

    try:
        if args.out:
            video_io.check_output_path(args.out, allowed=(".json",))
        rows = sweep(
            sora_jax.load(args.checkpoint),
            guidance=args.guidance,
            steps=args.steps,
            blocks=[blocks_of(text) for text in args.blocks],
            prompts=args.prompts,
            batch_size=args.batch_size,
            seed=args.seed,
            split=args.split,
            on_row=lambda row: errors.print(" ".join(cells(row))),
        )
    except ValueError as error:
        errors.print(f"sweep_guidance: {error}", markup=False, soft_wrap=True)
        return 2
    head = ("guidance", "steps", "blocks", *names, "s/video")
    table = Table(*head, title=f"{args.prompts} {args.split}")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    if args.out:
        with video_io.atomic_path(args.out) as temporary:
            temporary.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
