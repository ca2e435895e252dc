"""`VideoVAE`: the causal video autoencoder of the Wan family, whole clips at a time.

Wan 2.1 (Wan Team 2025, arXiv:2503.20314, section 4.1) and 2.2, which folds pixels into channels
first and adds shortcuts around the stages. Frame 0 becomes a latent frame of its own, so a
single image is a clip; every `scale_factor_temporal` frames after it become one more.

"Moments" are raw, as the network gives them; "latents" are always normalised per channel with
the mean and std of the config, which nothing outside this file uses.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from sora_jax import sharding
from sora_jax.types import Latents, Video
from sora_jax.vae import space
from sora_jax.vae.blocks import ChannelRMSNorm, DownStage, MidBlock, UpStage, run_block
from sora_jax.vae.config import VAEConfig
from sora_jax.vae.conv import Carry, CausalConv3d

# Rows and columns are cut by `space`, or not at all.
_ACTIVATION = ("batch", "frames", None, None, "channels")


class Moments(NamedTuple):
    """The Gaussian that the encoder predicts for the raw latents; logvar in [-30, 20]."""

    mean: Latents
    logvar: Latents


class Encoder(nnx.Module):
    """Patches of pixels to 2 * z_dim channels."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = config.encoder_widths
        options = {"rngs": rngs, "dtype": config.dtype}
        self.conv_in = CausalConv3d(config.in_channels, widths[0], size=(3, 3, 3), **options)
        self.stages = nnx.List(
            [
                DownStage(
                    widths[i],
                    widths[i + 1],
                    depth=config.num_res_blocks,
                    down=i < len(config.temporal_downsample),
                    time=(*config.temporal_downsample, False)[i],
                    residual=config.is_residual,
                    **options,
                )
                for i in range(len(config.dim_mult))
            ]
        )
        self.mid = MidBlock(widths[-1], **options)
        self.norm_out = ChannelRMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, size=(3, 3, 3), **options)
        self.remat = config.remat

    def __call__(self, x: jax.Array, carry: Carry | None = None) -> jax.Array:
        x = self.conv_in(x, carry)
        for stage in self.stages:
            x = stage(x, carry, remat=self.remat)
        x = run_block(self.mid, x, carry, remat=self.remat)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), carry)


