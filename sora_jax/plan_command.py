"""`sora-jax plan`: parses, and makes one call."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  sora-jax plan --config configs/t2v_5b.py --topology v5p:4x4x8
  sora-jax plan --config configs/t2v_14b.py --topology v5p:8x8x8 --only train --price 4.2
  sora-jax plan --config configs/t2v_1_3b.py --topology v6e:8x8 --search --config.batch_size=64

Topologies: v5p and tpu7x of three dimensions, v5e and v6e of two, in chips. All times are
predicted: nothing runs on a chip."""


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
        default=2,
        metavar="N",
        help="of --search: how many of the best are compiled (default: 2)",
    )
    plan.add_argument(
        "--compare", metavar="FILE[:VARIANT]", help="plan this config too, side by side"
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
    if args.price is not None and args.price < 0:
        raise ValueError(f"--price {args.price:g} must be 0 or more, in dollars.")
    if args.compile < 1:
        raise ValueError(f"--compile {args.compile} must be 1 or more.")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: no such folder; make it first.")
    other = None
    if args.compare:
        if args.search:
            raise ValueError("--compare and --search do not go together; leave out one.")
        other = config_file.load(args.compare, ())
    if args.search and (args.only == "sample" or args.decode):
        given = "--decode" if args.decode else "--only sample"
        raise ValueError(f"--search ranks training steps, of which {given} is none; leave out one.")
    from sora_jax.plan import planning, report, search

    options = {"slices": args.slices, "only": args.only, "price": args.price}
    options["decode"] = args.decode
    if args.search:
        result = search.search(
            config,
            name=args.config,
            topology_name=name,
            slices=args.slices,
            top=args.compile,
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
