"""What decides a video, and whether a checkpoint can make it."""

import dataclasses
import difflib
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from sora_jax.convert.sampling import SamplingDefaults
from sora_jax.diffusion import guidance as guidances
from sora_jax.diffusion import sampler, times
from sora_jax.diffusion.feature_cache import MAX_THRESHOLD
from sora_jax.dit.patchify import check_pixels
from sora_jax.prompts import weighted

MAX_SEED = 2**32 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_FPS = 240


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything that decides a video, pictures apart; what `Pipeline.request` makes.

    `guidance_2` is the scale for the second transformer, of little noise, in models with two.
    `past_guidance_interval` takes the place of `guidance_interval` where a window goes on from one
    that was made before (`going_on`).
    `cache_threshold` is how far the residual of the transformer's blocks may move before they run
    again (`diffusion.feature_cache`); 0 runs them at every step. Keys and values of given tokens
    are computed at every `kv_cache`-th step that runs them; 1 is every one.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    fps: float
    steps: int
    guidance: float
    guidance_2: float
    guidance_interval: tuple[float, float]
    past_guidance_interval: tuple[float, float]
    guidance_rescale: float
    guidance_blocks: tuple[int, ...]
    guidance_blocks_interval: tuple[float, float]
    shift: float
    solver: str
    schedule: str
    cache_threshold: float
    kv_cache: int
    seed: int

    def guide(self, expert: int = 0) -> guidances.GuidanceConfig:
        """Guidance while transformer number `expert` denoises."""
        return guidances.GuidanceConfig(
            scale=(self.guidance, self.guidance_2)[expert],
            interval=self.guidance_interval,
            rescale=self.guidance_rescale,
            blocks=self.guidance_blocks,
            blocks_interval=self.guidance_blocks_interval,
        )

    def going_on(self) -> "Request":
        """As a window that goes on from one made before is guided: made anew again and again, what
        guidance does to edges near t = 0 would add up."""
        return dataclasses.replace(self, guidance_interval=self.past_guidance_interval)

    def settings(self) -> dict[str, Any]:
        """Its fields as JSON gives them back, lists in place of tuples."""
        fields = dataclasses.asdict(self)
        return {n: list(v) if isinstance(v, tuple) else v for n, v in fields.items()}


def of_settings(
    prompt: str,
    settings: Mapping[str, Any],
    *,
    defaults: SamplingDefaults,
    transformers: int = 1,
) -> Request:
    """The request of a prompt; a setting that is None or missing is the checkpoint's default.

    Its shift is 1 where none is set. Only types are settled here: see `check`.

    Args:
      settings: fields of Request, and `size` (width, height).
      transformers: how many the model has.

    Raises:
      TypeError: a setting that there is not.
      ValueError: a setting of another type, or a scale for the second of two, where there is one.
    """
    known = {field.name for field in dataclasses.fields(Request)} - {"prompt", "width", "height"}
    for name in settings.keys() - known - {"size"}:
        near = difflib.get_close_matches(name, [*known, "size"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}."
        raise TypeError(f"there is no setting {name!r}; {hint}")
    given = {name: value for name, value in settings.items() if value is not None}
    width, height = pixels(given.get("size", (defaults.width, defaults.height)))

    def chosen(name: str) -> Any:
        return given.get(name, getattr(defaults, name))

    solver = _text("solver", chosen("solver"))
    threshold = given.get("cache_threshold")
    if threshold is None:
        takes = defaults.feature_cache is not None and sampler.num_evaluations(solver, 1) == 1
        threshold = defaults.cache_threshold if takes else 0.0
    guidance, second = _number("guidance", chosen("guidance")), given.get("guidance_2")
    if second is not None and transformers == 1 and second != guidance:
        raise ValueError(
            f"guidance_2 {second} is for models with two transformers; leave it out here."
        )
    if second is None and "guidance" not in given:
        second = defaults.guidance_2

    def interval(name: str, value: Any) -> tuple[float, float]:
        try:
            lo, hi = value
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is {value!r}; give two times (lo, hi).") from error
        return _number(name, lo), _number(name, hi)

    guided = interval("guidance_interval", chosen("guidance_interval"))
    past = chosen("past_guidance_interval")
    unset = isinstance(past, list | tuple) and not past
    past = guided if unset else interval("past_guidance_interval", past)

    blocks = chosen("guidance_blocks")
    if not isinstance(blocks, Iterable) or isinstance(blocks, str):
        raise ValueError(f"guidance_blocks is {blocks!r}; give their numbers, such as (5,).")

    return Request(
        prompt=_text("prompt", prompt),
        negative_prompt=_text("negative_prompt", given.get("negative_prompt", "")),
        width=width,
        height=height,
        frames=_whole("frames", chosen("frames")),
        fps=_number("fps", chosen("fps")),
        steps=_whole("steps", chosen("steps")),
        guidance=guidance,
        guidance_2=guidance if second is None else _number("guidance_2", second),
        guidance_interval=guided,
        past_guidance_interval=past,
        guidance_rescale=_number("guidance_rescale", chosen("guidance_rescale")),
        guidance_blocks=tuple(_whole("guidance_blocks", block) for block in blocks),
        guidance_blocks_interval=interval(
            "guidance_blocks_interval", chosen("guidance_blocks_interval")
        ),
        shift=_number("shift", given.get("shift", 1.0)),
        solver=solver,
        schedule=_text("schedule", chosen("schedule")),
        cache_threshold=_number("cache_threshold", threshold),
        kv_cache=_whole("kv_cache", given.get("kv_cache", 1)),
        seed=_whole("seed", given.get("seed", 0)),
    )


def pixels(size: Any) -> tuple[int, int]:
    """(width, height) as given; ValueError, in one line, for anything else."""
    try:
        width, height = size
        return _whole("width", width), _whole("height", height)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"size is {size!r}; give (width, height), two whole numbers of pixels."
        ) from error