class Decoder(nnx.Module):
    """z_dim channels to patches of pixels."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = config.decoder_widths
        options = {"rngs": rngs, "dtype": config.dtype}
        upsample = config.temporal_downsample[::-1]
        self.conv_in = CausalConv3d(config.z_dim, widths[0], size=(3, 3, 3), **options)
        self.mid = MidBlock(widths[0], **options)
        self.stages = nnx.List(
            [
                UpStage(
                    widths[i] if i == 0 or config.is_residual else widths[i] // 2,
                    widths[i + 1],
                    depth=config.num_res_blocks + 1,
                    up=i < len(upsample),
                    time=(*upsample, False)[i],
                    residual=config.is_residual,
                    **options,
                )
                for i in range(len(config.dim_mult))
            ]
        )
        self.norm_out = ChannelRMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, size=(3, 3, 3), **options)
        self.remat = config.remat

    def __call__(self, x: jax.Array, carry: Carry | None = None) -> jax.Array:
        x = self.conv_in(x, carry)
        x = run_block(self.mid, x, carry, remat=self.remat)
        for stage in self.stages:
            x = stage(x, carry, remat=self.remat)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), carry)


class VideoVAE(nnx.Module):
    """Encoder and decoder with the normalisation of latents.

    Videos are float32 in [-1, 1] with F = 1 + k * scale_factor_temporal frames and sides that
    are multiples of scale_factor_spatial.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        options = {"size": (1, 1, 1), "rngs": rngs, "dtype": config.dtype}
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, **options)
        # Posteriors start narrow: noise as large as the signal would hide it from the decoder,
        # and thousands of steps would go by before the means outgrow it.
        start = jnp.concatenate([jnp.zeros(config.z_dim), jnp.full(config.z_dim, -6.0)])
        self.quant_conv.bias[...] = start
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, **options)
        self.decoder = Decoder(config, rngs=rngs)
        self.config = config

    def encode_moments(self, video: Video) -> Moments:
        """Mean and log-variance of the raw latents.

        Raises:
          ValueError: for a frame count or size that the VAE does not take.
        """
        check_video_shape(self.config, *video.shape[1:4])
        return self.moments_of(video)

    def moments_of(self, video: Video, carry: Carry | None = None) -> Moments:
        """`encode_moments` of a clip, or of its next chunk; checks nothing."""
        x = self._run(_encode, (self.encoder, self.quant_conv), video, carry)
        mean, logvar = jnp.split(x, 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, -30.0, 20.0))

    def encode(self, video: Video) -> Latents:
        """The most probable latents of `video`, normalised."""
        return self.normalize(self.encode_moments(video).mean)

    def sample_latents(self, moments: Moments, key: Key[Array, ""]) -> Latents:
        """Normalised latents drawn from `moments`."""
        noise = jax.random.normal(key, moments.mean.shape)
        return self.normalize(moments.mean + jnp.exp(0.5 * moments.logvar) * noise)

    def decode(self, latents: Latents) -> Video:
        """Video in [-1, 1] of normalised latents."""
        return jnp.clip(self.decode_raw(latents), -1.0, 1.0)

    def decode_raw(self, latents: Latents, carry: Carry | None = None) -> Video:
        """`decode` without the clamp, whose gradient training needs; `carry` as in blocks.py."""
        modules = (self.post_quant_conv, self.decoder)
        return self._run(_decode, modules, self.denormalize(latents), carry)

    def _run(self, body: Callable, modules, x: jax.Array, carry: Carry | None) -> jax.Array:
        """`body(modules, x, patch size, carry)`, over space where there is a mesh."""
        patch = self.config.patch_size or 1

        def local(modules, x, kept):
            own = None if carry is None else Carry(kept)
            y = body(modules, x, patch, own)
            return y, () if own is None else tuple(own.kept)

        x = sharding.constrain(x, *_ACTIVATION)
        multiple = self.config.scale_factor_spatial if body is _encode else 1
        y, kept = space.run(local, modules, x, carry and carry.taken, multiple=multiple)
        if carry is not None:
            carry.kept.extend(kept)
        return sharding.constrain(y, *_ACTIVATION)

    def normalize(self, raw: Latents) -> Latents:
        """Raw latents to zero mean and unit variance per channel."""
        return (raw - _per_channel(self.config.latents_mean)) / _per_channel(
            self.config.latents_std
        )

    def denormalize(self, latents: Latents) -> Latents:
        """The inverse of `normalize`."""
        return latents * _per_channel(self.config.latents_std) + _per_channel(
            self.config.latents_mean
        )


def _encode(modules, video: Video, patch: int, carry: Carry | None) -> jax.Array:
    encoder, quant_conv = modules
    return quant_conv(encoder(patchify(video, patch), carry))


def _decode(modules, x: jax.Array, patch: int, carry: Carry | None) -> Video:
    post_quant_conv, decoder = modules
    return unpatchify(decoder(post_quant_conv(x), carry), patch)


def _per_channel(values) -> jax.Array:
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 1, -1)


def check_video_shape(config: VAEConfig, frames: int, height: int, width: int) -> None:
    """Raises ValueError, with the nearest allowed values, unless the VAE takes such a video."""
    step = config.scale_factor_temporal
    if frames < 1 or (frames - 1) % step:
        below = max(1, frames - (frames - 1) % step)
        near = " or ".join(str(n) for n in sorted({below, below + step if frames > 0 else 1}))
        raise ValueError(
            f"{frames} frames do not fit the VAE: it takes 1 + {step}k; the nearest are {near}."
        )
    side = config.scale_factor_spatial
    if height % side or width % side or min(height, width) < side:
        near = [max(1, round(n / side)) * side for n in (width, height)]
        raise ValueError(
            f"size {width}x{height} does not fit the VAE: sides must be multiples of {side}; "
            f"the nearest is {near[0]}x{near[1]}."
        )


def patchify(video: Float[Array, "b t H W c"], patch_size: int) -> Float[Array, "b t h w p"]:
    """Folds squares of pixels into channels, ordered (channel, x in square, y in square)."""
    b, t, height, width, c = video.shape
    p = patch_size
    x = video.reshape(b, t, height // p, p, width // p, p, c)
    return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(b, t, height // p, width // p, c * p * p)


def unpatchify(x: Float[Array, "b t h w p"], patch_size: int) -> Float[Array, "b t H W c"]:
    """The inverse of `patchify`."""
    b, t, h, w, channels = x.shape
    p = patch_size
    x = x.reshape(b, t, h, w, channels // (p * p), p, p)
    return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(b, t, h * p, w * p, channels // (p * p))
