"""Prints GFLOP/s of the formulations of a causal 3x3x3 convolution, forward and backward.

python tools/bench_conv.py [--batch 2] [--repeats 3]
"""

import argparse
import functools
import time

import jax

from sora_jax.vae import conv

SETTINGS = {"stride": (1, 1, 1), "padding": ((2, 0), (1, 1), (1, 1))}
FORMULATIONS = {
    "single": functools.partial(conv._single, **SETTINGS),
    "taps": functools.partial(conv._taps, **SETTINGS),
    "conv3d": functools.partial(conv.conv3d, **SETTINGS),
    "conv3d bf16": functools.partial(conv.conv3d, dtype="bfloat16", **SETTINGS),
}
SHAPES = [(17, 32, 16), (17, 32, 32), (9, 16, 64), (5, 8, 128)]  # frames, side, channels


def seconds(function, *args, repeats: int) -> float:
    function = jax.jit(function)
    jax.block_until_ready(function(*args))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        best = min(best, time.perf_counter() - start)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}; GFLOP/s, best of {args.repeats}")
    print(f"{'frames x side x channels':26}{'formulation':14}{'forward':>10}{'backward':>10}")
    for frames, side, channels in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (args.batch, frames, side, side, channels))
        w = jax.random.normal(keys[1], (3, 3, 3, channels, channels))
        work = 2 * x.size * 27 * channels / 1e9
        for name, function in FORMULATIONS.items():

            def backward(x, w, dy, function=function):
                return jax.vjp(function, x, w)[1](dy)

            forward = work / seconds(function, x, w, repeats=args.repeats)
            both = 2 * work / seconds(backward, x, w, x, repeats=args.repeats)
            label = f"{frames} x {side}^2 x {channels}"
            print(f"{label:26}{name:14}{forward:10.0f}{both:10.0f}", flush=True)


if __name__ == "__main__":
    main()
