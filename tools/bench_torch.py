"""Times our DiT and VAE against diffusers' in PyTorch: same weights, same cores, in turns.

python tools/bench_torch.py [--pairs 5] [--only dit vae]

Needs the `parity` extra (`make parity` makes its environment, .venv-parity). Prints a table:
the medians of both, and the median of the pairs' ratios, above 1 where we are faster.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from flax import nnx

from sora_jax import allocator
from sora_jax.convert import folder

TEXT = (64, 512)  # tokens, width
DIT = {
    "num_layers": 12,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "ffn_dim": 1536,
    "text_dim": TEXT[1],
}
LATENTS = {"576 tokens": (9, 16, 16), "2304 tokens": (9, 32, 32)}  # f, h, w; patches of 1x2x2
VAE = {"base_dim": 32}
VIDEO = (17, 128, 128)
REST = 0.3  # seconds between two timings, in which the other's threads fall asleep


class Case(NamedTuple):
    """One line of the table: two functions that do the same work and wait for its end.

    Those that return an output return the same one, ours channels last.
    """

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]


def load(model, name: str, **changes):
    """(graphdef, params) of `model`'s own weights, by way of a folder that diffusers writes."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(Path(directory) / folder.COMPONENTS[name].folder)
        config, _, params = folder.load_component(directory, name)
    return folder.abstract_params(name, dataclasses.replace(config, **changes))[0], params


def first(array: np.ndarray) -> torch.Tensor:
    """Channels last to channels first."""
    return torch.from_numpy(np.moveaxis(array, -1, 1).copy())


def backward(model: torch.nn.Module, output: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    output.square().mean().backward()


def jitted(function, *arguments) -> Callable[[], object]:
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*arguments))


def squared(function):
    """Gradient by the first argument of the mean square of `function`'s result."""
    return jax.grad(lambda params, *rest: jnp.mean(jnp.square(function(params, *rest))))


def dit_cases() -> list[Case]:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**DIT).eval()
    # diffusers is given the text as it is, without rows of padding; so are we.
    graphdef, params = load(model, "dit", text_len=TEXT[0])
    rng = np.random.default_rng(0)
    text = rng.standard_normal((1, *TEXT)).astype(np.float32)
    cases = []
    for name, size in LATENTS.items():
        x = rng.standard_normal((1, *size, 16)).astype(np.float32)
        mask = np.ones((1, TEXT[0]), bool)

        def forward(params, x, text, mask=mask):
            return nnx.merge(graphdef, params)(x, jnp.full((1,), 0.5), text, text_mask=mask)

        inputs = {
            "hidden_states": first(x),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.from_numpy(text),
        }

        def theirs(inputs=inputs):
            return model(**inputs, return_dict=False)[0]

        def theirs_backward(theirs=theirs):
            backward(model, theirs())

        ours = jitted(forward, params, x, text)
        cases.append(Case(f"DiT, {name}, forward", ours, torch.no_grad()(theirs)))
        ours = jitted(squared(forward), params, x, text)
        cases.append(Case(f"DiT, {name}, forward and backward", ours, theirs_backward))
    return cases


def vae_cases() -> list[Case]:
    torch.manual_seed(0)
    model = AutoencoderKLWan(**VAE).eval()
    graphdef, params = load(model, "vae")
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, *VIDEO, 3)).astype(np.float32)
    frames, height, width = VIDEO
    z = rng.standard_normal((1, 1 + (frames - 1) // 4, height // 8, width // 8, 16))
    z = z.astype(np.float32)

    def encode(params, video):
        return nnx.merge(graphdef, params).encode_moments(video).mean

    def decode(params, z):
        return nnx.merge(graphdef, params).decode(z)

    def both(params, video):
        return decode(params, nnx.merge(graphdef, params).encode(video))

    # Ours takes normalised latents, theirs those that its encoder gives.
    mean, std = (np.array(model.config[f"latents_{name}"], np.float32) for name in ("mean", "std"))
    pixels, latents = first(video), first(z * std + mean)

    def theirs_encode():
        return model.encode(pixels).latent_dist.mode()

    def theirs_decode(latents=latents):
        return model.decode(latents, return_dict=False)[0]

    size = f"{frames}x{height}x{width}"
    return [
        Case(f"VAE, {size}, encode", jitted(encode, params, video), torch.no_grad()(theirs_encode)),
        Case(f"VAE, {size}, decode", jitted(decode, params, z), torch.no_grad()(theirs_decode)),
        Case(
            f"VAE, {size}, encode, decode and backward",
            jitted(squared(both), params, video),
            lambda: backward(model, theirs_decode(theirs_encode())),
        ),
    ]


def check(ours, theirs) -> None:
    """Raises AssertionError unless two outputs are equal; gradients have none to compare."""
    if theirs is not None:
        np.testing.assert_allclose(ours, np.moveaxis(theirs.numpy(), 1, -1), atol=1e-3)


def seconds(function: Callable[[], object]) -> float:
    time.sleep(REST)
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=("dit", "vae"), default=["dit", "vae"])
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; JAX takes all cores")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    allocator.suit_backend()  # as `sora-jax train` does; both sides' memory comes from it
    print(f"jax {jax.__version__}, torch {torch.__version__}, {args.threads} threads\n")
    print("| | sora_jax, s | diffusers, s | times as fast (of the pairs) |\n|---|---|---|---|")
    for kind in args.only:
        for name, ours, theirs in {"dit": dit_cases, "vae": vae_cases}[kind]():
            check(ours(), theirs())  # compiles, and warms the caches
            ours()  # once more: the first run in a heap that both share takes what it needs of it
            pairs = [(seconds(ours), seconds(theirs)) for _ in range(args.pairs)]
            mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratios = sorted(b / a for a, b in pairs)
            print(
                f"| {name} | {mine:.3f} | {other:.3f} | **{statistics.median(ratios):.2f}** "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
