"""What `sora-jax storyboard` does: a plan of a file of shots, or their film."""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any


def add(commands, command) -> None:
    """The subcommand and its arguments."""
    sub = command(commands, "storyboard", run, "Render a file of shots as one film.")
    sub.add_argument("file", metavar="FILE", help=".yaml or .json; docs/tasks.md has the fields")
    sub.add_argument("--out", metavar="FILE", help=".mp4 .webm .gif .webp .png")
    sub.add_argument("--plan", action="store_true", help="print what would be rendered, and stop")
    sub.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    sub.add_argument("--guidance", type=float, metavar="SCALE")
    sub.add_argument("--sheet", action="store_true", help="also write a contact sheet PNG")
    sub.add_argument(
        "--checkpoint",
        default="paperworld",
        metavar="DIR",
        help="folder of weights, hub id, or name of shipped weights (default: paperworld)",
    )


def run(args: Namespace) -> None:
    """Plans, or renders.

    Raises:
      ValueError: one line: which shot, what is there, what is allowed.
    """
    from rich.console import Console

    import sora_jax
    from sora_jax import task_command, video_io
    from sora_jax.generate import board as boards
    from sora_jax.generate import storyboard
    from sora_jax.progress import LearnedProgress

    board = boards.read(args.file)
    if args.out is None and not args.plan:
        raise ValueError("give --out FILE for the film, or --plan.")
    if args.out is not None:
        video_io.check_output_path(args.out)
    begun = time.perf_counter()
    pipe = sora_jax.load(args.checkpoint, weights=False)
    settings = {"steps": args.steps, "guidance": args.guidance}
    parts = storyboard.plan(pipe, board, **settings)
    console = Console(stderr=not args.plan, highlight=False)
    console.print(_table(pipe, board, parts))
    if args.plan:
        return
    with LearnedProgress("denoising") as progress:
        film = storyboard.render(pipe, board, on_step=progress.on_step, **settings)
        path = task_command.save(film, Path(args.out), sheet=args.sheet)
    print(path)
    console.print(f"in all {time.perf_counter() - begun:.2f} s")


def _table(pipe, board: Any, parts: list[Any]) -> Any:
    from rich.table import Table

    table = Table(
        title=f"{len(parts)} shots, {board.seconds:g} s, "
        f"{sum(part.frames for part in parts)} frames by {pipe.info['checkpoint']}",
        caption=f"{sum(part.tflops for part in parts):.3g} TFLOP of denoising in all",
    )
    table.add_column("shot", justify="right")
    table.add_column("begins")
    table.add_column("prompt", max_width=40)
    for name in ("seconds", "frames", "windows", "TFLOP"):
        table.add_column(name, justify="right")
    for part in parts:
        shot = part.shot
        begins = shot.begins if part.number > 1 else ""
        if begins == "cut":
            begins = f"cut, carries {shot.carry}" if shot.carry else "cut"
        if shot.keyframe is not None:
            begins = f"{begins} {Path(shot.keyframe).name}".strip()
        table.add_row(
            str(part.number),
            begins,
            "\n".join(text for _, text in shot.prompts(board.style)),
            f"{shot.seconds:g}",
            str(part.frames),
            str(part.windows),
            f"{part.tflops:.3g}",
        )
    return table
