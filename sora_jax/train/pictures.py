"""Training of models that take what is given as channels beside the noise: Wan's image-to-video.

First-and-last-frame models (FLF2V) are among them. The same mixture of masks as for models with a
time for every token, drawn over video frames: beside the noisy latents lie the mask of the frames
that are given and the latents of a video that shows them and is grey elsewhere (Wan Team 2025,
arXiv:2503.20314, section 5.1). Wan 2.1's models also attend to CLIP's features of the first frame,
or of the first and last, by a frozen tower. Every token is noisy and counted.

From pixels of one size, what is given is encoded in every step. A cache of latents holds it encoded
for one mask of GIVEN; then neither VAE nor tower is on the step's path, and clips of mixed sizes
train in buckets or packed rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from sora_jax.convert import folder
from sora_jax.data import latents
from sora_jax.diffusion import tasks
from sora_jax.diffusion.tasks import TaskMixture
from sora_jax.dit.config import DiTConfig
from sora_jax.generate import conditions
from sora_jax.image.clip import CLIPVisionConfig, preprocess
from sora_jax.train import frozen
from sora_jax.types import Video
from sora_jax.vae.config import VAEConfig

IN_TIME = ("none", "first", "first_last", "keyframes", "prefix", "suffix", "middle", "loop")
WITH_FIRST = ("first", "first_last", "prefix", "middle", "loop")  # those that give frame 0
WITH_BOTH = ("first_last", "middle", "loop")  # and the last frame
GIVEN = {"first": (0,), "first_last": (0, -1)}  # masks that a cache may be made for, their frames


def show(video: UInt8[np.ndarray, "F H W 3"], *, size: int, pictures: int) -> np.ndarray:
    """The first frame as an image encoder takes it, or the first and last: (pictures, S, S, 3)."""
    return np.stack([preprocess(video[at], size=size) for at in (0, -1)[:pictures]])


def mask_channels(known: Bool[Array, "b F"], *, temporal: int) -> Float[Array, "b f temporal"]:
    """The mask of each latent frame, a channel for each video frame in it; as in sampling."""
    first = jnp.repeat(known[:, :1], temporal, axis=1)
    spread = jnp.concatenate([first, known[:, 1:]], axis=1)
    return spread.reshape(known.shape[0], -1, temporal).astype(jnp.float32)


def known_frames(mask: str, frames: int) -> Bool[np.ndarray, " F"]:
    """Which frames of a clip a mask of GIVEN gives; none of an image, as in `Pictures.known`."""
    known = np.zeros(frames, bool)
    if frames > 1:
        known[list(GIVEN[mask])] = True
    return known


@dataclasses.dataclass(frozen=True)
class Beside:
    """A cached record with what a model sees beside the noise: `given` with its mask as channels.

    Args:
      mask: that the cache was made for; "": the model takes no pictures, and they go.
      temporal: video frames in a latent one.
      rows: of image features that the model takes, the first ones; 0 takes none.
    """

    mask: str = ""
    temporal: int = 1
    rows: int = 0

    def __call__(self, record: dict) -> dict:
        kept = {name: value for name, value in record.items() if name not in latents.PICTURES}
        if self.mask:
            given = record["given"]
            known = known_frames(self.mask, 1 + (len(given) - 1) * self.temporal)
            mask = conditions.mask_channels(known, temporal=self.temporal)[:, None, None]
            mask = np.broadcast_to(mask, (*given.shape[:-1], self.temporal))
            kept["given"] = np.concatenate([mask, given], axis=-1)
        if self.rows:
            kept["image_emb"] = record["image_emb"][: self.rows]
        return kept


def reads_latents(data: Any) -> bool:
    """Whether a run of `config.data`, or a part of it, reads latents that were encoded before."""
    # `get`: the configs of earlier runs lack the key.
    parts = (data.get("parts") or {"": {}}).values()
    return any(
        part.get("kind", data.kind) == "latents" or bool(part.get("cache", data.cache))
        for part in parts
    )


def _abstract_tower(dit: DiTConfig) -> folder.Opened:
    settings = CLIPVisionConfig(width=dit.image_dim, dtype=dit.dtype)
    graphdef, shapes = folder.abstract_params("image", settings)
    return folder.Opened(settings, graphdef, shapes, lambda: shapes)


class Pictures:
    """What a batch gives such a model, drawn anew in every step.

    Args:
      config: the run's; `image_checkpoint` is the folder whose image encoder is used.
      abstract: reads no file; the encoder is Wan's, in shapes alone.

    Raises:
      ValueError: channels that fit no such model, masks in space, a cache of several masks, or
        pixels of mixed sizes.

    Attributes:
      cached: the mask of GIVEN for which a cache holds what is given; "" with pixels.
    """

    def __init__(
        self,
        config: Any,
        dit: DiTConfig,
        vae: VAEConfig,
        mixture: TaskMixture,
        *,
        abstract: bool = False,
    ):
        wanted = 2 * vae.z_dim + vae.scale_factor_temporal
        if dit.in_channels != wanted:
            raise ValueError(
                f"config.dit.in_channels {dit.in_channels}: with this VAE of {vae.z_dim} channels "
                f"it is 0 for text to video, or {wanted} for masks and pictures."
            )
        self.pictures = 1 if dit.image_positions is None else 2
        allowed, among = IN_TIME, ""
        if dit.image_dim:
            allowed, among = WITH_FIRST, ", the first among them"
        if self.pictures == 2:
            allowed, among = WITH_BOTH, ", the first and the last among them"
        for name in mixture.trained:
            if name not in allowed:
                raise ValueError(
                    f"config.tasks.weights.{name}: this model is given whole frames{among}; "
                    f"use {', '.join(allowed)}."
                )
        self.cached = _cached_mask(config.data, mixture)
        if config.sample_every:
            raise ValueError(
                f"config.sample_every {config.sample_every}: previews show no pictures so far; "
                "set it to 0."
            )
        self.mixture, self._temporal = mixture, vae.scale_factor_temporal
        self._tower = None
        if dit.image_dim is not None:
            path = config.get("image_checkpoint", "")
            if not path and not abstract:
                raise ValueError(
                    "config.image_checkpoint is empty; set it to the folder of the image encoder."
                )
            self._tower = (
                _abstract_tower(dit)
                if abstract
                else folder.open_component(frozen.path_of(config, "image_checkpoint"), "image")
            )
            if self._tower.config.width != dit.image_dim:
                raise ValueError(
                    f"config.dit.image_dim {dit.image_dim}: the image encoder {path} gives "
                    f"features of width {self._tower.config.width}; use that, or another encoder."
                )
            rows = self.feature_rows
            if dit.image_positions not in (None, rows):
                raise ValueError(
                    f"config.dit.image_positions {dit.image_positions}: the image encoder {path} "
                    f"gives {rows} rows for two pictures; use that, or 0 for one picture."
                )

    @property
    def feature_rows(self) -> int:
        """Rows of image features that cross-attention sees; 0 without an encoder."""
        return 0 if self._tower is None else self.pictures * self._tower.config.num_positions

    @property
    def of_records(self) -> Beside:
        """What changes cached records."""
        return Beside(self.cached, self._temporal, self.feature_rows)

    @property
    def abstract(self) -> Any:
        """Shapes of the image encoder's parameters; an empty tree without one."""
        return {} if self._tower is None else self._tower.abstract

    def load(self) -> dict[str, Any]:
        """Parameters of the frozen image encoder, if steps need one."""
        return {} if self._tower is None or self.cached else {"image": self._tower.load()}

    @property
    def image_size(self) -> int | None:
        """Pixels a side of what the image encoder takes in a step; None where none does."""
        return None if self._tower is None or self.cached else self._tower.config.image_size

    def known(self, key: jax.Array, clips: int, frames: int) -> Bool[Array, "b F"]:
        """Which frames of each clip are given."""
        draws = tasks.draw(key, (clips,), self.mixture)
        of_frames = jax.tree.map(lambda x: jnp.repeat(x[:, None], frames, axis=1), draws)
        zeros = jnp.zeros((clips, frames), jnp.int32)
        places = jnp.broadcast_to(jnp.arange(frames), (clips, frames))
        return tasks.given(
            of_frames,
            jnp.stack([places, zeros, zeros], axis=-1),
            jnp.broadcast_to(jnp.array([frames, 1, 1]), (clips, frames, 3)),
            u_token=jnp.ones((clips, frames)),
        )

    def channels(
        self, vae: Any, video: Video, known: Bool[Array, "b F"]
    ) -> Float[Array, "b f h w m"]:
        """Mask and latents that lie beside the noise.

        Args:
          vae: frozen.
          video: in [-1, 1].
        """
        shown = jnp.where(known[:, :, None, None, None], video, 0.0)
        latents = jax.lax.stop_gradient(vae.encode(shown))
        mask = mask_channels(known, temporal=self._temporal)[:, :, None, None]
        mask = jnp.broadcast_to(mask, (*latents.shape[:-1], mask.shape[-1]))
        return jnp.concatenate([mask, latents], axis=-1)

    def features(self, frozen: dict[str, Any], batch: dict[str, Array]) -> jax.Array | None:
        """CLIP's features of what `show` made of each clip, for models that attend to them."""
        if self._tower is None:
            return None
        tower = nnx.merge(self._tower.graphdef, frozen["image"])
        shown = batch["image"]
        rows = jax.lax.stop_gradient(tower(shown.reshape(-1, *shown.shape[2:])))
        return rows.reshape(len(shown), -1, rows.shape[-1])


def _cached_mask(data: Any, mixture: TaskMixture) -> str:
    """`Pictures.cached` of `config.data`."""
    batching = data.get("batching", "fixed")
    if not reads_latents(data):
        if batching != "fixed":
            raise ValueError(
                f"config.data.batching {batching!r}: models that take pictures are trained on "
                "pixels of one size; set it to 'fixed', or give a cache (config.data.cache, or "
                "kind 'latents' and what `sora-jax data cache --pictures` made)."
            )
        return ""
    if len(mixture.trained) > 1 or mixture.trained[0] not in GIVEN:
        raise ValueError(
            f"config.tasks.weights {', '.join(mixture.trained)}: a cache holds the pictures of one "
            f"mask; use {' or '.join(GIVEN)} alone, or pixels (data.cache '', data.kind a source)."
        )
    (mask,) = mixture.trained
    first = data.get("first_frames", 0)
    if first and mask != "first":
        raise ValueError(
            f"config.data.first_frames {first} cuts off the last frame, which "
            f"config.tasks.weights.{mask} gives; set it to 0 (all)."
        )
    if first == 1:
        raise ValueError(
            "config.data.first_frames 1 leaves nothing beside the frame that is given; set it to 2 "
            "or more, or to 0 (all)."
        )
    return mask
