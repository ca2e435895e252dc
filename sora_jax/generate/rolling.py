"""Films in one window whose noise rises along time: some frames are done while others begin.

Rolling diffusion (Ruhe et al. 2024, arXiv:2402.09470, Sec. 3): latent frame j of the film begins
`stride` steps after frame j - 1, so that at any moment the frames of the window are at steps of
their own, clean ones before noisy ones. Where the first that is not clean becomes so, it is
decoded, the window moves by a frame, and noise enters at its end. No frame is made of a whole
window at once, so no seam lies between windows; and frames leave one by one, at a constant rate.

As in `windows`, the window's first latent frame is the last picture before it, encoded, because a
causal VAE's first latent frame stands for a single one.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sora_jax.dit import patchify
from sora_jax.generate import conditions, texts, windows
from sora_jax.generate.canvas import Canvas
from sora_jax.generate.conditions import Conditions, Text
from sora_jax.generate.denoise import Moment, OnStep
from sora_jax.generate.detail import Reference
from sora_jax.generate.request import Request
from sora_jax.generate.video import to_bytes


@dataclasses.dataclass(frozen=True)
class Roll:
    """Which steps the latent frames of a window are at; all counts but `steps` are latent frames.

    Attributes:
      total: frames of the film.
      window: of the window, at most `total`.
      clean: finished frames that the window keeps before those that are not.
      steps: from noise to a finished frame.
    """

    total: int
    window: int
    clean: int
    steps: int

    @property
    def stride(self) -> int:
        """Steps between a frame's beginning and the next one's: all that are under way fit."""
        return -(-self.steps // (self.window - self.clean))

    @property
    def steps_in_all(self) -> int:
        return self.stride * (self.total - 1) + self.steps

    def begin(self, finished: int) -> int:
        """The window's first frame, once `finished` frames of the film are."""
        return min(max(finished - self.clean, 0), self.total - self.window)

    def progress(self, step: int, begin: int) -> Int[np.ndarray, " f"]:
        """Steps that each frame of the window has behind it; below 0 it has not begun."""
        return step - self.stride * (begin + np.arange(self.window))


