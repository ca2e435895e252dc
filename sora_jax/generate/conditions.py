"""Pictures that a video begins or ends with, as Wan's transformers take them.

There are three ways, and a model has none, the third, the first, or the first two:

- channels: beside the noise lie a mask of the frames that are given, and the latents of a video
  that shows them and is grey elsewhere (Wan 2.1 I2V and FLF2V, 2.2 I2V-A14B);
- features: cross-attention sees the pictures through CLIP's eyes (Wan 2.1);
- clean: tokens that are given are clean, and their time is 0 while the others' is t. 2.2 TI2V-5B
  knows this of the first latent frame, what is trained here of any (`diffusion/tasks.py`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from sora_jax.diffusion import guidance
from sora_jax.diffusion.guidance import GuidanceConfig
from sora_jax.dit import patchify
from sora_jax.dit.config import DiTConfig
from sora_jax.dit.kv_cache import KVCache
from sora_jax.generate import tiles as tiling
from sora_jax.generate.residual import Residual
from sora_jax.image.clip import CLIPVisionConfig
from sora_jax.text.t5 import T5Config
from sora_jax.types import Latents, Velocity
from sora_jax.vae.config import VAEConfig

NEEDS_PICTURE = "this model animates a picture; give image (--image), or use another checkpoint."
Picture = UInt8[np.ndarray, "H W 3"]


class Conditions(NamedTuple):
    """What a transformer sees beside noise, time and text; None where it takes none."""

    channels: Float[Array, "b f h w m"] | None = None
    features: Float[Array, "b i d_image"] | None = None
    clean: Float[Array, "b f h w c"] | None = None
    keep: Bool[Array, "b f_grid h_grid w_grid"] | None = None  # where tokens are those of `clean`


class Text(NamedTuple):
    """Embedded prompts, and after them the negative ones where guidance needs any.

    With `of_frames` a video has s texts, and says which of them each frame of patches follows.
    """

    emb: Float[Array, "b l d"] | Float[Array, "b s l d"]
    mask: Bool[Array, "b l"] | Bool[Array, "b s l"]
    of_frames: Int[Array, "b f_grid"] | None = None


def takes(dit: DiTConfig, vae: VAEConfig, *, expand_timesteps: bool) -> str:
    """How a model takes pictures: "channels", "clean", or "" where it takes none.

    Args:
      expand_timesteps: it was trained with a time for every token.

    Raises:
      ValueError: the transformer's channels fit neither.
    """
    masked = vae.z_dim + vae.scale_factor_temporal
    if dit.in_channels == vae.z_dim:
        return "clean" if expand_timesteps else ""
    if dit.in_channels == vae.z_dim + masked:
        return "channels"
    raise ValueError(
        f"the transformer takes {dit.in_channels} channels; with this VAE of {vae.z_dim} it must "
        f"be {vae.z_dim}, or {vae.z_dim + masked} for videos that begin with a picture."
    )


def check_parts(
    dit: DiTConfig, text: T5Config, image: CLIPVisionConfig | None, *, vocab_size: int
) -> None:
    """Raises ValueError unless the encoders give what the transformer takes.

    Args:
      vocab_size: ids of the tokenizer.
    """
    for name, encoder, width in (("text", text, dit.text_dim), ("image", image, dit.image_dim)):
        if encoder is not None and width is not None and encoder.width != width:
            raise ValueError(
                f"the {name} encoder's width is {encoder.width}, and the transformer takes "
                f"{name} of width {width}; use the encoder that it was trained with."
            )
    if vocab_size > text.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} ids, and the text encoder knows {text.vocab_size}; "
            "use the tokenizer that it was trained with."
        )


def check(way: str, dit: DiTConfig, pictures: Sequence[Any]) -> None:
    """Raises ValueError unless a model that takes pictures that `way` can use (first, last)."""
    for picture in pictures:
        fits = isinstance(picture, np.ndarray) and picture.dtype == np.uint8
        if picture is not None and not (fits and picture.ndim == 3 and picture.shape[2] == 3):
            raise ValueError(
                f"a picture is {getattr(picture, 'dtype', type(picture).__name__)} of shape "
                f"{getattr(picture, 'shape', None)}; give a numpy array, uint8, (H, W, 3), RGB."
            )
    first, last = (picture is not None for picture in pictures)
    if last and not first:
        raise ValueError("a last picture needs a first one; give image (--image) too.")
    if first and not way:
        raise ValueError(
            "this model makes videos from text alone; leave out the picture, or use an "
            "image-to-video checkpoint."
        )
    if way == "channels" and not first:
        raise ValueError(NEEDS_PICTURE)
    if dit.image_dim is not None and last != (dit.image_positions is not None):
        raise ValueError(
            "this model was trained "
            + ("on one picture; leave out the last one." if last else "on a first and a last ")
            + ("" if last else "picture; give last_image (--last-image) too.")
        )


def mask_channels(
    known: Bool[np.ndarray, " F"], *, temporal: int
) -> Float[np.ndarray, "f temporal"]:
    """The mask of a latent frame: one channel for each video frame in it.

    The first latent frame is one video frame, which fills all of its channels.
    """
    spread = np.concatenate([np.repeat(known[:1], temporal), known[1:]])
    return spread.reshape(-1, temporal).astype(np.float32)


class Tiles(NamedTuple):
    """Tiles of latents, (frames, rows, columns), that a transformer works on, and their overlap."""

    size: tiling.Size
    overlap: tiling.Size


def conditioned(
    dit,
    text: Text,
    conditions: Conditions,
    *,
    tiles: Tiles | None = None,
    residual: Residual | None = None,
    guide: GuidanceConfig | None = None,
    cache: KVCache | None = None,
) -> Velocity:
    """The transformer as velocity(x, t) over 1 or 2 times the batch that `conditions` are for.

    `t` is a scalar, or of shape (1, f, 1, 1, 1): a time for every latent frame.

    Args:
      residual: given in place of the blocks, or stored by them; of every tile, where there are any.
      guide: says in which blocks frames of the second half of the rows do not see each other.
      cache: of keys and values of given tokens; without tiles alone.
    """

    def velocity(x: Latents, t: Float[Array, ""] | Float[Array, "1 f 1 1 1"]) -> Latents:
        repeats = x.shape[0] // next((len(c) for c in conditions if c is not None), x.shape[0])
        channels, features, clean, keep = (
            None if c is None else jnp.concatenate([c] * repeats) for c in conditions
        )
        if t.ndim:
            grid = patchify.grid(*x.shape[1:4], patch_size=dit.config.patch_size)
            t = t[:, :: dit.config.patch_size[0], :, :, 0]
            time = jnp.broadcast_to(t, (x.shape[0], *grid))
        else:
            time = jnp.full(x.shape[:1], t)
        if clean is not None:
            x = keep_clean(x, clean, keep, patch_size=dit.config.patch_size)
            time = jnp.where(keep, 0.0, t)
        latents = x.shape[-1]  # without the channels beside them
        if channels is not None:
            x = jnp.concatenate([x, channels], axis=-1)
        known = _texts(text, x.shape[0]) | {"image_emb": features}
        if guide is not None:
            times = t[0, :, 0, 0] if t.ndim else t
            known["frames_apart"] = guidance.frames_apart(guide, times, rows=x.shape[0])
        if tiles is None:
            around = None if residual is None else residual.around
            return dit(x, time, **known, around=around, cache=cache)
        patch = dit.config.patch_size
        grid = patchify.grid(*x.shape[1:4], patch_size=patch)
        time = time if time.ndim > 1 else time[:, None, None, None]
        time = patchify.spread(jnp.broadcast_to(time, (x.shape[0], *grid)), patch)
        pf, ph, pw = patch

        def of_tile(part, t, given):
            own = None if residual is None else Residual(given)
            around = None if own is None else own.around
            part = dit(part, t[:, ::pf, ::ph, ::pw], **known, around=around)
            return part, None if own is None else own.stored

        given = None if residual is None else residual.given
        x, stored = tiling.blended_with(
            of_tile, x, time, given, tile=tiles.size, overlap=tiles.overlap, channels=latents
        )
        if residual is not None:
            residual.stored = stored
        return x

    return velocity


def _texts(text: Text, count: int) -> dict[str, Any]:
    """The transformer's arguments for the first `count` rows.

    Guidance may be off for one of two transformers: then the prompts' rows are the first.
    """
    emb, mask = text.emb[:count], text.mask[:count]
    if text.of_frames is None:
        return {"text_emb": emb, "text_mask": mask}
    _, texts, length, width = emb.shape
    numbers = jnp.broadcast_to(jnp.arange(texts)[None, :, None], mask.shape)
    return {
        "text_emb": emb.reshape(count, texts * length, width),
        "text_mask": mask.reshape(count, -1),
        "text_segment_ids": numbers.reshape(count, -1),
        "text_of_frames": text.of_frames[:count],
        "num_texts": texts,
    }


def keep_clean(
    x: Latents,
    clean: Latents,
    keep: Bool[Array, "b f_grid h_grid w_grid"],
    *,
    patch_size: patchify.PatchSize,
) -> Latents:
    """`x` with the given tokens in their places."""
    return jnp.where(patchify.spread(keep, patch_size)[..., None], clean, x)
