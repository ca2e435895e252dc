"""A pipeline's programs as StableHLO, for runtimes without this package (OpenXLA's portable form).

text_encoder    (weights, ids, mask) -> embeddings
denoise         (weights, x, t, t_next, guidance, cond, mask, uncond, mask) -> x at t_next
encode          (weights, video in [-1, 1]) -> normalised latents
decode          (weights, latents) -> video in [-1, 1]

Each comes as .stablehlo, portable bytecode, and as .jax_export, which `jax.export.deserialize`
reads; each model's weights, in float32 or bfloat16, as safetensors by their path. Programs are for
CPU, CUDA and TPU (the bytecode's first argument says which, 0 to 2), with the batch left symbolic;
frames and size are fixed. `denoise` is one Euler step with guidance: a caller needs a loop alone.
"""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from sora_jax.convert import folder, run_stablehlo
from sora_jax.convert.names import flat_params
from sora_jax.convert.tensors import write_shards
from sora_jax.diffusion import guidance as guidances
from sora_jax.diffusion.times import shift_for_tokens
from sora_jax.text.tokenizer import load_tokenizer

PLATFORMS = ("cpu", "cuda", "tpu")
FILES = {"text": "text_encoder", "dit": "transformer", "vae": "vae"}


def write(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> Path:
    """Writes the programs, weights, manifest, tokenizer and run.py of pipeline `source`.

    Args:
      dtype: of weights and matrix products, "float32" or "bfloat16"; the VAE's stay float32.
      size: (width, height) in pixels; by default the folder's own, as are `frames`.

    Raises:
      ValueError: a damaged or missing part, a family that takes pictures or has two experts, or
        a size that does not divide; nothing is written then.
    """
    source, out = Path(source), Path(out)
    extra = [folder.WORDS[name] for name in folder.held(source)[len(folder.REQUIRED) :]]
    if extra:
        raise ValueError(f"{source}: has a {extra[0]}; StableHLO is for text to video so far.")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: StableHLO weights are float32 or bfloat16.")
    sampling = folder.read_sampling(source)
    width, height = size or (sampling.width, sampling.height)
    frames = frames or sampling.frames
    parts = {
        name: folder.load_component(source, name, dtype="float32" if name == "vae" else dtype)
        for name in folder.REQUIRED
    }
    dit, vae, text = (parts[name][0] for name in folder.REQUIRED)
    latents = (
        1 + (frames - 1) // vae.scale_factor_temporal,
        height // vae.scale_factor_spatial,
        width // vae.scale_factor_spatial,
        vae.z_dim,
    )
    whole = (
        1 + (latents[0] - 1) * vae.scale_factor_temporal,
        latents[1] * vae.scale_factor_spatial,
        latents[2] * vae.scale_factor_spatial,
    )
    patched = all(n % p == 0 for n, p in zip(latents, dit.patch_size, strict=False))
    if whole != (frames, height, width) or not patched or dit.in_channels != vae.z_dim:
        raise ValueError(
            f"{width}x{height} with {frames} frames does not divide into this model's tokens; "
            "change --size or --frames (`sora-jax sample` names the nearest)."
        )
    (b,) = export.symbolic_shape("b")
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    mask = jax.ShapeDtypeStruct((b, sampling.text_tokens), bool)
    ids = jax.ShapeDtypeStruct((b, sampling.text_tokens), jnp.int32)
    emb = f32(b, sampling.text_tokens, text.width)
    video, x = f32(b, frames, height, width, 3), f32(b, *latents)
    programs = {
        "text_encoder": ("text", lambda m, ids, mask: m(ids, mask), (ids, mask)),
        "denoise": ("dit", _denoise, (x, f32(), f32(), f32(), emb, mask, emb, mask)),
        "encode": ("vae", lambda m, video: m.encode(video), (video,)),
        "decode": ("vae", lambda m, latents: m.decode(latents), (x,)),
    }
    exports = {
        name: _export(parts[part], function, arguments)
        for name, (part, function, arguments) in programs.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, exported in exports.items():
        (out / f"{name}.stablehlo").write_bytes(exported.mlir_module_serialized)
        (out / f"{name}.jax_export").write_bytes(exported.serialize())
    for name, (_, _, params) in parts.items():
        weights = _weights(params)
        stored = "float32" if name == "vae" else dtype
        write_shards(
            out,
            FILES[name],
            {key: value.shape for key, value in weights.items()},
            lambda key, weights=weights: np.asarray(weights[key]),
            dtype=stored,
        )
    tokens = latents[0] * latents[1] * latents[2] // dit.patch_size[1] // dit.patch_size[2]
    tokenizer = load_tokenizer(source / "tokenizer")
    tokenizer.save(out / "tokenizer")
    manifest = {
        "latents": latents,
        "video": [frames, height, width, 3],
        "text_tokens": sampling.text_tokens,
        "empty_ids": tokenizer.encode("", max_length=sampling.text_tokens),
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "shift": shift_for_tokens(tokens // dit.patch_size[0], sampling.shift),
        "platforms": PLATFORMS,
    }
    folder.write_json(out / "manifest.json", manifest)
    shutil.copyfile(run_stablehlo.__file__, out / "run.py")
    return out


def _denoise(dit, x, t, t_next, scale, cond, cond_mask, uncond, uncond_mask):
    """One Euler step of the guided flow, both halves of guidance in one batch."""
    text, mask = jnp.concatenate([cond, uncond]), jnp.concatenate([cond_mask, uncond_mask])
    twice = jnp.concatenate([x, x])
    velocity = dit(twice, jnp.broadcast_to(t, twice.shape[:1]), text, text_mask=mask)
    with_text, without = velocity[: x.shape[0]], velocity[x.shape[0] :]
    return x + (t_next - t) * guidances.combine(with_text, without, scale=scale)


def _export(part, function, arguments) -> export.Exported:
    config, graphdef, params = part
    if hasattr(config, "attention"):
        # One program for all platforms: without a kernel of any one of them.
        config = dataclasses.replace(config, attention="xla")
        graphdef = folder.abstract_params("dit", config)[0]

    def program(weights, *arguments):
        leaves = nnx.to_flat_state(params)
        filled = [(path, leaf.replace(weights[_name(path)])) for path, leaf in leaves]
        return function(nnx.merge(graphdef, nnx.from_flat_state(filled)), *arguments)

    weights = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in _weights(params).items()}
    return export.export(jax.jit(program), platforms=PLATFORMS)(weights, *arguments)


def _name(path) -> str:
    return "/".join(map(str, path))


def _weights(params) -> dict[str, jax.Array]:
    return {_name(path): leaf[...] for path, leaf in flat_params(params).items()}
