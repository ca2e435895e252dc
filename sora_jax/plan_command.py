"""`sora-jax plan`: parses, and makes one call."""

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  sora-jax plan --config configs/t2v_5b.py --topology v5p:4x4x8
  sora-jax plan --config configs/t2v_14b.py --topology v5p:8x8x8 --only train --price 4.2
  sora-jax plan --config configs/t2v_1_3b.py --topology v6e:8x8 --search --compile 3

Topologies: v5p and tpu7x of three dimensions, v5e and v6e of two, in chips. All times are
predicted: nothing runs on a chip."""
_COMPILED = 2  # of a search's best
_SEARCHED = ("batch_size", "dit.remat", "mesh")  # keys that a search chooses


def add(commands: Any, command: Callable[..., Any]) -> None:
    """Adds `plan` to the parser; `command` is the CLI's own helper."""
    plan = command(
        commands,
        "plan",
        run,
        "Compile a config's real steps for a TPU slice that is not there: does it fit, how fast.",
    )
    plan.epilog = EXAMPLES
    plan.formatter_class = _raw()
    plan.add_argument("--config", required=True, metavar="FILE[:VARIANT]")
    plan.add_argument(
        "--topology",
        metavar="CHIP:SHAPE",
        help="such as v5p:4x4x8 or tpu7x:2x2x1 (default: the one that the config is for)",
    )
    plan.add_argument(
        "--slices", type=int, default=1, metavar="N", help="joined by mesh.data over the network"
    )
    plan.add_argument("--only", choices=("train", "sample"), help="one of the two steps")
    plan.add_argument(
        "--decode", action="store_true", help="compile the VAE's decoder too, which takes minutes"
    )
    plan.add_argument(
        "--search",
        action="store_true",
        help="rank meshes, remat policies and batch sizes by predicted tokens a second",
    )
    plan.add_argument(
        "--compile",
        type=int,
        metavar="N",
        help=f"of --search: how many of the best are compiled (default: {_COMPILED})",
    )
    plan.add_argument(
        "--compare",
        metavar="FILE[:VARIANT]",
        help="plan this config too, side by side; --config.KEY=VALUE is set in both",
    )
    plan.add_argument("--price", type=float, metavar="USD", help="of one chip for one hour")
    plan.add_argument("--json", metavar="FILE", help="write the plan there too")


def _raw():
    import argparse

    return argparse.RawDescriptionHelpFormatter


def run(args: Namespace) -> None:
    from sora_jax import config_file

    config = config_file.load(args.config, args.overrides)
    name = args.topology or config_file.topology(args.config)
    _check(args)
    other = config_file.load(args.compare, args.overrides) if args.compare else None
    from sora_jax.plan import planning, report, search

    options = {"slices": args.slices, "only": args.only, "price": args.price}
    options["decode"] = args.decode
    if args.search:
        result = search.search(
            config,
            name=args.config,
            topology_name=name,
            slices=args.slices,
            top=args.compile or _COMPILED,
            price=args.price,
        )
        search.show(result)
    else:
        result = planning.plan(config, name=args.config, topology_name=name, **options)
        if other is None:
            report.show(result)
        else:
            second = planning.plan(other, name=args.compare, topology_name=name, **options)
            result = {"plans": [result, second]}
            report.compare(result["plans"])
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    plans = result.get("plans", [result])
    if not any(fits(plan) for plan in plans):
        raise ValueError(shortage(plans[0]))


def _check(args: Namespace) -> None:
    """Raises ValueError for values that are none, and for what another option leaves no part."""
    from sora_jax import video_io

    if args.price is not None and not 0 <= args.price < math.inf:
        raise ValueError(f"--price {args.price:g} must be 0 or more, in dollars.")
    if args.compile is not None and args.compile < 1:
        raise ValueError(f"--compile {args.compile} must be 1 or more.")
    if args.json:
        video_io.check_output_path(args.json, allowed=(".json",))
    if args.compare and args.search:
        raise ValueError("--compare and --search do not go together; leave out one.")
    if args.compile and not args.search:
        raise ValueError("--compile is how many of a --search are compiled; leave out one.")
    if args.search and (args.only == "sample" or args.decode):
        given = "--decode" if args.decode else "--only sample"
        raise ValueError(f"--search ranks training steps, of which {given} is none; leave out one.")
    keys = [override.partition("=")[0] for override in args.overrides]
    chosen = [key for key in keys for own in _SEARCHED if key == own or key.startswith(f"{own}.")]
    if args.search and chosen:
        raise ValueError(
            f"--search tries meshes, remat policies and batch sizes; leave out "
            f"--config.{chosen[0]}."
        )
    if args.only == "train" and args.decode:
        raise ValueError("--decode is of sampling, which --only train leaves out; leave out one.")
    if args.only == "sample" and args.price is not None:
        raise ValueError("--price is of training, which --only sample leaves out; leave out one.")
    if args.only == "sample" and args.slices > 1:
        raise ValueError("--only sample is of one slice; leave out --slices.")


def fits(plan: dict[str, Any]) -> bool:
    return all(plan[kind]["fits"] for kind in ("train", "sample") if kind in plan)


def shortage(plan: dict[str, Any]) -> str:
    """One line: how much memory is missing, and what helps most."""
    kind = next(k for k in ("train", "sample") if k in plan and not plan[k]["fits"])
    part, limit = plan[kind], plan["hbm_gib"]
    where = part.get("topology", plan["topology"])
    needed = part["needed_gib"]
    what = part.get("part", f"the {kind} step")
    return (
        f"{what} of {plan['config']} does not fit {where}: it needs {needed:.1f} GiB a "
        f"device, {needed - limit:.1f} more than the {limit:.1f} that there are; what helps most "
        f"is {part['knob']}, by about {part['knob_gib']:.1f} GiB."
    )


def prepare(args: Namespace) -> None:
    """What must come before jax is imported.

    Raises:
      ValueError: libtpu is not installed, or there is no such topology.
    """
    from sora_jax.plan import topology

    if args.topology:
        topology.parse(args.topology)
    topology.prepare()