def _whole(name: str, value: Any) -> int:
    """numpy's integers are such, and become Python's, which JSON can hold."""
    try:
        if isinstance(value, bool):
            raise TypeError(value)
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} is {value!r}; give a whole number.") from error


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str | bool):
            raise TypeError(value)
        return float(value)
    except TypeError as error:
        raise ValueError(f"{name} is {value!r}; give a number.") from error


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; give one text.")
    return value


def check(request: Request, *, cell: tuple[int, int, int], blocks: int) -> None:
    """Raises ValueError, in one line, for a request that no model can make, or not this one.

    Args:
      cell: frames, height and width in pixels that one token stands for.
      blocks: of the transformer.
    """
    if not request.prompt.strip():
        raise ValueError("the prompt is empty; describe the video in a sentence.")
    for text in (request.prompt, request.negative_prompt):
        weighted.parse(text)
    check_pixels(request.frames, request.height, request.width, cell=cell)
    if not 1 <= request.steps <= MAX_STEPS:
        raise ValueError(f"steps {request.steps} is out of range; use 1 to {MAX_STEPS}.")
    if not 0 <= request.seed <= MAX_SEED:
        raise ValueError(f"seed {request.seed} is out of range; use 0 to {MAX_SEED}.")
    if not 0 < request.fps <= MAX_FPS:
        raise ValueError(f"fps {request.fps} is out of range; use more than 0, at most {MAX_FPS}.")
    for scale in (request.guidance, request.guidance_2):
        if not 0 <= scale <= MAX_GUIDANCE:
            raise ValueError(
                f"guidance {scale} is out of range; use 0 to {MAX_GUIDANCE:g}, 1 is off."
            )
    _ = request.guide(), request.going_on().guide()  # checks intervals, rescale and blocks
    if any(block >= blocks for block in request.guidance_blocks):
        raise ValueError(
            f"guidance_blocks {request.guidance_blocks}: this transformer's blocks are 0 to "
            f"{blocks - 1}; give some of them, or none."
        )
    if not 1 <= request.kv_cache <= MAX_STEPS:
        raise ValueError(
            f"kv_cache {request.kv_cache} is out of range; use 1 (off) to {MAX_STEPS} steps."
        )
    evaluations = sampler.num_evaluations(request.solver, 1)
    if not 0 <= request.cache_threshold <= MAX_THRESHOLD:
        raise ValueError(
            f"cache_threshold {request.cache_threshold} is out of range; use 0 (off) to "
            f"{MAX_THRESHOLD:g}."
        )
    for name, value, off in (
        ("cache_threshold", request.cache_threshold, 0.0),
        ("kv_cache", request.kv_cache, 1),
    ):
        if value != off and evaluations > 1:
            raise ValueError(
                f"{name} {value} needs a solver that evaluates the model once a step, "
                f"{request.solver} does {evaluations} times; use another solver, or {off:g}."
            )
    times.schedule(request.schedule, request.steps, shift=request.shift)
