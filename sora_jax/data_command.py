"""`sora-jax data build|cache|inspect|verify`: parses, and makes one call each."""

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

BUILD_EXAMPLES = """Killed or stopped, the same command goes on. Captions come from name.txt or
name.json beside each video, from a manifest (.csv .jsonl .parquet with columns path and caption or
captions, and start and end in seconds where wanted), or from a model (config.caption.model)."""


def add(actions: Any, command: Callable[..., Any]) -> None:
    """Adds the actions of `data` to the parser; `command` is the CLI's own helper."""
    build = command(actions, "build", run_build, "Make shards of clips out of raw videos.")
    build.epilog = BUILD_EXAMPLES
    build.add_argument(
        "--input",
        required=True,
        metavar="DIR|GLOB|LIST",
        help="folder, quoted pattern, list of files (.txt; # begins a comment) or manifest "
        "(.csv .jsonl .parquet)",
    )
    build.add_argument("--out", required=True, metavar="DIR", help="new folder, here or on gs://")
    build.add_argument(
        "--config",
        metavar="FILE[:VARIANT]",
        help="settings of the stages (configs/data.py); any may be set by --config.STAGE.KEY=VALUE",
    )
    build.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    build.add_argument(
        "--captions",
        default="error",
        choices=("error", "drop", "allow"),
        help="what to do about files without one (default: error)",
    )
    build.add_argument(
        "--runner",
        default="local",
        metavar="NAME",
        help="an Apache Beam runner: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner",
    )
    build.add_argument(
        "--runner-options",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="Beam's own, as in --runner-options='--project=NAME --region=NAME'",
    )
    cache = command(
        actions, "cache", run_cache, "Encode clips once, for training that reads latents."
    )
    what = cache.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="DIR", help="what `sora-jax data build` made")
    what.add_argument(
        "--config", metavar="FILE[:VARIANT]", help="any other source: the data of a run's config"
    )
    cache.add_argument("--checkpoint", required=True, metavar="DIR", help="whose VAE encodes")
    cache.add_argument("--out", required=True, metavar="DIR", help="new folder")
    cache.add_argument(
        "--text", action="store_true", help="encode captions too, by the checkpoint's text encoder"
    )
    cache.add_argument(
        "--pictures",
        choices=("first", "first_last"),
        help="for image-to-video models: encode what these frames show, and their features by the "
        "image encoder of the checkpoint or of config.image_checkpoint, where there is one",
    )
    cache.add_argument("--clips", type=int, metavar="N", help="the first N (all)")
    cache.add_argument(
        "--frames", type=int, metavar="N", help="of --data: at most so many a clip (all)"
    )
    cache.add_argument(
        "--fps", type=float, metavar="RATE", help="of --data: resampled to (their own)"
    )
    cache.add_argument(
        "--shard-clips", type=int, default=512, metavar="N", help="clips a file (default: 512)"
    )
    look = command(actions, "inspect", run_inspect, "Show what is in a built set, and why.")
    look.add_argument("folder", metavar="DIR")
    check = command(actions, "verify", run_verify, "Check a built set against its checksums.")
    check.add_argument("folder", metavar="DIR")


def run_build(args: Namespace) -> None:
    from sora_jax.data.build.run import build

    report = build(
        args.input,
        args.out,
        _settings(args),
        workers=args.workers,
        captions=args.captions,
        runner=args.runner,
        runner_options=args.runner_options,
    )
    totals = report["totals"]
    print(
        f"{totals['clips_kept']} clips of {totals['files']} files "
        f"({totals['files_left_out']} left out): {os.path.join(args.out, 'report.html')}"
    )


def run_cache(args: Namespace) -> None:
    if args.data and args.overrides:
        raise ValueError(f"--config.{args.overrides[0]} needs --config FILE, not --data.")
    for name in ("clips", "frames", "fps"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(
                f"--{name} {value:g} is out of range; use more than 0, or leave it out: then it "
                f"is {'their own' if name == 'fps' else 'all'}."
            )
    if args.config and (args.frames or args.fps):
        raise ValueError(
            "--frames and --fps are for --data; set --config.data.frames and --config.data.fps."
        )
    from sora_jax import checkpoint_path
    from sora_jax.convert import folder
    from sora_jax.train import frozen, latent_cache

    checkpoint, image = checkpoint_path(args.checkpoint), ""
    if args.pictures and "image" in folder.held(checkpoint):
        image = checkpoint
    if args.config:
        from sora_jax import config_file
        from sora_jax.data import mixture, sources

        config = config_file.load(args.config, args.overrides)
        if args.pictures and not image and config.image_checkpoint:
            image = frozen.path_of(config, "image_checkpoint")
        data = config.data
        source = mixture.make_mixture(
            data, lambda part: sources.make_source({**part, "random_start": False})
        )
    else:
        source = latent_cache.clips_for(
            args.data, args.checkpoint, frames=args.frames or 0, fps=args.fps or 0.0
        )
    found = latent_cache.build(
        source,
        checkpoint,
        args.out,
        clips=args.clips or 0,
        text_folder=checkpoint if args.text else "",
        pictures=args.pictures or "",
        image_folder=image,
        shard_clips=args.shard_clips,
    )
    beside = ""
    if args.pictures:
        seen = "seen by the image encoder" if image else "and no image encoder's features of them"
        beside = f", with the pictures of {args.pictures}, {seen}"
    print(f"{args.out}: latents of {len(found)} clips{beside}.")


def run_inspect(args: Namespace) -> None:
    from sora_jax.data.build.inspect import inspect

    inspect(args.folder)


def run_verify(args: Namespace) -> None:
    from sora_jax.data.build.run import verify

    manifest = verify(args.folder)
    print(f"{args.folder}: {manifest['records']} clips in {len(manifest['shards'])} shards, whole.")


def _settings(args: Namespace) -> Any:
    from sora_jax import config_file
    from sora_jax.data.build.settings import BuildSettings

    if args.config:
        return BuildSettings.from_config(config_file.load(args.config, args.overrides))
    if args.overrides:
        raise ValueError(f"--config.{args.overrides[0]} needs --config FILE, say configs/data.py.")
    return BuildSettings()