def film(
    pipe,
    requests: Sequence[Request],
    sweep: windows.Sweep,
    *,
    canvases: Sequence[Canvas] | None = None,
    on_step: OnStep | None = None,
) -> Iterator[UInt8[np.ndarray, "b n H W 3"]]:
    """Yields the frames of films latent frame by latent frame, as soon as they are made.

    Args:
      pipe: a `Pipeline` whose model was trained with a time for every frame
        (`config.tasks.frame_noise`) and on clips that go on ("prefix"); see `trained.check`.
      requests: of one window each, or of the whole film if that is shorter; guided as
        `Request.going_on` says from where the window moves.
      sweep: `overlap` frames of a window are finished ones.
      canvases: what is given of each film's beginning, at most a window.
      on_step: called with steps over the whole film.

    Raises:
      ValueError: two transformers, of which each knows only half of the times; a feature cache,
        which is measured for one time; patches of several frames.
    """
    shared = requests[0]
    _check(pipe, shared)
    temporal = pipe.vae.config.scale_factor_temporal
    size = pipe.latent_shape(shared)[0]
    total, overlap = (1 + (frames - 1) // temporal for frames in (sweep.total, sweep.overlap))
    roll = Roll(total, size, min(overlap, size - 1), shared.steps)
    whole = [dataclasses.replace(request, frames=sweep.total) for request in requests]
    text = texts.embed(pipe, whole)
    given = Conditions()
    if canvases is not None:
        given = pipe.conditions(shared, canvases=windows.cut(canvases, 0, shared.frames))
    denoise, decoder = pipe.denoise, pipe.decoder()
    state = denoise.begin_by_frame(pipe.noise(requests), shared)
    references: list[list[Reference]] = [[] for _ in canvases or ()]
    last_pictures: dict[int, np.ndarray] = {}
    patch = pipe.dit.config.patch_size
    here = _here(given, state.x, 0, None, patch_size=patch)
    kv, seen_before = denoise.given_kv(shared), None
    step = shown = begin = 0
    for frame in range(total):
        if roll.begin(frame) > begin:
            begin = roll.begin(frame)
            fresh = denoise.begin_by_frame(_noise(pipe, requests, begin + size - 1), shared)
            state = jax.tree.map(lambda a, b: jnp.concatenate([a[:, 1:], b], 1), state, fresh)
            before = pipe.encode(last_pictures.pop(begin)[:, None])
            here = _here(given, state.x, begin, before, patch_size=patch)
            shared = requests[0].going_on()
        while step < roll.stride * frame + shared.steps:
            progress, x = roll.progress(step, begin), state.x
            finished = jnp.asarray(progress >= shared.steps)[None, :, None, None]
            clean = conditions.keep_clean(x, here.clean, here.keep, patch_size=patch)
            seen = Conditions(clean=clean, keep=here.keep | finished)
            if (begin, sum(progress >= shared.steps)) != seen_before:
                seen_before = (begin, sum(progress >= shared.steps))
                kv.begin(seen.keep)
            state, own = denoise.step_by_frame(
                state, progress, shared, _at(text, begin, size), seen, of_given=kv.next()
            )
            kv.store(own)
            del own  # or it would lie beside what the next step stores
            step += 1
            if on_step is not None:
                jax.block_until_ready(state.x)
                times = denoise.times_by_frame(progress, shared)
                on_step(step, roll.steps_in_all, Moment(state.x, x, times, seen))
        made = conditions.keep_clean(state.x, here.clean, here.keep, patch_size=patch)
        made = to_bytes(decoder(made[:, frame - begin : frame - begin + 1]))
        last_pictures[frame] = made[:, -1]
        if canvases is not None:
            local = windows.cut(canvases, shown, made.shape[1])
            parts = zip(local, made, references, strict=True)
            made = np.stack([windows.finish(*part, shown) for part in parts])
        shown += made.shape[1]
        yield made


def _check(pipe, request: Request) -> None:
    if len(pipe.experts.parts) > 1:
        raise ValueError(
            "rolling needs one transformer for all times; this checkpoint has two: leave it out."
        )
    if request.cache_threshold:
        raise ValueError("rolling does not go with a cache threshold; leave out one of them.")
    if pipe.dit.config.patch_size[0] > 1:
        raise ValueError("rolling needs patches of one latent frame; leave it out.")


def _noise(pipe, requests: Sequence[Request], frame: int) -> Float[Array, "b 1 h w c"]:
    """Noise of a latent frame that enters; the first window's is that of a video of its own."""
    shape = (1, *pipe.latent_shape(requests[0])[1:])
    keys = [jax.random.fold_in(jax.random.key(request.seed), frame) for request in requests]
    return jnp.stack([jax.random.normal(key, shape) for key in keys])


def _here(
    given: Conditions,
    x: Float[Array, "b f h w c"],
    begin: int,
    before: Float[Array, "b 1 h w c"] | None,
    *,
    patch_size: patchify.PatchSize,
) -> Conditions:
    """What is given of the film in a window that begins at a later latent frame.

    Args:
      before: latents of the picture that the window begins with, where the film did not begin.
    """
    grid = patchify.grid(*x.shape[1:4], patch_size=patch_size)
    clean, keep = jnp.zeros_like(x), jnp.zeros((x.shape[0], *grid), bool)
    if given.clean is not None and begin < x.shape[1]:
        left = x.shape[1] - begin
        clean = clean.at[:, :left].set(given.clean[:, begin:])
        keep = keep.at[:, :left].set(given.keep[:, begin:])
    if before is not None:
        clean, keep = clean.at[:, :1].set(before), keep.at[:, :1].set(True)
    return Conditions(clean=clean, keep=keep)


def _at(text: Text, begin: int, size: int) -> Text:
    """`text` of a film for a window of it."""
    if text.of_frames is None:
        return text
    return text._replace(of_frames=text.of_frames[:, begin : begin + size])
