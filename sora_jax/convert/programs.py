"""A pipeline as four functions of arrays, with fixed sizes: what other runtimes are given.

text_encoder    (ids, mask) -> embeddings
denoise         (x, t, t_next, guidance, cond, mask, uncond, mask) -> x at t_next
encode          (video in [-1, 1]) -> normalised latents
decode          (latents) -> video in [-1, 1]

`denoise` is one Euler step with guidance, so that a caller needs a loop alone.
"""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export

from sora_jax import DTYPES
from sora_jax.convert import folder
from sora_jax.diffusion import guidance as guidances
from sora_jax.diffusion.times import shift_for_tokens
from sora_jax.text.tokenizer import Tokenizer, load_tokenizer


class Program(NamedTuple):
    """`run(weights, *arguments)`: the arguments' names, shapes, None for the batch, and dtypes."""

    part: str
    run: Callable[..., jax.Array]
    names: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    dtypes: tuple[Any, ...]

    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        """The arguments with a symbolic batch."""
        (b,) = export.symbolic_shape("b")
        return [
            jax.ShapeDtypeStruct(tuple(b if n is None else n for n in shape), dtype)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]


class Programs(NamedTuple):
    """The programs by name, each part's weights by path, and what a caller must know."""

    programs: dict[str, Program]
    weights: dict[str, dict[str, jax.Array]]
    tokenizer: Tokenizer
    manifest: dict[str, Any]


def load(
    source: str | Path,
    *,
    dtype: str = "float32",
    size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> Programs:
    """The programs of pipeline folder `source`.

    Args:
      dtype: of weights and matrix products, "float32" or "bfloat16"; the VAE's stay float32.
      size: (width, height) in pixels; by default the folder's own, as are `frames`.

    Raises:
      ValueError: a damaged or missing part, a family that takes pictures or has two experts, or
        a size that does not divide.
    """
    source = Path(source)
    if extra := [folder.WORDS[name] for name in folder.held(source)[len(folder.REQUIRED) :]]:
        raise ValueError(f"{source}: has a {extra[0]}; only text to video becomes programs so far.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: weights of programs are float32 or bfloat16.")
    sampling = folder.read_sampling(source)
    width, height = size or (sampling.width, sampling.height)
    frames = sampling.frames if frames is None else frames
    dit, vae, text = (folder.find_component(source, name)[0] for name in folder.REQUIRED)
    if dit.in_channels != vae.z_dim:
        raise ValueError(f"{source}: takes pictures; only text to video becomes programs so far.")
    time, space = vae.scale_factor_temporal, vae.scale_factor_spatial
    latents = (1 + (frames - 1) // time, height // space, width // space, vae.z_dim)
    whole = (1 + (latents[0] - 1) * time, latents[1] * space, latents[2] * space)
    patched = all(n % p == 0 for n, p in zip(latents, dit.patch_size, strict=False))
    if whole != (frames, height, width) or not patched or min(frames, height, width) < 1:
        raise ValueError(
            f"{width}x{height} with {frames} frames does not divide into this model's tokens; "
            "change --size or --frames (`sora-jax sample` names the nearest)."
        )
    parts = {
        name: folder.load_component(source, name, dtype="float32" if name == "vae" else dtype)
        for name in folder.REQUIRED
    }
    tokens = math.prod(n // p for n, p in zip(latents, dit.patch_size, strict=False))
    length = sampling.text_tokens
    emb, ids, mask = (None, length, text.width), (None, length), (None, length)
    x, video = (None, *latents), (None, frames, height, width, 3)
    f, i = jnp.float32, jnp.int32

    def program(part: str, run, **arguments) -> Program:
        shapes, dtypes = zip(*arguments.values(), strict=True)
        return Program(part, _bound(parts[part], run), tuple(arguments), shapes, dtypes)

    programs = {
        "text_encoder": program("text", lambda m, *a: m(*a), ids=(ids, i), mask=(mask, bool)),
        "denoise": program(
            *("dit", _denoise),
            **{"x": (x, f), "t": ((), f), "t_next": ((), f), "guidance": ((), f)},
            **{"cond": (emb, f), "cond_mask": (mask, bool)},
            **{"uncond": (emb, f), "uncond_mask": (mask, bool)},
        ),
        "encode": program("vae", lambda m, video: m.encode(video), video=(video, f)),
        "decode": program("vae", lambda m, latents: m.decode(latents), latents=(x, f)),
    }
    tokenizer = load_tokenizer(source / "tokenizer")
    manifest = {
        "latents": latents,
        "video": [frames, height, width, 3],
        "text_tokens": length,
        "empty_ids": tokenizer.encode("", max_length=length),
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "shift": shift_for_tokens(tokens, sampling.shift),
    }
    weights = {
        name: {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(params)}
        for name, (_, _, params) in parts.items()
    }
    return Programs(programs, weights, tokenizer, manifest)


@contextlib.contextmanager
def fresh_folder(out: str | Path) -> Iterator[Path]:
    """A folder that becomes `out` when everything in it is written.

    Raises:
      ValueError: `out` holds something already, which would be mixed with what is new.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"out {out} is not empty; name another folder, or remove it first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        made = Path(temporary) / "out"
        made.mkdir()
        yield made
        if out.is_dir():
            out.rmdir()
        made.rename(out)


def _denoise(dit, x, t, t_next, scale, cond, cond_mask, uncond, uncond_mask):
    """One Euler step of the guided flow, both halves of guidance in one batch."""
    text, mask = jnp.concatenate([cond, uncond]), jnp.concatenate([cond_mask, uncond_mask])
    twice = jnp.concatenate([x, x])
    velocity = dit(twice, jnp.broadcast_to(t, twice.shape[:1]), text, text_mask=mask)
    with_text, without = velocity.reshape(2, *x.shape)
    return x + (t_next - t) * guidances.combine(with_text, without, scale=scale)


def _bound(part, run) -> Callable[..., jax.Array]:
    """`run` as a function of the weights by path and its own arguments."""
    config, graphdef, params = part
    if hasattr(config, "attention"):
        # One program for all platforms: without a kernel of any one of them.
        graphdef = folder.abstract_params("dit", dataclasses.replace(config, attention="xla"))[0]
    leaves = nnx.to_flat_state(params)

    def bound(weights, *arguments):
        filled = [(path, leaf.replace(weights[_name(path)])) for path, leaf in leaves]
        return run(nnx.merge(graphdef, nnx.from_flat_state(filled)), *arguments)

    return bound


def _name(path) -> str:
    return "/".join(map(str, path))
