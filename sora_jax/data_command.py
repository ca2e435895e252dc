"""`sora-jax data build|inspect|verify`: parses, and makes one call each."""

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
        help="folder, quoted pattern, list of files (.txt) or manifest (.csv .jsonl .parquet)",
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
    del report
    print(os.path.join(args.out, "report.html"))


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
