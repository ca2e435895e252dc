"""Encoding and decoding in chunks of time; no parameters.

The causal layers carry their last frames from chunk to chunk (`conv.Carry`), so that the
result equals the whole clip's while activations take the memory of one chunk, whatever the
number of frames. The first chunk is one latent frame, each later one `chunk` of them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from sora_jax import sharding
from sora_jax.types import Latents, Video
from sora_jax.vae.conv import Carry
from sora_jax.vae.model import Moments, VideoVAE, check_video_shape

Kept = tuple[jax.Array, ...]


def encode_chunked(vae: VideoVAE, video: Video, *, chunk: int = 1) -> Moments:
    """`vae.encode_moments(video)`, `chunk` latent frames at a time; can be jitted.

    Raises:
      ValueError: for a frame count or size that the VAE does not take, or chunk below 1.
    """
    check_video_shape(vae.config, *video.shape[1:4])
    frames = _check_chunk(chunk) * vae.config.scale_factor_temporal
    return _scan_chunks(functools.partial(_encode, vae), video, frames)


def decode_chunked(vae: VideoVAE, latents: Latents, *, chunk: int = 1) -> Video:
    """`vae.decode(latents)`, `chunk` latent frames at a time; can be jitted.

    Raises:
      ValueError: for chunk below 1.
    """
    return _scan_chunks(functools.partial(_decode, vae), latents, _check_chunk(chunk))


def encode_stream(vae: VideoVAE, chunks: Iterable[jax.Array]) -> Iterator[Moments]:
    """Yields the moments of each chunk of a video that need not be in memory at once.

    Args:
      chunks: videos (b, F, H, W, 3); the first has 1 + k * scale_factor_temporal frames, the
        others a multiple of it.

    Raises:
      ValueError: for a chunk of another length, or of a size that the VAE does not take.
    """
    kept = None
    for video in chunks:
        frames, *size = video.shape[1:4]
        check_video_shape(vae.config, frames if kept is None else frames + 1, *size)
        moments, kept = _jitted(_encode, vae, video, kept, mesh=sharding.current_mesh())
        yield moments


def decode_stream(vae: VideoVAE, latents: Latents, *, chunk: int = 1) -> Iterator[Video]:
    """Yields the frames of each chunk of `vae.decode(latents)` as soon as it is decoded.

    Raises:
      ValueError: for chunk below 1.
    """
    _check_chunk(chunk)
    decode = decoder(vae)
    for start in (0, *range(1, latents.shape[1], chunk)):
        yield decode(latents[:, start : start + (chunk if start else 1)])


def decoder(vae: VideoVAE) -> Callable[[Latents], Video]:
    """Decodes latents that come one part after the other; the first begins a video."""
    kept = None

    def decode(latents: Latents) -> Video:
        nonlocal kept
        parts = []
        # A part of its own size each: the first frame has no frames to carry.
        for part in (latents[:, :1], latents[:, 1:]) if kept is None else (latents,):
            if part.shape[1]:
                video, kept = _jitted(_decode, vae, part, kept, mesh=sharding.current_mesh())
                parts.append(video)
        return jnp.concatenate(parts, axis=1)

    return decode


def _encode(vae: VideoVAE, video: Video, kept: Kept | None) -> tuple[Moments, Kept]:
    carry = Carry(kept)
    moments = vae.moments_of(video, carry)
    return moments, tuple(carry.kept)


def _decode(vae: VideoVAE, latents: Latents, kept: Kept | None) -> tuple[Video, Kept]:
    carry = Carry(kept)
    video = jnp.clip(vae.decode_raw(latents, carry), -1.0, 1.0)
    return video, tuple(carry.kept)


@functools.partial(jax.jit, static_argnums=0, static_argnames="mesh")
def _jitted(run: Callable, vae: VideoVAE, x, kept: Kept | None, *, mesh: Mesh | None):
    # The mesh is an argument because it decides what is traced.
    with sharding.use_mesh(mesh):
        return run(vae, x, kept)


def _check_chunk(chunk: int) -> int:
    if chunk < 1:
        raise ValueError(f"chunk {chunk} is below 1; give the latent frames of one chunk.")
    return chunk


def _scan_chunks(run: Callable, x: jax.Array, frames: int):
    """Runs `run(x, kept) -> (y, kept)` over frame 0, then `frames` at a time, then the rest."""
    first, kept = run(x[:, :1], None)
    parts = [first]
    count = (x.shape[1] - 1) // frames
    end = 1 + count * frames
    if count:
        chunks = x[:, 1:end].reshape(x.shape[0], count, frames, *x.shape[2:])

        def step(kept, chunk):
            y, kept = run(chunk, kept)
            return kept, y

        kept, ys = lax.scan(step, kept, jnp.moveaxis(chunks, 1, 0))
        parts.append(jax.tree.map(_join_chunks, ys))
    if end < x.shape[1]:
        parts.append(run(x[:, end:], kept)[0])
    return jax.tree.map(lambda *ys: jnp.concatenate(ys, axis=1), *parts)


def _join_chunks(y: jax.Array) -> jax.Array:
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])
