"""The suite of tasks: what Sora does beside text to video, each measured and judged by the oracle.

A case is a true rendering of which a part is given, and a sentence that says all of it. Single
subjects are of held-out combinations, with seen ones between where a certain verb is asked for;
collisions and cuts are scenes of a world that is not the one of training. Beside every value
stands its ceiling: what the same judgement says of true renderings, and of those whose made part
went through the VAE.
"""

import dataclasses
import difflib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sora_jax.data.paperworld.captions import describe, stamped
from sora_jax.data.paperworld.render import render
from sora_jax.data.paperworld.scene import SHORTEST_SHOT, Scene
from sora_jax.data.paperworld.settings import PaperworldSettings
from sora_jax.evaluate import measures, task_cases, task_judges
from sora_jax.evaluate.paperworld import OnProgress, OnVideo, batches, header, scene_settings
from sora_jax.evaluate.task_cases import Case, Clip, Made, Scenes, of_verbs, scenes
from sora_jax.evaluate.task_judges import STEADY, Judge
from sora_jax.generate.canvas import Canvas

CEILINGS = 64  # cases of each task whose truth is judged


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      mask: of `diffusion.tasks`, with which a checkpoint must have been trained.
      given: which pixels of a true rendering are given; None where text is all.
      truth: the true rendering of a scene.
      prompt: the words that ask for it.
    """

    mask: str
    scenes: Scenes
    judge: Judge
    given: Callable[[Scene, Clip, int], np.ndarray] | None = None
    truth: Callable[[Scene, int], Clip] = lambda scene, step: render(scene)
    prompt: Callable[[Scene], str] = describe

    def case(self, scene: Scene, *, step: int) -> Case:
        """The case of `scene`, for a VAE with `step` frames in a latent frame."""
        truth, canvas = self.truth(scene, step), None
        if self.given is not None:
            known = np.broadcast_to(self.given(scene, truth, step), truth.shape[:3]).copy()
            canvas = Canvas(truth * known[..., None], known)
        return Case(self.prompt(scene), scene, truth, canvas)


def _hides(scene: Scene) -> bool:
    return scene.subject.verb == "hides"


_HIDING = scenes("seen", "heldout", keep=_hides)
_SHOTS = scenes(
    "train",
    keep=lambda scene: len(scene.shots) == 2,
    multi_shot=1.0,
    collisions=0.0,
    companions=0.0,
)
_OPEN = scenes("heldout", keep=lambda scene: not _hides(scene))  # a wall would fill the box

# By name, of which `--tasks` knows the first word.
TASKS = {
    "animate": Task("first", scenes("heldout"), task_judges.ANIMATE, task_cases.first),
    "keyframes": Task("keyframes", scenes("heldout"), task_judges.KEYFRAMES, task_cases.keyframes),
    "extend forward": Task("prefix", scenes("heldout"), task_judges.EXTEND, task_cases.beginning),
    "extend backward": Task("suffix", scenes("heldout"), task_judges.EXTEND, task_cases.end),
    "join": Task(
        "middle", scenes("heldout", keep=of_verbs(*STEADY)), task_judges.BRIDGE, task_cases.ends
    ),
    "loop": Task(
        "middle",
        scenes("seen", "heldout", keep=of_verbs("spins")),
        task_judges.BRIDGE,
        task_cases.ends,
        task_cases.once_more,
    ),
    "inpaint": Task("box", _OPEN, task_judges.PAINT, task_cases.around_subject),
    "outpaint": Task("border", _OPEN, task_judges.PAINT, task_cases.middle),
    "permanence": Task("none", _HIDING, task_judges.PERMANENCE),
    "permanence extended": Task("prefix", _HIDING, task_judges.PERMANENCE, task_cases.beginning),
    "shots": Task("none", _SHOTS, task_judges.SHOTS, prompt=stamped),  # at which frame to cut
    # As storyboards carry a character over a cut: the words alone say that there is one.
    "shots carried": Task("prefix", _SHOTS, task_judges.SHOTS, task_cases.before_cut),
    "physics bounce": Task(
        "none", scenes("seen", "heldout", keep=of_verbs("bounces")), task_judges.BOUNCE
    ),
    "physics collision": Task(
        "none",
        scenes("train", keep=of_verbs("collides"), multi_shot=0.0, collisions=1.0, companions=0.0),
        task_judges.COLLISION,
    ),
}
GROUPS = tuple(dict.fromkeys(name.split()[0] for name in TASKS))


def chosen(groups: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the tasks of `groups`, by default of all, in the order of `TASKS`.

    Raises:
      ValueError: an unknown group; names the nearest.
    """
    for group in groups or ():
        if group not in GROUPS:
            near = difflib.get_close_matches(group, GROUPS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use some of: {', '.join(GROUPS)}."
            raise ValueError(f"unknown task {group!r}; {hint}")
    return tuple(name for name in TASKS if not groups or name.split()[0] in groups)


def evaluate(
    pipeline,
    *,
    prompts: int = 256,
    tasks: Sequence[str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | int | None = None,
    ceilings: int = CEILINGS,
    on_progress: OnProgress | None = None,
    on_video: OnVideo | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Scores every task that the checkpoint was trained for.

    Args:
      prompts: cases of each task.
      tasks: first words of the names of those to run; by default all.
      seed: of the scenes; the noise of case i is `seed + i`.
      steps, guidance: instead of the checkpoint's defaults.
      ceilings: how many of the cases of each task are judged as they are in truth.
      on_result: called after every task but the last with what there is, as it will be returned;
        "left" names what is to come, and "passed" is False.

    Returns:
      A JSON-serialisable dictionary. "tasks" holds of each its "measures" by name, each with
      `measures.summarise` and the values of its two ceilings, "truth" and "vae"; a record of each
      case ("prompt", "seed", "outcome"); and the seconds they took. "skipped" says why others were
      not run, "targets" what was asked, reached and passed.

    Raises:
      ValueError: an unknown task, a count below 1, a seed out of range, clips too short to show
        what is asked, or whatever the pipeline refuses.
    """
    names = chosen(tasks)
    for name, value in {"prompts": prompts, "batch_size": batch_size, "ceilings": ceilings}.items():
        if value < 1:
            raise ValueError(f"{name} {value} is out of range; use at least 1.")
    settings = _settings(pipeline)
    options = {"steps": steps, "guidance": None if guidance is None else float(guidance)}
    for last in (0, prompts - 1):
        request = pipeline.request("a check", seed=seed + last, **options)
    run = {"prompts": prompts, "batch_size": batch_size, "seed": seed, "ceilings": ceilings}
    result = header("tasks", pipeline, request, **run) | {"tasks": {}, "skipped": {}}
    report = on_progress or (lambda stage, done, total: None)
    for name in names:
        if reason := _untrained(pipeline, TASKS[name].mask):
            result["skipped"][name] = reason
            continue
        result["tasks"][name] = score_task(
            pipeline,
            TASKS[name],
            list(itertools.islice(TASKS[name].scenes(settings, seed), prompts)),
            first_seed=seed,
            batch_size=batch_size,
            options=options,
            ceilings=ceilings,
            on_progress=functools.partial(report, name),
            on_video=functools.partial(on_video, name) if on_video else None,
        )
        left = list(names[names.index(name) + 1 :])
        if on_result is not None and left:
            on_result(_with_verdict(result) | {"passed": False, "left": left})
    return _with_verdict(result)


def _with_verdict(result: dict[str, Any]) -> dict[str, Any]:
    asked = {name: TASKS[name].judge.measures for name in result["tasks"]}
    return result | measures.verdict(result["tasks"], asked)


def _settings(pipeline) -> PaperworldSettings:
    """Scenes as the checkpoint makes them, if they are long enough for all tasks."""
    settings = scene_settings(pipeline)
    # Two shots have to fit, and a second of film, in which a subject hides and comes out again.
    least = max(2 * SHORTEST_SHOT, 1 + round(settings.fps))
    if settings.frames < least:
        raise ValueError(
            f"this checkpoint makes {settings.frames} frames; the suite of tasks needs at least "
            f"{least}, at {settings.fps:g} a second: raise frames in its sampling.json."
        )
    return settings


def _untrained(pipeline, mask: str) -> str:
    """Why the checkpoint cannot do what takes `mask`, or nothing."""
    from sora_jax.generate.trained import WORDS

    return "" if mask in pipeline.tasks else f"not trained for: {WORDS[mask]}"


def score_task(
    pipeline,
    task: Task,
    asked: Sequence[Scene],
    *,
    first_seed: int,
    batch_size: int,
    options: dict[str, Any],
    ceilings: int = CEILINGS,
    on_progress: Callable[[int, int], None] | None = None,
    on_video: Callable[[dict[str, Any], np.ndarray], None] | None = None,
) -> dict[str, Any]:
    """The section of one task; see `evaluate`. The first `ceilings` scenes give the ceilings."""
    step = pipeline.vae.config.scale_factor_temporal
    records, seconds = [], []
    truths, recons = [], []
    for batch in batches(asked, batch_size):
        cases = [task.case(scene, step=step) for scene in batch]
        seeds = range(first_seed + len(records), first_seed + len(records) + len(batch))
        requests = [
            pipeline.request(case.prompt, seed=seed, **options)
            for case, seed in zip(cases, seeds, strict=True)
        ]
        made, taken = make(pipeline, requests, cases, size=min(batch_size, len(asked)))
        seconds.append(taken / len(batch))
        for request, case, result in zip(requests, cases, made, strict=True):
            outcome = task.judge.outcome(case, result)
            record = {"prompt": case.prompt, "seed": request.seed, "outcome": outcome}
            records.append(record)
            if on_video is not None:
                on_video(record, result.frames)
        shown = cases[: max(0, ceilings - len(truths))]
        truths += [task.judge.outcome(case, Made(case.truth, case.truth)) for case in shown]
        passed = reconstruct(pipeline, shown, size=min(batch_size, len(asked))) if shown else []
        recons += map(task.judge.outcome, shown, passed)
        if on_progress is not None:
            on_progress(len(records), len(asked))
    outcomes = [record["outcome"] for record in records]
    return {
        "cases": len(records),
        "measures": {
            measure.name: measures.summarise(measure, outcomes)
            | {
                "unit": measure.unit,
                "target": measure.target,
                "truth": measures.summarise(measure, truths)["value"],
                "vae": measures.summarise(measure, recons)["value"],
            }
            for measure in task.judge.measures
        },
        "seconds_first_batch": seconds[0] * min(batch_size, len(asked)),
        "seconds_per_video": float(np.mean(seconds[1:] or seconds)),
        "records": records,
    }


def make(
    pipeline, requests: Sequence[Any], cases: Sequence[Case], *, size: int
) -> tuple[list[Made], float]:
    """Videos of cases, as `generate.tasks` makes those that fit into one window; and the seconds.

    Args:
      size: of the batch; it is filled up, as another would compile the model again.
    """
    import jax.numpy as jnp

    from sora_jax.generate import to_bytes
    from sora_jax.generate.conditions import keep_clean

    fill = size - len(cases)
    requests = [*requests, *[requests[-1]] * fill]
    canvases = None
    if cases[0].canvas is not None:
        canvases = [case.canvas for case in cases] + [cases[-1].canvas] * fill
    tensors = {}
    begun = time.perf_counter()
    videos = pipeline.run(requests, canvases=canvases, on_tensor=tensors.__setitem__)
    seconds, latents = time.perf_counter() - begun, tensors["latents"]
    if canvases is None:
        return [Made(video.frames, video.frames) for video in videos[: len(cases)]], seconds
    decoded = to_bytes(pipeline.decode(latents))
    given = pipeline.conditions(requests[0], canvases=canvases)
    shown = [video.frames for video in videos]
    if given.clean is None:  # it is shown beside the noise, and no token is kept
        return [Made(*pair) for pair in zip(shown, decoded, strict=True)][: len(cases)], seconds
    patch = pipeline.dit.config.patch_size
    kept = keep_clean(jnp.asarray(latents), given.clean, given.keep, patch_size=patch)
    exact = np.all(np.asarray(kept) == latents, axis=(1, 2, 3, 4)).tolist()
    return list(map(Made, shown, decoded, exact))[: len(cases)], seconds


def reconstruct(pipeline, cases: Sequence[Case], *, size: int) -> list[Made]:
    """The truth of cases as the best of models could show it, by this VAE."""
    from sora_jax.generate import to_bytes
    from sora_jax.generate.detail import finish

    truths = np.stack([case.truth for case in cases])
    padded = np.concatenate([truths, np.repeat(truths[-1:], size - len(cases), axis=0)])
    decoded = to_bytes(pipeline.decode(pipeline.encode(padded)))[: len(cases)]
    return [
        Made(video if case.canvas is None else finish(case.canvas, video), video)
        for case, video in zip(cases, decoded, strict=True)
    ]
