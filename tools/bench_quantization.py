"""What 8-bit matrix products do to the training loss: the same steps from the shipped weights.

python tools/bench_quantization.py --steps 40 --workdir runs/quantization

Every run sees the same batches, times and noise; steps are those of configs/paperworld.py:fine with
a small share of its clips. DIR keeps the clips and each run's metrics; the table goes to stdout.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `configs`, which is not installed

from sora_jax import cli, config_file

KINDS = ("none", "int8", "float8")
PARTS = {"clips": 120, "turns": 60, "images": 400}  # of the data, and how many records of each


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2, help="of 576 tokens a step")
    parser.add_argument("--checkpoint", default="paperworld", help="weights to start from")
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    return parser.parse_args(arguments)


def config_of(args: argparse.Namespace, kind: str):
    """The config of one run, which ends before a rate that warms up could hide anything."""
    c = config_file.load(str(Path(__file__).parents[1] / "configs/paperworld.py:fine")).unlock()
    for name, part in list(c.data.parts.items()):
        if name in PARTS:
            part.cache, part.cache_clips = str(args.workdir / name), PARTS[name]
        else:
            del c.data.parts[name]
    c.init_from = c.vae_checkpoint = args.checkpoint
    c.dit.quantization = kind
    c.batch_size, c.num_steps = args.rows, args.steps
    c.log_every, c.sample_every, c.checkpoint_every = 1, 0, args.steps
    c.optim.update(peak_lr=3e-4, warmup_steps=1)
    return c.lock()


def losses(workdir: Path) -> np.ndarray:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row["train/loss"] for row in map(json.loads, lines)}
    return np.array([rows[step] for step in sorted(rows)])


def table(found: dict[str, np.ndarray]) -> list[str]:
    """Markdown; differences are against `none`, step by step."""
    base = found["none"]
    lines = [
        "| `dit.quantization` | mean loss | against bfloat16 | largest difference of a step |",
        "|-|-|-|-|",
    ]
    for kind, values in found.items():
        cells = ["", ""]
        if kind != "none":
            cells = [f"{values.mean() / base.mean() - 1:+.2%}"]
            cells.append(f"{np.abs(values / base - 1).max():.2%}")
        lines.append(f"| `{kind}` | {values.mean():.4f} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    args = parse()
    from sora_jax.train.loop import train

    cli.setup_jax()
    found = {}
    for kind in KINDS:
        workdir = args.workdir / f"run_{kind}"
        train(config_of(args, kind), workdir)
        found[kind] = losses(workdir)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
