"""Makes a checkpoint with wider parts that compute the same, to train on.

python tools/widen.py --checkpoint DIR --out DIR [--vae] [--mlp 1536]

--vae doubles every channel of encoder and decoder but pixels and latents: each is there twice, and
those that read it share its weight in random parts, so that training tells the two apart (Net2Net:
Chen et al. 2015, arXiv:1511.05641, section 2.2). --mlp gives the transformer's MLPs so many
channels: the new ones read at random, and are not read.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

from sora_jax.convert import replace, rewrite


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vae", action="store_true", help="double the VAE's channels")
    parser.add_argument("--mlp", type=int, help="channels of the transformer's MLPs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def double_vae(part: rewrite.Tensors, rng: np.random.Generator) -> rewrite.Tensors:
    """The VAE with twice the channels; of Wan 2.1's kind.

    Raises:
      ValueError: one with Wan 2.2's shortcuts, which average and repeat channels.
    """
    config = part.config
    if config.is_residual:
        raise ValueError("a VAE of Wan 2.2's kind cannot be doubled: is_residual has to be false.")
    wide = dataclasses.replace(
        config,
        base_dim=2 * config.base_dim,
        decoder_base_dim=2 * (config.decoder_base_dim or config.base_dim),
    )
    made = {key: _doubled(key, part.read(key), rng) for key in part.shapes}
    return _held(part, wide, made)


def _held(part: rewrite.Tensors, config, made: dict[str, np.ndarray]) -> rewrite.Tensors:
    """What `part` has become."""
    shapes = {key: x.shape for key, x in made.items()}
    return rewrite.Tensors(config, shapes, made.__getitem__, part.paths)


def _doubled(key: str, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Tensor `key`: output channels come first, input channels second."""
    x = x.astype(np.float32)
    if not key.startswith(("encoder.", "decoder.")):
        return x
    if not key.endswith(".gamma") and "conv_out" in key:
        return _shared(x, rng) if key.endswith("weight") else x
    # Queries, keys and values in one; two frames in one where a decoder doubles time.
    groups = 3 if "to_qkv" in key else 2 if "decoder" in key and "time_conv" in key else 1
    parts = np.split(x, groups)
    if groups == 3:
        # Twice the channels make the product twice as large, and its scale the root of that less.
        parts[0] = parts[0] / np.sqrt(2, dtype=np.float32)
    x = np.concatenate([copy for one in parts for copy in (one, one)])
    return _shared(x, rng) if key.endswith("weight") and "conv_in" not in key else x


def _shared(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    share = rng.uniform(0.3, 0.7, x.shape).astype(np.float32)
    return np.concatenate([x * share, x * (1 - share)], axis=1)


def widen_mlps(part: rewrite.Tensors, width: int, rng: np.random.Generator) -> rewrite.Tensors:
    """The transformer with `width` channels in its MLPs.

    Raises:
      ValueError: no more than it has.
    """
    more = width - part.config.ffn_dim
    if more <= 0:
        raise ValueError(f"--mlp {width}: the MLPs have {part.config.ffn_dim}; give more.")
    made = {}
    for key in part.shapes:
        x = part.read(key).astype(np.float32)
        if ".ffn.net.0.proj.weight" in key:
            x = np.concatenate([x, rng.normal(0, x.std(), (more, x.shape[1])).astype(np.float32)])
        elif ".ffn.net.0.proj.bias" in key:
            x = np.pad(x, (0, more))
        elif ".ffn.net.2.weight" in key:
            x = np.pad(x, ((0, 0), (0, more)))
        made[key] = x
    wide = dataclasses.replace(part.config, ffn_dim=width)
    return _held(part, wide, made)


def main() -> None:
    args = parse()
    try:
        parts, rng = rewrite.parts_of(args.checkpoint), np.random.default_rng(args.seed)
        if not args.vae and args.mlp is None:
            raise ValueError("nothing is to be widened; give --vae, --mlp or both.")
        if args.vae:
            parts["vae"] = double_vae(parts["vae"], rng)
        if args.mlp is not None:
            parts["dit"] = widen_mlps(parts["dit"], args.mlp, rng)
        replace.write_changed(args.checkpoint, args.out, parts, dtype="float32")
    except ValueError as error:
        print(f"widen: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
