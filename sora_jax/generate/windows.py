"""Films longer than a model sees at once: windows that slide over time, each given the last frames.

Of what a window takes over from the one before, latents stay as they are, so that nothing fades by
being decoded and encoded again and again; only its first frame is encoded, for a causal VAE's first
latent frame stands for a single one. Frames are decoded as they come, and nothing grows with the
length of the film.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from sora_jax.generate import canvas as canvas_of
from sora_jax.generate import detail, texts
from sora_jax.generate.canvas import Canvas
from sora_jax.generate.conditions import Conditions, Tiles
from sora_jax.generate.denoise import Moment, OnStep, Start
from sora_jax.generate.detail import Reference
from sora_jax.generate.request import Request
from sora_jax.generate.video import to_bytes
from sora_jax.prompts import timed

# The requests of a window from its number and its first frame; all of one size.
RequestsAt = Callable[[int, int], Sequence[Request]]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How windows lie over a film.

    Attributes:
      total: frames of the film, 1 + a multiple of the VAE's temporal factor.
      window: frames of a window; likewise.
      overlap: frames that a window takes over from the one before; likewise.
      before: frames of the video in front of the sweep, which time stamps count too.

    Raises:
      ValueError: windows that do not move forward.
    """

    total: int
    window: int
    overlap: int
    before: int = 0

    def __post_init__(self):
        if self.total > self.window and not 0 < self.overlap < self.window:
            raise ValueError(
                f"windows of {self.window} frames that take over {self.overlap}; use 1 to "
                f"{self.window - 1}."
            )

    @property
    def begins(self) -> list[int]:
        """First frames of the windows; the last takes over more where it must."""
        if self.total <= self.window:
            return [0]
        last = self.total - self.window
        return [*range(0, last, self.window - self.overlap), last]


def film(
    pipe,
    requests_at: RequestsAt,
    sweep: Sweep,
    *,
    canvases: Sequence[Canvas] | None = None,
    drafts: UInt8[np.ndarray, "b F H W 3"] | None = None,
    strength: float = 1.0,
    on_step: OnStep | None = None,
) -> Iterator[UInt8[np.ndarray, "b n H W 3"]]:
    """Yields the frames of films as soon as they are made, window by window.

    Args:
      pipe: a `Pipeline` whose model was trained on clips that go on ("prefix"), unless one
        window is all.
      requests_at: requests of each window, `sweep.window` frames long, or the whole film's; all
        but the first are guided as `Request.going_on` says, unless there are drafts.
      canvases: what is given of each film, over its whole length or its beginning.
      drafts, strength: as in `Pipeline.run`, over the whole length.
      on_step: called with steps over all windows.
    """
    begins = sweep.begins
    decoder = pipe.decoder()
    frames = latents = end = None
    steps: list[int | None] = [None] * len(begins)
    references: list[list[Reference]] = [[] for _ in canvases or ()]
    for number, begin in enumerate(begins):
        requests = requests_at(number, begin)
        if number and drafts is None:  # of drafts nothing is made again and again
            requests = [request.going_on() for request in requests]
        elif drafts is None:
            steps = _steps(pipe, requests[0], len(begins))
        length = requests[0].frames
        known = 0 if end is None else end - begin
        local = _local(canvases, begin, length, known, frames, requests[0])
        given = pipe.conditions(requests[0], canvases=local)
        if known > 1:
            given = _carried(given, latents, known, length, pipe.vae.config.scale_factor_temporal)
        start = None
        if drafts is not None:
            start = Start(pipe.encode(drafts[:, begin : begin + length]), strength)
        latents = pipe.denoise(
            _noise(pipe, requests, number),
            requests[0],
            texts.embed(
                pipe, requests, begin=sweep.before + begin, total=sweep.before + sweep.total
            ),
            given,
            start=start,
            on_step=_counted(on_step, number, steps),
        )
        made = to_bytes(decoder(_fresh(pipe, latents, known)))
        if canvases is not None:
            local = cut(canvases, begin + known, made.shape[1])
            finished = [
                finish(*parts, begin + known) for parts in zip(local, made, references, strict=True)
            ]
            made = np.stack(finished)
        yield made
        frames = made if frames is None else np.concatenate([frames, made], axis=1)
        frames, end = frames[:, -sweep.window :], begin + length


