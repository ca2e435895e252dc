"""What `sora-jax sample` does with a checkpoint where the user says nothing."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_jax.convert import folder as folders
from sora_jax.convert import official, settings
from sora_jax.diffusion.feature_cache import ChangeCurve
from sora_jax.diffusion.times import NO_SHIFT, TokenShift


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """What `sora-jax sample` uses where the user says nothing; sizes in pixels.

    `guidance_2` is for the second of two transformers, None the same, and `past_guidance_interval`
    for windows that go on from others, () the same. `text_tokens` is the longest prompt in tokens,
    end of sequence included. `tasks` are the masks that it was trained with, by the names in
    `diffusion.tasks.MASKS`, and FRAME_TIMES of there. `refine_prefix` are the words before captions
    of parts of larger pictures, which refining puts before its prompt. `feature_cache` was measured
    by `tools/calibrate_cache.py`, and is what `cache_threshold` needs: without it, or where a
    solver or a film takes none, the default has no effect.
    """

    width: int = 64
    height: int = 64
    frames: int = 17
    fps: float = 8.0
    steps: int = 30
    guidance: float = 3.0
    guidance_2: float | None = None
    guidance_interval: Sequence[float] = (0.0, 1.0)
    past_guidance_interval: Sequence[float] = ()
    guidance_rescale: float = 0.0
    guidance_blocks: Sequence[int] = ()
    guidance_blocks_interval: Sequence[float] = (0.0, 1.0)
    shift: TokenShift = NO_SHIFT
    solver: str = "unipc"
    schedule: str = "wan"
    text_tokens: int = 224
    tasks: Sequence[str] = ("none",)
    refine_prefix: str = ""
    cache_threshold: float = 0.0
    feature_cache: ChangeCurve | None = None


# diffusers' scheduler classes -> our solver and schedule.
SCHEDULERS = {
    "UniPCMultistepScheduler": ("unipc", "wan"),
    "FlowMatchEulerDiscreteScheduler": ("euler", "flow_match_euler"),
}


def _diffusers_sampling(folder: Path) -> SamplingDefaults:
    """Wan's published sizes and steps, and the solver and shift of the folder's scheduler."""
    path = folder / "scheduler" / "scheduler_config.json"
    example = {"_class_name": "", "flow_shift": 1.0, "shift": 1.0}
    config = settings.checked(folders.read_json(path), example, source=path)
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        raise ValueError(
            f"{folder}/scheduler: {kind} is not one of {', '.join(SCHEDULERS)}; add a "
            "sampling.json, or change the scheduler."
        )
    solver, schedule = SCHEDULERS[kind]
    shift = float(config.get("flow_shift", config.get("shift", 1.0)))
    by_token = folders.read_index(folder).expand_timesteps
    family = (official.TI2V_5B if by_token else official.T2V)._replace(shift=shift)
    return dataclasses.replace(of_family(family), solver=solver, schedule=schedule)


def by_token(index: folders.Index, sampling: SamplingDefaults) -> bool:
    """Whether a model knows a time for every token, by its index or by what it was trained for."""
    return index.expand_timesteps or tuple(sampling.tasks) != ("none",)


def of_family(family: official.Family) -> SamplingDefaults:
    """As Wan's own code samples a model of that kind, by diffusers' schedule."""
    return SamplingDefaults(
        width=family.width,
        height=family.height,
        frames=family.frames,
        fps=family.fps,
        steps=family.steps,
        guidance=family.guidance,
        guidance_2=family.guidance_2,
        shift=TokenShift.constant(family.shift),
        text_tokens=512,
    )


def _example() -> dict[str, Any]:
    """Defaults of all settings but those that are objects."""
    values = dataclasses.asdict(SamplingDefaults())
    return {name: v for name, v in values.items() if name not in ("shift", "feature_cache")}


def read_sampling(folder: Path) -> SamplingDefaults:
    """The folder's sampling.json, or what diffusers does with a folder that has none.

    Of loose official files, what Wan's own code does with a model of that kind.

    Raises:
      ValueError: the file has unknown keys or values of another type, or the scheduler is one that
        nothing here repeats.
    """
    path = Path(folder) / "sampling.json"
    if not path.is_file():
        if folders.is_loose(folder):
            return of_family(folders.read_family(folder))
        return _diffusers_sampling(Path(folder))
    values = folders.read_json(path)
    known = [field.name for field in dataclasses.fields(SamplingDefaults)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; allowed: {', '.join(known)}.")
    values = settings.checked(values, _example(), source=path)
    shift = values.get("shift", 1.0)
    try:
        values["shift"] = (
            TokenShift(**shift) if isinstance(shift, dict) else TokenShift.constant(float(shift))
        )
    except TypeError as error:
        raise ValueError(
            f"{path}: shift {shift} is neither a number nor tokens_lo, shift_lo, tokens_hi and "
            "shift_hi."
        ) from error
    if (curve := values.get("feature_cache")) is not None:
        try:
            values["feature_cache"] = ChangeCurve(**curve)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    return SamplingDefaults(**values)
