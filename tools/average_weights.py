"""Averages the weights of several checkpoints of one training into one.

python tools/average_weights.py --checkpoints A B C [--shares .34 .33 .33] --out DIR

Ends of successive runs of one model lie around a better one (Izmailov et al. 2018,
arXiv:1803.05407; Wortsman et al. 2022, arXiv:2203.05482). Everything that is no weight is that of
the first; the result is stored in bfloat16.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from sora_jax.convert import replace, rewrite


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", nargs="+", type=Path, required=True, metavar="DIR")
    parser.add_argument("--shares", nargs="+", type=float, help="default: equal; they add up to 1")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser.parse_args(arguments)


def mean(parts: list[rewrite.Tensors], shares: list[float]) -> rewrite.Tensors:
    """One component; shapes must agree."""
    if any(part.shapes != parts[0].shapes for part in parts):
        raise ValueError("the checkpoints have weights of different names or shapes.")

    def read(key: str) -> np.ndarray:
        return sum(
            part.read(key).astype(np.float32) * np.float32(share)
            for part, share in zip(parts, shares, strict=True)
        )

    return parts[0]._replace(read=read, paths=[path for part in parts for path in part.paths])


def main() -> None:
    args = parse()
    shares = args.shares or [1 / len(args.checkpoints)] * len(args.checkpoints)
    try:
        if len(shares) != len(args.checkpoints) or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"--shares {shares}: give one a checkpoint, which add up to 1.")
        held = [rewrite.parts_of(path) for path in args.checkpoints]
        if any(parts.keys() != held[0].keys() for parts in held):
            raise ValueError("--checkpoints hold other components; give ones of one training.")
        means = {name: mean([parts[name] for parts in held], shares) for name in held[0]}
        replace.write_changed(args.checkpoints[0], args.out, means, dtype="bfloat16")
    except ValueError as error:
        print(f"average_weights: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
