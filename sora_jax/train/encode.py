"""The frozen encoders over clips: the VAE by groups of equal size, captions, and pictures."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from sora_jax import sharding
from sora_jax.convert import folder
from sora_jax.train.pictures import known_frames, show
from sora_jax.train.vae_stage import to_float
from sora_jax.vae.streaming import encode_chunked

# Pixels (frames included) encoded at once on a device: what activations take grows with them.
PIXELS_AT_ONCE = 2**21
MAX_BATCH = 16
CHUNK = 4  # latent frames at a time, of clips that exceed it by themselves


class Posterior(NamedTuple):
    """Mean and log-variance of one clip's normalised latents, in bfloat16."""

    mean: Float[np.ndarray, "_ _ _ c"]
    logvar: Float[np.ndarray, "_ _ _ c"]


class ClipEncoder:
    """Encodes clips of any sizes that the VAE takes; one compilation for every size.

    Args:
      vae_folder: inference folder that holds the VAE.
      devices: that share each group of clips; None takes all of this process.
    """

    def __init__(self, vae_folder: str | Path, *, devices: Sequence[jax.Device] | None = None):
        devices = jax.local_devices() if devices is None else devices
        self._mesh = sharding.make_mesh(data=len(devices), fsdp=1, devices=devices)
        self._devices = len(devices)
        self.config, graphdef, params = folder.load_component(Path(vae_folder), "vae")
        self.hash = vae_hash(Path(vae_folder))
        self._params = sharding.replicate(params, self._mesh)
        # A clip of the stated mean and deviation, so that a cache needs no VAE to be read.
        scale = -2 * np.log(np.asarray(self.config.latents_std, np.float32))

        def encode(params, video, pictures):
            vae = nnx.merge(graphdef, params)
            pixels = to_float(video)
            if pictures:  # grey is no byte
                known = known_frames(pictures, video.shape[1])
                pixels = jnp.where(known[None, :, None, None, None], pixels, 0.0)
            if np.prod(video.shape[1:4]) > PIXELS_AT_ONCE:
                moments = encode_chunked(vae, pixels, chunk=CHUNK)
            else:
                moments = vae.encode_moments(pixels)
            logvar = moments.logvar + scale.reshape(1, 1, 1, 1, -1)
            return vae.normalize(moments.mean).astype(jnp.bfloat16), logvar.astype(jnp.bfloat16)

        self._encode = jax.jit(encode, static_argnames="pictures")

    def __call__(
        self, videos: Sequence[UInt8[np.ndarray, "_ _ _ 3"]], *, pictures: str = ""
    ) -> list[Posterior]:
        """The posterior of each clip, in the order given.

        Args:
          pictures: of the clip that shows what this mask gives and is grey elsewhere; "": of all.

        Raises:
          ValueError: for a frame count or size that the VAE does not take.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, video in enumerate(videos):
            groups.setdefault(video.shape, []).append(i)
        found: list[Posterior | None] = [None] * len(videos)
        for shape, members in groups.items():
            size = self._batch_size(shape)
            for start in range(0, len(members), size):
                part = members[start : start + size]
                # Filled up with its last clip: one compiled shape serves all.
                full = part + part[-1:] * (size - len(part))
                batch = np.stack([videos[i] for i in full])
                placed = jax.device_put(batch, sharding.named(self._mesh, "batch"))
                with sharding.use_mesh(self._mesh):
                    encoded = self._encode(self._params, placed, pictures=pictures)
                mean, logvar = jax.device_get(encoded)
                for row, i in enumerate(part):
                    found[i] = Posterior(mean[row], logvar[row])
        return found

    def _batch_size(self, shape: tuple[int, ...]) -> int:
        each = int(
            np.clip(PIXELS_AT_ONCE // np.prod(shape[:3]), 1, MAX_BATCH // self._devices or 1)
        )
        return each * self._devices


def vae_hash(vae_folder: Path) -> str:
    """Of the weights and of the config, which holds the latents' mean and deviation."""
    return _hash(vae_folder, "vae")


def text_hash(text_folder: Path) -> str:
    """Of the text encoder's weights and config."""
    return _hash(text_folder, "text")


def image_hash(image_folder: Path) -> str:
    """Of the image encoder's weights and config."""
    return _hash(image_folder, "image")


def _hash(path: Path, component: str) -> str:
    files = folder.find_component(path, component)[2].paths
    config = Path(path) / folder.COMPONENTS[component].folder / "config.json"
    return folder.hash_files([*files, *([config] if config.is_file() else [])])[:16]


class CaptionEncoder:
    """The frozen text encoder over captions of any length; rows of padding are left out.

    Args:
      text_folder: inference folder that holds text encoder and tokenizer.
      max_tokens: longer captions are cut.
    """

    MULTIPLE = 16  # lengths are rounded up to it, so that few shapes are compiled
    BATCH = 32

    def __init__(self, text_folder: str | Path, *, max_tokens: int):
        _, graphdef, params = folder.load_component(Path(text_folder), "text")
        self.tokenizer = folder.open_tokenizer(text_folder)
        self.max_tokens = max_tokens
        self.hash = text_hash(Path(text_folder))
        self._params = params
        self._encode = jax.jit(lambda p, ids, mask: nnx.merge(graphdef, p)(ids, mask))

    def __call__(self, captions: Sequence[str]) -> list[Float[np.ndarray, "_ d"]]:
        """One array of tokens by width in bfloat16 for each caption."""
        unique = sorted(set(captions), key=len)
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(unique), self.BATCH):
            part = unique[start : start + self.BATCH]
            full = part + part[-1:] * (self.BATCH - len(part))
            _, mask = self.tokenizer.batch(part, length=self.max_tokens, max_length=self.max_tokens)
            longest = int(mask.sum(axis=1).max())
            length = min(-(-longest // self.MULTIPLE) * self.MULTIPLE, self.max_tokens)
            ids, mask = self.tokenizer.batch(full, length=length, max_length=length)
            rows = np.asarray(self._encode(self._params, ids, mask))
            for caption, row, real in zip(part, rows, mask, strict=False):
                found[caption] = row[real].astype(ml_dtypes.bfloat16)
        return [found[caption] for caption in captions]


class PictureEncoder:
    """The frozen image encoder over clips' first frames, or first and last.

    Args:
      image_folder: inference folder that holds the image encoder.
      pictures: of a clip, 1 or 2.
    """

    BATCH = 32  # pictures at once

    def __init__(self, image_folder: str | Path, *, pictures: int):
        config, graphdef, self._params = folder.load_component(Path(image_folder), "image")
        self._show = functools.partial(show, size=config.image_size, pictures=pictures)
        self._encode = jax.jit(lambda p, shown: nnx.merge(graphdef, p)(shown))

    def __call__(
        self, videos: Sequence[UInt8[np.ndarray, "_ _ _ 3"]]
    ) -> list[Float[np.ndarray, "i d"]]:
        """Features of each clip's pictures, one after the other, in bfloat16."""
        shown, found = np.concatenate([self._show(video) for video in videos]), []
        for start in range(0, len(shown), self.BATCH):
            part = shown[start : start + self.BATCH]
            full = np.concatenate([part, part[-1:].repeat(self.BATCH - len(part), axis=0)])
            found.append(np.asarray(self._encode(self._params, full))[: len(part)])
        rows = np.concatenate(found).astype(ml_dtypes.bfloat16)
        return list(rows.reshape(len(videos), -1, rows.shape[-1]))
