"""The `sora-jax` command: each subcommand parses and makes one call; no logic.

Nothing heavy is imported before a subcommand runs, so that --help answers at once.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

from sora_jax import DTYPES, mistakes, model_arguments, task_arguments

EXAMPLES = """examples:
  sora-jax sample --prompt "a red ball rolls left in the meadow" --out ball.mp4
  sora-jax storyboard film.yaml --out film.mp4
  sora-jax train --config configs/paperworld.py:smoke --workdir runs/smoke
  sora-jax eval --suite paperworld --out scores.json
  sora-jax data build --input videos --out sets/videos
  sora-jax info
"""
CONFIGURED = ("import", "build", "cache")  # the actions that take --config.KEY=VALUE


def parser() -> argparse.ArgumentParser:
    top = mistakes.Parser(
        prog="sora-jax",
        description="Turn sentences into videos, and train the models that do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        *(_add_sample, _add_storyboard, _add_train, _add_plan, _add_eval),
        *(_add_data, _add_info, _add_convert),
    ):
        add(commands)
    return top


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _add_sample(commands) -> None:
    sample = _command(commands, "sample", _sample, "Make videos from sentences.")
    what = sample.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what the video shows, in a sentence")
    what.add_argument(
        "--prompts-file", metavar="FILE", help="one prompt a line; videos are numbered"
    )
    what.add_argument(
        "--again", metavar="FILE", help="make a video again from its .json or its own metadata"
    )
    sample.add_argument(
        "--expand-prompt",
        nargs="?",
        const="auto",
        metavar="WRITER",
        help="write a detailed prompt first: paperworld (built in, for the shipped weights), "
        "http(s)://HOST/v1#MODEL, or the folder of a language model",
    )
    sample.add_argument("--out", required=True, metavar="FILE", help=".mp4 .webm .gif .webp .png")
    sample.add_argument("--image", metavar="FILE", help="picture the video begins with")
    sample.add_argument("--last-image", metavar="FILE", help="picture that it ends with")
    task_arguments.add(sample.add_argument_group("tasks", "videos made from videos and pictures"))
    sample.add_argument("--negative-prompt", metavar="TEXT", help="what to stay away from")
    sample.add_argument("--size", metavar="WxH", help="pixels, for example 64x64")
    sample.add_argument("--frames", type=int, metavar="N", help="1 makes a picture")
    sample.add_argument("--fps", type=float, metavar="RATE", help="frames a second")
    sample.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    sample.add_argument(
        "--guidance", type=float, metavar="SCALE", help="how closely to follow the prompt; 1 is off"
    )
    sample.add_argument(
        "--guidance-2",
        type=float,
        metavar="SCALE",
        help="of the second of two transformers (Wan 2.2 A14B); by default the same",
    )
    sample.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="flow times between which guidance acts, 0 is the video and 1 noise",
    )
    sample.add_argument(
        "--past-guidance-interval",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="the same, in windows of a film that go on from the one before (default: the "
        "checkpoint's)",
    )
    sample.add_argument(
        "--guidance-rescale", type=float, metavar="SHARE", help="0 to 1; against over-saturation"
    )
    sample.add_argument(
        "--guidance-blocks",
        type=int,
        nargs="*",
        metavar="BLOCK",
        help="of the transformer, from 0, in which frames of what is steered away from do not see "
        "each other, for steadier shapes and motion; nothing after it is none",
    )
    sample.add_argument(
        "--guidance-blocks-interval",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="flow times between which that is so",
    )
    sample.add_argument("--shift", type=float, help="moves steps towards noise (larger videos)")
    sample.add_argument("--solver", help="unipc, dpmpp_2m, ab2, heun or euler")
    sample.add_argument(
        "--schedule", help="of the steps: wan, wan_official, flow_match_euler or linear"
    )
    model_arguments.add_cache(sample)
    model_arguments.add_model(sample)
    sample.add_argument("--seed", type=int, help="another seed, another video (default: 0)")
    sample.add_argument(
        "--batch", type=int, default=1, metavar="N", help="videos a prompt, with seeds from --seed"
    )
    sample.add_argument(
        "--noise", metavar="FILE.npy", help="start from this noise: (videos, f, h, w, c)"
    )
    sample.add_argument(
        "--save-latents", metavar="FILE.npy", help="also write the denoised latents, normalised"
    )
    sample.add_argument(
        "--save-text-embeddings", metavar="FILE.npy", help="also write the prompts' embeddings"
    )
    sample.add_argument(
        "--sheet", action="store_true", help="also write a contact sheet PNG beside each video"
    )
    sample.add_argument("--preview", metavar="FILE", help=".png or .webp to watch the first in")


def _add_storyboard(commands) -> None:
    from sora_jax import storyboard_command

    storyboard_command.add(commands, functools.partial(_command, run=_storyboard))


def _add_train(commands) -> None:
    train = _command(
        commands,
        "train",
        _train,
        "Train a model; running the same command again resumes. Any key of the config may be "
        "set with --config.key.path=value.",
    )
    train.add_argument("--config", required=True, metavar="FILE[:VARIANT]")
    train.add_argument(
        "--workdir", required=True, metavar="DIR", help="checkpoints, metrics and previews"
    )
    model_arguments.add_distributed(train)


def _add_plan(commands) -> None:
    from sora_jax import plan_command

    plan_command.add(commands, _command)


def _add_eval(commands) -> None:
    evaluate = _command(commands, "eval", _evaluate, "Score a checkpoint on a suite of prompts.")
    evaluate.add_argument(
        "--suite", default="paperworld", help="paperworld (text to video, the default) or tasks"
    )
    evaluate.add_argument(
        "--tasks", metavar="NAME,...", help="of suite tasks, such as animate,extend (default: all)"
    )
    evaluate.add_argument("--out", required=True, metavar="FILE.json")
    evaluate.add_argument("--prompts", type=int, default=256, help="of each kind (default: 256)")
    evaluate.add_argument("--steps", type=int, metavar="N")
    evaluate.add_argument("--guidance", type=float, metavar="SCALE")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument(
        "--batch", type=int, metavar="N", help="videos made at a time (default: 16)"
    )
    evaluate.add_argument("--dtype", default="float32", choices=DTYPES, help="of matrix products")
    model_arguments.add_checkpoint(evaluate)


def _add_info(commands) -> None:
    info = _command(
        commands, "info", _info, "Show devices, versions, and a checkpoint's parts and costs."
    )
    info.add_argument("--size", metavar="WxH", help="of the video whose cost is shown")
    info.add_argument("--frames", type=int, metavar="N")
    model_arguments.add_checkpoint(info)


def _add_data(commands) -> None:
    from sora_jax import data_command

    data = _command(commands, "data", None, "Build training sets from raw videos.")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    data_command.add(actions, _command)


def _add_convert(commands) -> None:
    convert = _command(commands, "convert", None, "Move weights between formats.")
    actions = convert.add_subparsers(dest="action", required=True, metavar="ACTION")
    export = _command(
        actions, "export", _export, "Write a training run or checkpoint for other software."
    )
    bring = _command(actions, "import", _import, "Bring a checkpoint of another layout into ours.")
    bring.add_argument(
        "--to",
        default="diffusers",
        choices=("diffusers", "run"),
        help="diffusers: a pipeline folder; run: step 0 of a training run, for `train` to go on",
    )
    bring.add_argument(
        "--config", metavar="FILE[:VARIANT]", help="of the run that is to be written"
    )
    export.add_argument(
        "--to",
        default="diffusers",
        choices=("diffusers", "wan", "stablehlo", "onnx"),
        help="diffusers: a pipeline folder; wan: single files with official names (ComfyUI); "
        "stablehlo, onnx: programs that run without this package",
    )
    export.add_argument("--size", metavar="WxH", help="of the videos that programs make")
    export.add_argument("--frames", type=int, metavar="N", help="the same")
    export.add_argument("--weights", default="ema", choices=("ema", "raw"), help="of a run")
    for command in (export, bring):
        command.add_argument(
            "--checkpoint", required=True, metavar="DIR", help="a training workdir, or weights"
        )
        command.add_argument("--out", required=True, metavar="DIR")
        command.add_argument(
            "--dtype", default="float32", choices=("float32", "bfloat16", "float16")
        )
        command.add_argument(
            "--max-shard-size", metavar="SIZE", help="of one file, for example 5GB or 500MB"
        )
    bring.set_defaults(dtype=None)
    verify = _command(
        actions, "verify", _verify, "Compare two checkpoints, or runs, tensor by tensor."
    )
    verify.add_argument("first", metavar="A")
    verify.add_argument("second", metavar="B")
    verify.add_argument("--weights", default="ema", choices=("ema", "raw"), help="of a run")


def _sample(args) -> None:
    from sora_jax import sample_command

    _join(args)
    sample_command.run(args)


def _storyboard(args) -> None:
    from sora_jax import storyboard_command

    _join(args)
    storyboard_command.run(args)


def _join(args) -> None:
    """Where --distributed says so, makes this process one of several."""
    if args.distributed:
        from sora_jax import sharding

        sharding.join_processes()
        sys.excepthook = _end_at_once


def _train(args) -> None:
    from sora_jax import allocator, config_file
    from sora_jax.train.loop import train

    allocator.suit_backend()
    _join(args)
    train(config_file.load(args.config, args.overrides), args.workdir)


def _evaluate(args) -> None:
    import sora_jax
    from sora_jax import evaluate, video_io
    from sora_jax.evaluate import report
    from sora_jax.progress import StagedProgress

    evaluate.find_suite(args.suite)
    video_io.check_output_path(args.out, allowed=(".json",))
    options = {"prompts": args.prompts, "seed": args.seed}
    options |= {k: v for k in ("steps", "guidance") if (v := getattr(args, k)) is not None}
    if args.batch is not None:
        options["batch_size"] = args.batch
    if args.tasks is not None:
        options["tasks"] = evaluate.chosen_tasks(args.suite, args.tasks)
    pipeline = sora_jax.load(args.checkpoint, dtype=args.dtype)
    with StagedProgress(unit="videos") as progress:
        options["on_progress"] = progress.on_progress
        result = evaluate.run_suite(args.suite, pipeline, args.out, **options)
    report.print_table(result)


def _info(args) -> None:
    from sora_jax import info, sample_command

    size = sample_command.parse_size(args.size)
    info.show(args.checkpoint, size=size, frames=args.frames)


def _export(args) -> None:
    from sora_jax import sample_command
    from sora_jax.train.export import export, parse_bytes

    written = export(
        args.checkpoint,
        args.out,
        to=args.to,
        weights=args.weights,
        dtype=args.dtype,
        max_shard_size=parse_bytes(args.max_shard_size),
        size=sample_command.parse_size(args.size),
        frames=args.frames,
    )
    print(written)


def _import(args) -> None:
    from sora_jax import import_command

    print(import_command.run(args))


def _verify(args) -> None:
    from sora_jax.train.verify import report

    report(args.first, args.second, weights=args.weights)


def setup_jax() -> None:
    """The persistent compilation cache, and NNX's tree mode."""
    import jax
    from flax import nnx

    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "sora_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _leave_job(text: str) -> None:
    """As one process of several: what all end with is told once; none waits for who goes on."""
    from sora_jax import agreement

    if words := agreement.last_words(text):
        print(f"sora-jax: {words}", file=sys.stderr, flush=True)
    if not agreement.meet("errors", wait=10.0):
        os._exit(2)