def through(
    pipe, drafts: UInt8[np.ndarray, "b F H W 3"], sweep: Sweep
) -> Iterator[UInt8[np.ndarray, "b n H W 3"]]:
    """Yields what a `film` from `drafts` would be if nothing were drawn: the VAE alone."""
    decoder, end = pipe.decoder(), None
    for begin in sweep.begins:
        latents = pipe.encode(drafts[:, begin : begin + sweep.window])
        yield to_bytes(decoder(_fresh(pipe, latents, 0 if end is None else end - begin)))
        end = begin + sweep.window


def _fresh(
    pipe, latents: Float[jax.Array, "b f h w c"], known: int
) -> Float[jax.Array, "b n h w c"]:
    """Latents of a window without those of its `known` first frames."""
    return latents[:, 1 + (known - 1) // pipe.vae.config.scale_factor_temporal if known else 0 :]


def finish(
    canvas: Canvas, decoded: np.ndarray, references: list[Reference], begin: int
) -> np.ndarray:
    """A stretch of a film with what is given; `references` keep the last that was given."""
    found = [r._replace(frame=r.frame + begin) for r in detail.references(canvas, decoded)]
    made = detail.carry(decoded, [*references, *found], begin=begin)
    references[:] = (references + found)[-1:]
    return canvas_of.paste(canvas, made)


def joint(
    pipe,
    requests: Sequence[Request],
    sweep: Sweep,
    *,
    canvases: Sequence[Canvas] | None = None,
    on_step: OnStep | None = None,
) -> Iterator[UInt8[np.ndarray, "b n H W 3"]]:
    """As `film`, all windows denoised together: see `tiles`.

    Args:
      requests: of one window each.

    Raises:
      ValueError: time-stamped prompts, which windows at other times would read alike.
    """
    if any(timed.is_timed(request.prompt) for request in requests):
        raise ValueError("time-stamped prompts need windows one after the other: not --joint.")
    step = pipe.vae.config.scale_factor_temporal
    whole = [dataclasses.replace(request, frames=sweep.total) for request in requests]
    if canvases is not None:
        canvases = cut(canvases, 0, sweep.total)
    given = pipe.conditions(whole[0], canvases=canvases)
    size = pipe.latent_shape(requests[0])[:3]
    latents = pipe.denoise(
        pipe.noise(whole),
        whole[0],
        texts.embed(pipe, requests),
        given,
        tiles=Tiles(size, (1 + (sweep.overlap - 1) // step, 0, 0)),
        on_step=on_step,
    )
    decoder, begin = pipe.decoder(), 0
    references: list[list[Reference]] = [[] for _ in canvases or ()]
    for part in range(0, latents.shape[1], size[0]):
        made = to_bytes(decoder(latents[:, part : part + size[0]]))
        if canvases is not None:
            local = cut(canvases, begin, made.shape[1])
            parts = zip(local, made, references, strict=True)
            made = np.stack([finish(*part, begin) for part in parts])
        begin += made.shape[1]
        yield made


def _noise(pipe, requests: Sequence[Request], number: int) -> jax.Array:
    """The first window's noise is that of a video of its own; later ones get another."""
    if not number:
        return pipe.noise(requests)
    shape = pipe.latent_shape(requests[0])
    keys = [jax.random.fold_in(jax.random.key(r.seed), number) for r in requests]
    return jnp.stack([jax.random.normal(key, shape) for key in keys])


def cut(canvases: Sequence[Canvas], begin: int, length: int) -> list[Canvas]:
    """Copies of a stretch of each canvas; past a canvas's end nothing is given."""
    cut = []
    for canvas in canvases:
        stretch = canvas_of.blank(length, *canvas.frames.shape[1:3])
        end = min(begin + length, len(canvas.frames))
        for part, whole in zip(stretch, canvas, strict=True):
            part[: max(end - begin, 0)] = whole[begin:end]
        cut.append(stretch)
    return cut


def _local(
    canvases: Sequence[Canvas] | None,
    begin: int,
    length: int,
    known: int,
    frames: UInt8[np.ndarray, "b G H W 3"] | None,
    request: Request,
) -> list[Canvas] | None:
    """Canvases of a window: what is given in it, and the `known` last frames made before it."""
    if canvases is None and not known:
        return None
    if canvases is None:
        local = [canvas_of.blank(length, request.height, request.width) for _ in frames]
    else:
        local = cut(canvases, begin, length)
    for i, canvas in enumerate(local):
        if known:
            canvas_of.place(canvas, frames[i, -known:], at=0)
    if not any(canvas.known.any() for canvas in local):
        return None
    return local


def _carried(
    given: Conditions,
    latents: Float[jax.Array, "b f h w c"],
    known: int,
    length: int,
    temporal: int,
) -> Conditions:
    """`given` with the latents that the window before made, all but the first frame's."""
    count = (known - 1) // temporal
    old = latents[:, latents.shape[1] - count :]
    if given.channels is not None:  # behind those of the mask
        channels = given.channels.at[:, 1 : 1 + count, :, :, temporal:].set(old)
        return given._replace(channels=channels)
    return given._replace(clean=given.clean.at[:, 1 : 1 + count].set(old))


def _steps(pipe, request: Request, windows: int) -> list[int]:
    """Steps of each window, of which all but the first go on: those that run the blocks."""
    first, others = (int(pipe.denoise.computed(r).sum()) for r in (request, request.going_on()))
    return [first, *[others] * (windows - 1)]


def _counted(on_step: OnStep | None, number: int, steps: Sequence[int | None]) -> OnStep | None:
    """`on_step` over all windows; None is as many steps as the window at hand has."""
    if on_step is None:
        return None

    def told(step: int, total: int, x: Moment) -> None:
        each = [total if count is None else count for count in steps]
        on_step(sum(each[:number]) + step, sum(each), x)

    return told


def before(
    pipe,
    requests: Sequence[Request],
    clips: UInt8[np.ndarray, "b G H W 3"],
    *,
    overlap: int,
    total: int,
    on_step: OnStep | None = None,
) -> UInt8[np.ndarray, "b n H W 3"]:
    """At least `total` frames that lead to the beginning of `clips`, by windows that go back.

    Args:
      requests: of one window.
      overlap: frames at a window's end that are given, a multiple of the VAE's temporal factor.
    """
    length = requests[0].frames
    windows = -(-total // (length - overlap))
    made, steps = clips[:, :overlap], _steps(pipe, requests[0], windows)
    for number in range(windows):
        canvases = [canvas_of.of_clip(clip, length, at=length - overlap) for clip in made]
        if number:
            requests = [request.going_on() for request in requests]
        begin = total - (number + 1) * (length - overlap)  # below 0 it is cut off in the end
        latents = pipe.denoise(
            _noise(pipe, requests, number),
            requests[0],
            texts.embed(pipe, requests, begin=begin, total=total + clips.shape[1]),
            pipe.conditions(requests[0], canvases=canvases),
            on_step=_counted(on_step, number, steps),
        )
        decoded = to_bytes(pipe.decode(latents))
        finished = [detail.finish(*pair) for pair in zip(canvases, decoded, strict=True)]
        fresh = np.stack(finished)[:, : length - overlap]
        made = np.concatenate([fresh, made], axis=1)
    return made[:, : made.shape[1] - overlap][:, -total:]
