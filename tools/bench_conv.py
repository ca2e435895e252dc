"""Prints GFLOP/s of the formulations of a causal 3x3x3 convolution, forward and backward.

python tools/bench_conv.py [--batch 2] [--repeats 3] [--planes]

With --planes those of a 3x3 convolution of frames and of its kernel's gradient, XLA's own and as
products.
"""

import argparse
import functools
import time

import jax

from sora_jax.vae import conv, cpu_conv, plane_conv

SETTINGS = {"stride": (1, 1, 1), "padding": ((2, 0), (1, 1), (1, 1))}
FORMULATIONS = {
    "single": functools.partial(conv._single, **SETTINGS),
    "taps": functools.partial(cpu_conv.taps, **SETTINGS),
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


# Frames, side, channels in and out.
PLANES = [
    *((5, 128, 3, 32), (5, 128, 32, 3), (17, 128, 32, 32), (9, 64, 48, 48), (9, 64, 64, 64)),
    *((9, 64, 96, 96), (5, 32, 128, 128), (5, 32, 192, 192)),
]


def planes(repeats: int) -> None:
    padding = ((1, 1), (1, 1))
    print(f"{'frames x side x channels':28}{'forward':>10}{'XLA':>10}{'products':>10}")
    for frames, side, inputs, outputs in PLANES:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (1, frames, side, side, inputs))
        w = jax.random.normal(keys[1], (3, 3, inputs, outputs))
        dy = jax.random.normal(keys[2], (1, frames, side, side, outputs))

        def forward(x, w):
            return plane_conv._conv(x, w, (1, 1), padding)

        def xla(x, w, dy, forward=forward):
            return jax.vjp(lambda w: forward(x, w), w)[1](dy)[0]

        def products(x, w, dy):
            return plane_conv._products(x, dy, w.shape, padding)

        work = 2 * dy.size * 9 * inputs / 1e9
        rates = [work / seconds(forward, x, w, repeats=repeats)]
        rates += [work / seconds(f, x, w, dy, repeats=repeats) for f in (xla, products)]
        label = f"{frames} x {side}^2 x {inputs} to {outputs}"
        print(f"{label:28}" + "".join(f"{rate:10.0f}" for rate in rates), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--planes", action="store_true")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}; GFLOP/s, best of {args.repeats}")
    if args.planes:
        return planes(args.repeats)
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
