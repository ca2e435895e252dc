"""Makes a transformer with patches of 2x2 latents into one with patches of 1x1, to train on.

python tools/halve_patches.py --checkpoint DIR --out DIR

Four tokens stand where one stood. The new one embeds each as the old one embedded four alike, and
gives each the mean of the four velocities. Rows and columns are counted in half the distance, so
each pair of rotary channels takes over from the next faster one, which turns about twice as fast
(2.5 times with heads of 64 channels). What comes out is a beginning that learns quickly, not a
model that works: docs/status.md has the figures.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sora_jax.convert import replace, rewrite
from sora_jax.dit import rope

QUERIES_AND_KEYS = ("attn1.to_q.", "attn1.to_k.", "attn1.norm_q.", "attn1.norm_k.")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser.parse_args(arguments)


def halve(part: rewrite.Tensors) -> rewrite.Tensors:
    """The transformer with a token for each latent.

    Raises:
      ValueError: patches of another size.
    """
    config = part.config
    if tuple(config.patch_size) != (1, 2, 2):
        raise ValueError(f"patches of {tuple(config.patch_size)} latents; (1, 2, 2) can be halved.")
    order = channels(config.num_heads, config.head_dim)
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "patch_embedding.weight": lambda w: w.sum(axis=(-2, -1), keepdims=True),
        "proj_out.weight": lambda w: w.reshape(4, -1, w.shape[1]).mean(axis=0),
        "proj_out.bias": lambda b: b.reshape(4, -1).mean(axis=0),
    }
    for key in part.shapes:
        if any(name in key for name in QUERIES_AND_KEYS):
            changes[key] = lambda x: x[order]
    example = {key: how(np.empty(part.shapes[key])).shape for key, how in changes.items()}

    def read(key: str) -> np.ndarray:
        values = part.read(key)
        return changes[key](values.astype(np.float32)) if key in changes else values

    halved = dataclasses.replace(config, patch_size=(1, 1, 1))
    return rewrite.Tensors(halved, part.shapes | example, read, part.paths)


def channels(num_heads: int, head_dim: int) -> np.ndarray:
    """Which channel of all heads each one takes over from."""
    order, start = np.arange(head_dim), 0
    for axis, run in enumerate(rope.split(head_dim)):
        if axis:  # time is counted as before
            # The slowest, which tells no distance here, goes to the pair that is left.
            order[start : start + run] = start + np.roll(np.arange(run), 2)
        start += run
    return (np.arange(num_heads)[:, None] * head_dim + order).reshape(-1)


def main() -> None:
    args = parse()
    try:
        parts = rewrite.parts_of(args.checkpoint)
        parts["dit"] = halve(parts["dit"])
        replace.write_changed(args.checkpoint, args.out, parts, dtype="float32")
    except ValueError as error:
        print(f"halve_patches: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
