"""A pipeline as functions of arrays, with fixed sizes: what other runtimes are given.

text_encoder    (ids, mask) -> embeddings
denoise         (x, t, t_next, guidance, cond, mask, uncond, mask, pictures) -> x at t_next
denoise_2       the same with the second of two transformers, for times below the boundary
encode          (video in [-1, 1]) -> normalised latents
decode          (latents) -> video in [-1, 1]
encode_picture  (video of one frame) -> its latents, for models whose first frame is given clean
image_encoder   (pictures of the video's size, 0 to 255) -> features

`denoise` is one Euler step with guidance, so that a caller needs a loop alone. Models that take
pictures take them as `generate.conditions` has it: `channels` and `features`; or `clean`, the
latents of the first frame, and `given`, 1 if there are any and 0 if not.
"""

import contextlib
import dataclasses
import functools
import math
import sys
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
from sora_jax.convert.sampling import SamplingDefaults, by_token, read_sampling
from sora_jax.diffusion import guidance as guidances
from sora_jax.diffusion.times import shift_for_tokens
from sora_jax.dit.patchify import check_pixels, grid
from sora_jax.generate import conditions
from sora_jax.image import clip
from sora_jax.text.tokenizer import Tokenizer


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
      ValueError: a damaged or missing part, or a size that does not divide.
    """
    source = Path(source)
    check_dtype(dtype)
    sampling = read_sampling(source)
    width, height = size or (sampling.width, sampling.height)
    frames = sampling.frames if frames is None else frames
    dit, vae, text = (folder.find_component(source, name)[0] for name in folder.REQUIRED)
    index = folder.read_index(source)
    way = conditions.takes(dit, vae, expand_timesteps=by_token(index, sampling))
    held, tokenizer = folder.held(source), folder.open_tokenizer(source)
    image = folder.find_component(source, "image")[0] if "image" in held else None
    conditions.check_parts(dit, text, image, vocab_size=tokenizer.vocab_size)
    _tell_left_out(source, sampling)
    time, space = vae.scale_factor_temporal, vae.scale_factor_spatial
    cell = tuple(n * p for n, p in zip((time, space, space), dit.patch_size, strict=True))
    check_pixels(frames, height, width, cell=cell)
    latents = (1 + (frames - 1) // time, height // space, width // space, vae.z_dim)
    parts = {
        name: folder.load_component(source, name, dtype="float32" if name == "vae" else dtype)
        for name in held
    }
    tokens = math.prod(n // p for n, p in zip(latents, dit.patch_size, strict=False))
    length = sampling.text_tokens
    emb, ids, mask = (None, length, text.width), (None, length), (None, length)
    x = (None, *latents)
    f, i = jnp.float32, jnp.int32

    def program(part: str, run, **arguments) -> Program:
        shapes, dtypes = zip(*arguments.values(), strict=True)
        return Program(part, _bound(part, parts[part], run), tuple(arguments), shapes, dtypes)

    pictures = {}
    if way == "channels":
        pictures["channels"] = ((None, *latents[:3], dit.in_channels - vae.z_dim), f)
    elif way == "clean":
        pictures |= {"clean": ((None, 1, *latents[1:]), f), "given": ((), f)}
    if dit.image_dim is not None:
        positions = dit.image_positions or parts["image"][0].num_positions
        pictures["features"] = ((None, positions, dit.image_dim), f)
    step = {
        **{"x": (x, f), "t": ((), f), "t_next": ((), f), "guidance": ((), f)},
        **{"cond": (emb, f), "cond_mask": (mask, bool)},
        **{"uncond": (emb, f), "uncond_mask": (mask, bool)},
        **pictures,
    }
    video, picture = (None, frames, height, width, 3), (None, 1, height, width, 3)
    denoise = functools.partial(_denoise, tuple(pictures))
    programs = {
        "text_encoder": program("text", lambda m, *a: m(*a), ids=(ids, i), mask=(mask, bool)),
        "denoise": program("dit", denoise, **step),
        "encode": program("vae", lambda m, video: m.encode(video), video=(video, f)),
        "decode": program("vae", lambda m, latents: m.decode(latents), latents=(x, f)),
    }
    if way == "clean":
        programs["encode_picture"] = program("vae", lambda m, v: m.encode(v), video=(picture, f))
    if "dit_2" in parts:
        programs["denoise_2"] = program("dit_2", denoise, **step)
    if "image" in parts:
        programs["image_encoder"] = program(
            "image", _image_features, picture=((None, height, width, 3), f)
        )
    manifest = {
        "latents": latents,
        "video": [frames, height, width, 3],
        "text_tokens": length,
        "empty_ids": tokenizer.encode("", max_length=length),
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "shift": shift_for_tokens(tokens, sampling.shift),
        "pictures": list(pictures),
        "picture_counts": _picture_counts(dit, way),
        "frames_a_latent": time,
        "boundary": index.boundary_ratio if "dit_2" in parts else None,
        "guidance_2": sampling.guidance_2 or sampling.guidance,
    }
    weights = {
        name: {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(params)}
        for name, (_, _, params) in parts.items()
    }
    return Programs(programs, weights, tokenizer, manifest)


def check_dtype(dtype: str) -> None:
    """Raises ValueError for one that weights of programs do not have."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: weights of programs are float32 or bfloat16.")


