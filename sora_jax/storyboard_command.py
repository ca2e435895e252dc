"""What `sora-jax storyboard` does: a plan of a file of shots, or their film."""

import dataclasses
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from sora_jax import model_arguments


def add(commands, command) -> None:
    """The subcommand and its arguments."""
    sub = command(commands, "storyboard", text="Render a file of shots as one film.")
    sub.add_argument("file", metavar="FILE", help=".yaml or .json; docs/tasks.md has the fields")
    sub.add_argument("--out", metavar="FILE", help=".mp4 .webm .gif .webp .png")
    sub.add_argument("--plan", action="store_true", help="print what would be rendered, and stop")
    sub.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    sub.add_argument("--guidance", type=float, metavar="SCALE")
    sub.add_argument(
        "--seed", type=int, help="in place of the file's; shots with their own keep it"
    )
    sub.add_argument("--window", type=int, metavar="FRAMES", help="frames seen at once")
    model_arguments.add_cache(sub)
    model_arguments.add_model(sub)
    sub.add_argument("--sheet", action="store_true", help="also write a contact sheet PNG")
    sub.add_argument("--preview", metavar="FILE", help=".png or .webp to watch it in")


def run(args: Namespace) -> None:
    """Plans, or renders.

    Raises:
      ValueError: one line: which shot, what is there, what is allowed.
    """
    from rich.console import Console

    import sora_jax
    from sora_jax import sample_command, video_io
    from sora_jax.generate import board as boards
    from sora_jax.generate import storyboard
    from sora_jax.generate.preview import check_preview, watched
    from sora_jax.generate.video import check_beside
    from sora_jax.progress import LearnedProgress

    board = boards.read(args.file)
    if args.seed is not None:
        board = dataclasses.replace(board, seed=args.seed)
    if args.out is None and not args.plan:
        raise ValueError("give --out FILE for the film, or --plan.")
    writes = sample_command.writes()
    if args.out is not None and writes:
        video_io.check_output_path(args.out)
        check_beside(args.out, sheet=args.sheet)
        if args.preview is not None:
            check_preview(args.preview, out=Path(args.out))
    begun = time.perf_counter()
    pipe = sora_jax.load(
        args.checkpoint,
        loras=args.lora,
        loras_2=args.lora_2,
        dtype=args.dtype or "float32",
        mesh=args.mesh or "auto",
        weights=False,
    )
    if args.out is not None:
        video_io.check_rate(args.out, board.fps or pipe.sampling.fps)
    settings = {"steps": args.steps, "guidance": args.guidance, "window": args.window}
    settings["cache_threshold"], settings["kv_cache"] = args.cache_threshold, args.kv_cache
    storyboard.plan(pipe, board, **settings)  # refuses what cannot be before weights are read
    if not args.plan:
        pipe.load_weights()
    settings["window"] = storyboard.window_of(pipe, board, **settings)
    parts = storyboard.plan(pipe, board, **settings)
    console = Console(stderr=not args.plan, highlight=False, quiet=not writes)
    console.print(_table(pipe, board, parts, saves=_caches(pipe, settings)))
    if args.plan:
        return
    with LearnedProgress("denoising") as progress:
        on_step = watched(pipe, args.preview, progress.on_step, fps=board.fps)
        film = storyboard.render(pipe, board, on_step=on_step, **settings)
        path = sample_command.save(film, Path(args.out), sheet=args.sheet)
    if writes:
        print(path)
    console.print(f"in all {time.perf_counter() - begun:.2f} s")


def _caches(pipe, settings: dict[str, Any]) -> bool:
    """Whether steps leave out a part of the work, as asked or by the checkpoint's settings."""
    names = ("cache_threshold", "kv_cache")
    asked = {name: settings[name] for name in names if settings[name] is not None}
    request = pipe.request("any", **asked)
    return bool(request.cache_threshold) or request.kv_cache > 1


def _table(pipe, board: Any, parts: list[Any], *, saves: bool) -> Any:
    from rich.table import Table

    without = ", less what the caches save" if saves else ""
    table = Table(
        title=f"{len(parts)} shots, {board.seconds:g} s, "
        f"{sum(part.frames for part in parts)} frames by {pipe.info['checkpoint']}",
        caption=f"{sum(part.tflops for part in parts):.3g} TFLOP of denoising in all{without}",
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
