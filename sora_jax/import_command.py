"""What `sora-jax convert import` does: a checkpoint of any layout as our folder, or as a run."""

from argparse import Namespace
from pathlib import Path

from sora_jax import config_file
from sora_jax.train.export import export, parse_bytes
from sora_jax.train.loop import begin


def run(args: Namespace) -> Path:
    """Writes the diffusers folder, or step 0 of a training run, that `args` ask for.

    Raises:
      ValueError: one line: what was given, what is allowed, what to change.
    """
    if args.to == "diffusers":
        if args.config or args.overrides:
            raise ValueError("--config is for --to run; leave it out.")
        size = parse_bytes(args.max_shard_size)
        return export(args.checkpoint, args.out, dtype=args.dtype or "float32", max_shard_size=size)
    if not args.config:
        raise ValueError("--to run needs --config FILE: the config that training goes on with.")
    if args.dtype or args.max_shard_size:
        raise ValueError("--dtype and --max-shard-size are for --to diffusers; leave them out.")
    if any(override.startswith("init_from=") for override in args.overrides):
        raise ValueError("--config.init_from is --checkpoint here; leave it out.")
    overrides = [*args.overrides, f"init_from={args.checkpoint}"]
    return begin(config_file.load(args.config, overrides), args.out)
