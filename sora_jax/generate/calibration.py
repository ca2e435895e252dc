"""Measures how fast the residual of a checkpoint's blocks changes: `diffusion.feature_cache`."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.diffusion import feature_cache
from sora_jax.diffusion.feature_cache import ChangeCurve
from sora_jax.generate import texts
from sora_jax.generate.conditions import Picture
from sora_jax.generate.request import Request


def change_curve(
    pipe,
    batches: Sequence[Sequence[Request]],
    *,
    pictures: Sequence[Picture | None] = (None, None),
    on_step: Callable[[], None] = lambda: None,
) -> ChangeCurve:
    """The mean over batches of requests, which differ in prompts and seeds alone.

    Args:
      pictures: as in `Pipeline.run`.
      on_step: called after every step of every batch.
    """
    measured = [_changes(pipe, requests, pictures, on_step) for requests in batches]
    return feature_cache.measured(measured[0][0], np.array([changes for _, changes in measured]))


def _changes(
    pipe, requests: Sequence[Request], pictures: Sequence[Picture | None], on_step: Callable
) -> tuple[np.ndarray, np.ndarray]:
    """Times of the steps, and how far each moved the residual; 0 where there is none before."""
    times, changes, last = [], [], None

    def compare(t: float, residual: jax.Array) -> None:
        nonlocal last
        # Between two transformers there is nothing to compare, nor to reuse.
        known = last is not None and pipe.experts.at(t) == pipe.experts.at(times[-1])
        changes.append(float(_change(residual, last)) if known else 0.0)
        times.append(t)
        last = residual
        on_step()

    given = pipe.conditions(requests[0], pictures, count=len(requests))
    text = texts.embed(pipe, requests)
    pipe.denoise(pipe.noise(requests), requests[0], text, given, on_residual=compare)
    return np.array(times), np.array(changes)


@jax.jit
def _change(
    residual: Float[Array, "rows n d"], last: Float[Array, "rows_last n d"]
) -> Float[Array, ""]:
    """Guidance may be off for one of them: then the prompts' rows are the first of the other."""
    rows = min(len(residual), len(last))
    residual, last = residual[:rows], last[:rows]
    length = lambda r: jnp.mean(jnp.linalg.norm(r, axis=-1))  # noqa: E731
    return length(residual - last) / length(residual)
