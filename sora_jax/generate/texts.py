"""Prompts to what cross-attention sees: one text for a video, or one for each span of its time."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from sora_jax.generate.conditions import Text
from sora_jax.generate.request import Request
from sora_jax.prompts import timed


def embed(pipe, requests: Sequence[Request], *, begin: int = 0, total: int | None = None) -> Text:
    """Embeddings of the prompts, and of the negative ones where guidance needs them.

    Time-stamped prompts ("[0s-1s] ... [1s-2s] ...") are embedded one by one, and each frame
    attends to the one of its time.

    Args:
      begin: first frame of these videos in a film of `total` frames, which time stamps are for;
        what lies outside the film follows its first or its last prompt.

    Raises:
      ValueError: stamps that do not fit the film.
    """
    guides = [requests[0].guide(expert) for expert in range(len(pipe.experts.parts))]
    negative = [r.negative_prompt for r in requests] if any(g.needs_uncond for g in guides) else []
    prompts = [request.prompt for request in requests]
    if not any(timed.is_timed(prompt) for prompt in prompts):
        return Text(*pipe.encode_text(prompts, negative))
    spans, of_frames = _spans(pipe, requests, begin, total or requests[0].frames)
    several = max(map(len, spans))
    # A video of fewer texts has its last one again, which none of its frames follows.
    spans = [row + row[-1:] * (several - len(row)) for row in spans]
    texts = [text for row in spans for text in row] + [t for t in negative for _ in range(several)]
    emb, mask = pipe.encode_text(texts)
    rows = len(texts) // several
    return Text(
        emb.reshape(rows, several, *emb.shape[1:]),
        mask.reshape(rows, several, -1),
        jnp.asarray(np.concatenate([of_frames] * (rows // len(requests)))),
    )


def check(pipe, prompt: str, *, frames: int, fps: float) -> None:
    """Raises ValueError for time stamps that do not fit a video of `frames`."""
    if timed.is_timed(prompt):
        segments = timed.parse(prompt, duration=frames / fps)
        step = pipe.vae.config.scale_factor_temporal
        timed.latent_prompts(segments, frames=frames, fps=fps, temporal=step)


def _spans(pipe, requests: Sequence[Request], begin: int, total: int):
    """The texts of each prompt, and which of them each frame of tokens follows (b, f_grid)."""
    fps, step = requests[0].fps, pipe.vae.config.scale_factor_temporal
    whole = timed.Segment(0.0, total / fps, "")
    rows = [
        timed.parse(request.prompt, duration=total / fps)
        if timed.is_timed(request.prompt)
        else (whole._replace(text=request.prompt),)
        for request in requests
    ]
    of_film = np.stack(
        [timed.latent_prompts(row, frames=total, fps=fps, temporal=step) for row in rows]
    )
    first, latents = (begin + step // 2) // step, 1 + (requests[0].frames - 1) // step
    frames = np.arange(first, first + latents, pipe.dit.config.patch_size[0])
    at = np.clip(frames, 0, of_film.shape[1] - 1)
    return [[s.text for s in row] for row in rows], of_film[:, at]