def check_empty(out: Path) -> None:
    """Raises ValueError where `out` holds something, which would be mixed with what is new."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"out {out} is not empty; name another folder, or remove it first.")


@contextlib.contextmanager
def fresh_folder(out: str | Path) -> Iterator[Path]:
    """A folder that becomes `out` when everything in it is written.

    Raises:
      ValueError: as `check_empty`.
    """
    out = Path(out)
    check_empty(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        made = Path(temporary) / "out"
        made.mkdir()
        yield made
        if out.is_dir():
            out.rmdir()
        made.rename(out)


def _tell_left_out(source: Path, sampling: SamplingDefaults) -> None:
    plain, told = SamplingDefaults(), []
    for name in ("guidance_interval", "guidance_rescale", "guidance_blocks"):
        value, default = getattr(sampling, name), getattr(plain, name)
        if (value if isinstance(default, float) else tuple(value)) != default:
            told.append(f"{name} {value}")
    if told:
        print(
            f"{source}: its sampling.json has {', '.join(told)}, which programs leave out: they "
            "guide every step, in all blocks alike.",
            file=sys.stderr,
        )


def _picture_counts(dit, way: str) -> tuple[int, int]:
    """Fewest and most pictures that a model takes, as `conditions.check` has it."""
    if way != "channels":
        return 0, int(way == "clean")
    if dit.image_dim is None:
        return 1, 2
    return (2, 2) if dit.image_positions is not None else (1, 1)


def _denoise(
    pictures, dit, x, t, t_next, scale, cond, cond_mask, uncond, uncond_mask, *given_pictures
):
    """One Euler step of the guided flow, both halves of guidance in one batch."""
    shown = dict(zip(pictures, given_pictures, strict=True))
    text, mask = jnp.concatenate([cond, uncond]), jnp.concatenate([cond_mask, uncond_mask])
    # ONNX's converter follows the doubled batch from x alone: all else takes its size from there.
    twice = jnp.concatenate([x, x])
    time = jnp.broadcast_to(t, twice.shape[:1])
    if "clean" in shown:
        given, clean = shown["given"], jnp.concatenate([shown["clean"]] * 2)
        first = given * clean + (1 - given) * twice[:, :1]
        twice = jnp.concatenate([first, twice[:, 1:]], axis=1)
        size = grid(*x.shape[1:4], patch_size=dit.config.patch_size)
        by_frame = jnp.where(jnp.arange(size[0]) > 0, t, (1 - given) * t)
        time = jnp.broadcast_to(by_frame[None, :, None, None], (twice.shape[0], *size))
    if "channels" in shown:
        twice = jnp.concatenate([twice, jnp.concatenate([shown["channels"]] * 2)], axis=-1)
    features = jnp.concatenate([shown["features"]] * 2) if "features" in shown else None
    velocity = dit(twice, time, text, text_mask=mask, image_emb=features)
    with_text, without = velocity.reshape(2, *x.shape)
    return x + (t_next - t) * guidances.combine(with_text, without, scale=scale)


def _image_features(tower, picture):
    """CLIP's features of pictures from 0 to 255: `clip.preprocess` in the program itself."""
    size, (height, width) = tower.config.image_size, picture.shape[1:3]
    short = min(height, width)
    target = (int(size * height / short), int(size * width / short))
    rows, columns = (
        jnp.asarray(clip.resize_matrix(n, m)) for n, m in zip((height, width), target, strict=True)
    )
    resized = jnp.einsum("yh,bhwc,xw->byxc", rows, picture, columns, precision="highest")
    top, left = ((side - size) // 2 for side in target)
    square = jnp.round(jnp.clip(resized, 0, 255))[:, top : top + size, left : left + size] / 255
    mean, std = (jnp.asarray(v, jnp.float32) for v in (clip.MEAN, clip.STD))
    return tower((square - mean[None, None, None]) / std[None, None, None])


def _bound(name: str, part, run) -> Callable[..., jax.Array]:
    """`run` as a function of the weights by path and its own arguments."""
    config, graphdef, params = part
    if hasattr(config, "attention"):
        # One program for all platforms: without a kernel of any one of them.
        graphdef = folder.abstract_params(name, dataclasses.replace(config, attention="xla"))[0]
    leaves = nnx.to_flat_state(params)

    def bound(weights, *arguments):
        filled = [(path, leaf.replace(weights[_name(path)])) for path, leaf in leaves]
        return run(nnx.merge(graphdef, nnx.from_flat_state(filled)), *arguments)

    return bound


def _name(path) -> str:
    return "/".join(map(str, path))
