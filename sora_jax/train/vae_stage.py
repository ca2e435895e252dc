"""First stage: the patch VAE learns to reconstruct clips."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.train.discriminator import Discriminator, hinge_losses
from sora_jax.types import Video, VideoBytes
from sora_jax.vae.model import VAEConfig, VideoVAE


@dataclasses.dataclass(frozen=True)
class VAELossConfig:
    """Weights of the terms of the loss; see configs/base.py."""

    l1: float
    l2: float
    multiscale: float
    kl: float
    crop: Sequence[int]
    crops: int
    adversarial: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "crop", tuple(self.crop))  # JSON knows lists only
        for name in ("l1", "l2", "multiscale", "kl", "adversarial"):
            if getattr(self, name) < 0:
                raise ValueError(f"vae_loss.{name} {getattr(self, name)} must be 0 or more.")


def to_float(video: VideoBytes) -> Video:
    """Bytes to [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1


def psnr(x: Video, y: Video) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio in dB of each clip; values in [-1, 1], so the peak is 2."""
    mse = jnp.mean(jnp.square(x - y), axis=(1, 2, 3, 4))
    return 10 * jnp.log10(4 / jnp.maximum(mse, 1e-12))


def multiscale_difference(x: Video, y: Video, *, scales: int = 3) -> Float[Array, ""]:
    """Mean absolute error of finite differences in time, height and width at several scales.

    Stands in for a perceptual loss where no pretrained network may be downloaded: it asks for
    edges where the eye sees them, at 1x, 1/2x, 1/4x of the frame size.
    """
    error, total = x - y, jnp.zeros(())
    for scale in range(scales):
        if scale:
            b, f, h, w, c = error.shape
            error = error.reshape(b, f, h // 2, 2, w // 2, 2, c).mean(axis=(3, 5))
        axes = [axis for axis in (1, 2, 3) if error.shape[axis] > 1]
        total += sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in axes)
    return total / scales


def random_crops(
    video: Video, crop: Sequence[int], *, crops: int, key: jax.Array
) -> Float[Array, "windows f h w 3"]:
    """`crops` random windows of `crop` (frames, height, width) from each clip."""
    b, F, H, W, _ = video.shape
    size = tuple(min(c, full) for c, full in zip(crop, (F, H, W), strict=True))
    if size == (F, H, W) and crops == 1:
        return video
    limits = jnp.array([F, H, W]) - jnp.array(size) + 1
    starts = jax.random.randint(key, (b, crops, 3), 0, limits[None, None])

    def one(clip, start):
        return jax.lax.dynamic_slice(clip, (*start, 0), (*size, 3))

    windows = jax.vmap(jax.vmap(one, in_axes=(None, 0)))(video, starts)
    return windows.reshape(b * crops, *size, 3)


def vae_config(config) -> VAEConfig:
    """VAEConfig of the section `config.vae`."""
    fields = config.to_dict()
    fields["decoder_base_dim"] = fields["decoder_base_dim"] or None
    channels = 3 * config.patch_size**2
    return VAEConfig(**fields, in_channels=channels, out_channels=channels)


class VAEStage:
    """Builds the VAE and its loss from a config."""

    name = "vae"
    components = ("vae",)

    def __init__(self, config, *, abstract: bool = False):
        del abstract  # it reads no weights
        self.config = vae_config(config.vae)
        self.loss_config = VAELossConfig(**config.vae_loss)
        self.frozen: Any = ()
        abstract = nnx.eval_shape(lambda: VideoVAE(self.config, rngs=nnx.Rngs(0)))
        self.graphdef = nnx.split(abstract, nnx.Param)[0]
        abstract = nnx.eval_shape(self._discriminator)
        self.discriminator_graphdef = nnx.split(abstract, nnx.Param)[0]

    def config_of(self, component: str) -> VAEConfig:
        """That of one of `components`."""
        return {"vae": self.config}[component]

    def _discriminator(self, key: jax.Array | int = 0) -> Discriminator:
        return Discriminator(rngs=nnx.Rngs(key), dtype=self.config.dtype)

    def frozen_shardings(self, mesh):
        """Of nothing: all of this stage is trained."""
        return self.frozen

    def place_frozen(self, mesh):
        """Nothing, as above."""
        return self.frozen

    def init(self, key: jax.Array):
        params = {"vae": nnx.split(VideoVAE(self.config, rngs=nnx.Rngs(key)), nnx.Param)[1]}
        if self.loss_config.adversarial:
            discriminator = self._discriminator(jax.random.fold_in(key, 1))
            params["discriminator"] = nnx.split(discriminator, nnx.Param)[1]
        return params

    def prepare(self, record: dict) -> dict:
        """Per-record numpy work in the loader."""
        return {"video": record["video"]}

    def loss(self, params, frozen, batch, key):
        """Weighted L1, L2, multi-scale, KL and adversarial terms, averaged over the batch."""
        weights = self.loss_config
        crop_key, sample_key = jax.random.split(key)
        video = to_float(batch["video"])
        video = random_crops(video, weights.crop, crops=weights.crops, key=crop_key)
        vae = nnx.merge(self.graphdef, params["vae"])
        mean, logvar = vae.encode_moments(video)
        noise = jax.random.normal(sample_key, mean.shape)
        recon = vae.decode_raw(mean + jnp.exp(0.5 * logvar) * noise)
        error = recon - video
        terms = {
            "l1": jnp.mean(jnp.abs(error)),
            "l2": jnp.mean(jnp.square(error)),
            "multiscale": multiscale_difference(recon, video),
            # KL(N(mean, exp(logvar)) || N(0, 1)), nats per latent value
            "kl": 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar),
        }
        loss = 0.0
        if weights.adversarial:
            terms["adversarial"], loss = hinge_losses(
                self.discriminator_graphdef, params["discriminator"], video=video, recon=recon
            )
        loss += sum(getattr(weights, name) * value for name, value in terms.items())
        metrics = {f"train/{name}": value for name, value in terms.items()}
        metrics["train/psnr"] = jnp.mean(psnr(jnp.clip(recon, -1, 1), video))
        return loss, metrics

    def reconstruct(self, params, video: VideoBytes) -> tuple[Video, Float[Array, "b f h w c"]]:
        """Whole clips through the VAE without noise: (reconstruction, raw latent mean)."""
        vae = nnx.merge(self.graphdef, params["vae"])
        mean, _ = vae.encode_moments(to_float(video))
        return jnp.clip(vae.decode_raw(mean), -1, 1), mean

    def rows(self, batch) -> int:
        return batch["video"].shape[0]

    def tokens(self, batch) -> int | None:
        return None

    def flops(self, batch) -> float | None:
        return None