def _end_at_once(kind, error, trace) -> None:
    """Of a crash in a job of several processes: JAX would wait five minutes for the others."""
    sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


def _less_memory(command: str) -> str:
    """What to change where a program did not fit."""
    if command == "train":
        return (
            "Lower config.batch_size, set config.dit.remat to 'full', or cut state over more "
            "devices (config.mesh.fsdp); `sora-jax plan` tells what fits and which knob helps most."
        )
    return "Ask for fewer frames, a smaller size or batch, or use --dtype bfloat16."


def main(argv: list[str] | None = None) -> int:
    """Runs the command; a mistake of the caller is one line on stderr and exit status 2."""
    with mistakes.interrupts_come_again():
        return _main(argv)


def _main(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    args = parser().parse_args([a for a in argv if not a.startswith("--config.")])
    args.overrides = overrides
    configured = args.command in ("train", "plan") or getattr(args, "action", "") in CONFIGURED
    if overrides and not configured:
        print(
            f"sora-jax: --config.{overrides[0]} is for `train`, `plan`, `data build`, `data cache` "
            "and `convert import` alone.",
            file=sys.stderr,
        )
        return 2
    try:
        if args.command == "plan":
            from sora_jax import plan_command

            plan_command.prepare(args)
        setup_jax()
        args.run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        text = mistakes.told(error)
        if getattr(args, "distributed", False):
            _leave_job(text)
        else:
            print(f"sora-jax: {text}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # as XLA's are
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = " ".join(str(error).split()).partition("RESOURCE_EXHAUSTED:")[2].strip()
        print(f"sora-jax: no memory: {found[:200]} {_less_memory(args.command)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        if not getattr(interrupt, "quiet", False):
            told = str(interrupt) or "stopped; no partial file is left."
            print(f"sora-jax: {told}", file=sys.stderr)
        return getattr(interrupt, "exit_code", 130)  # a run that SIGTERM ended has its own
    return 0


if __name__ == "__main__":
    sys.exit(main())
