"""Names of the VAE's tensors in diffusers' `AutoencoderKLWan` files."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx

from sora_jax.convert import names
from sora_jax.vae.config import VAEConfig
from sora_jax.vae.model import VideoVAE

_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "gamma"}
_LAYOUTS = {5: "conv3d", 4: "conv2d"}


def abstract_vae(config: VAEConfig) -> VideoVAE:
    """The model with shapes in place of arrays; allocates nothing."""
    return jax.eval_shape(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))


def vae_entries(config: VAEConfig) -> list[names.Entry]:
    """The name table of `config`'s VAE: one entry per tensor."""
    params = nnx.state(abstract_vae(config), nnx.Param)
    entries = []
    for path, leaf in nnx.to_flat_state(params):
        path = tuple(str(part) for part in path)
        key = ".".join((*_module_key(path[:-1], config), _LEAVES[path[-1]]))
        if path[-1] == "scale":
            # Norms in attention see single frames, and have one axis less in the file.
            shape = (*leaf.shape, *((1, 1) if "attention" in path else (1, 1, 1)))
            entries.append(names.Entry(key, path, "vector", shape=shape))
        else:
            entries.append(names.Entry(key, path, _LAYOUTS.get(len(leaf.shape), "same")))
    return entries


def _module_key(path: tuple[str, ...], config: VAEConfig) -> tuple[str, ...]:
    """A module's path in our tree as diffusers names it."""
    half, *rest = path
    if rest[:1] == ["mid"]:
        where = ["attentions", "0"] if rest[1] == "attention" else rest[1:3]
        rest = ["mid_block", *where, *rest[2 if rest[1] == "attention" else 3 :]]
    elif rest[:1] == ["stages"]:
        rest = _stage_key(half, int(rest[1]), rest[2:], config)
    return (half, *("conv_shortcut" if part == "shortcut" else part for part in rest))


def _stage_key(half: str, stage: int, rest: list[str], config: VAEConfig) -> list[str]:
    blocks = "down_blocks" if half == "encoder" else "up_blocks"
    if rest[0] == "resample":
        layer = ["resample", "1"] if rest[1] == "conv" else rest[1:]
        if config.is_residual:
            sampler = "downsampler" if half == "encoder" else "upsampler"
            return [blocks, str(stage), sampler, *layer]
        if half == "decoder":
            return [blocks, str(stage), "upsamplers", "0", *layer]
    if config.is_residual or half == "decoder":
        return [blocks, str(stage), *rest]
    # Wan 2.1's encoder is one flat list: each stage's residual blocks, then its resampling.
    start = stage * (config.num_res_blocks + 1)
    if rest[0] == "resample":
        return [blocks, str(start + config.num_res_blocks), *layer]
    return [blocks, str(start + int(rest[1])), *rest[2:]]


def load_vae(
    config: VAEConfig,
    *,
    keys: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    source: str,
) -> VideoVAE:
    """The VAE filled from a file's tensors; arguments and errors as in `names.load`."""
    model = abstract_vae(config)
    graph, params = nnx.split(model, nnx.Param)
    params = names.load(params, vae_entries(config), keys=keys, read=read, source=source)
    return nnx.merge(graph, params)


def export_vae(vae: VideoVAE) -> dict[str, np.ndarray]:
    """The VAE's tensors under diffusers' names, in its layouts."""
    return names.export(nnx.state(vae, nnx.Param), vae_entries(vae.config))


def load_vae_tensors(
    config: VAEConfig, tensors: Mapping[str, np.ndarray], *, source: str = "tensors"
) -> VideoVAE:
    """`load_vae` from tensors in memory."""
    keys = {key: tuple(value.shape) for key, value in tensors.items()}
    return load_vae(config, keys=keys, read=lambda key: tensors[key], source=source)
