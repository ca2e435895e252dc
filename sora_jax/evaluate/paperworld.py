"""The Paperworld suite: prompts to videos, read back by the oracle; and the VAE on its own.

A pipeline is anything with `request`, `run`, `sampling`, `info` and `vae` like those of
`sora_jax.generate.Pipeline`.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax.data.paperworld.scene import SHORTEST_SHOT
from sora_jax.data.paperworld.settings import PaperworldSettings
from sora_jax.data.paperworld.source import Prompt, heldout_prompts, seen_prompts
from sora_jax.evaluate import scores

TARGETS = {"heldout": 0.95, "seen": 0.97}  # least rate of each of `scores.ATTRIBUTES`
PSNR_TARGET = 32.0  # dB
SPLITS = {"heldout": heldout_prompts, "seen": seen_prompts}
VAE_CLIPS = 64

# Called with the name of a stage, the number of its videos done, and their total.
OnProgress = Callable[[str, int, int], None]
# Called with the split, the record (see `evaluate`) and the frames of each generated video.
OnVideo = Callable[[str, dict[str, Any], np.ndarray], None]


def evaluate(
    pipeline,
    *,
    prompts: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | int | None = None,
    vae_clips: int = VAE_CLIPS,
    on_progress: OnProgress | None = None,
    on_video: OnVideo | None = None,
) -> dict[str, Any]:
    """Scores videos of held-out and seen combinations, made as `sora-jax sample` does; and the VAE.

    Args:
      prompts: how many of each split.
      seed: of the scenes; the noise of held-out prompt i is `seed + i`, and of seen prompt i
        `seed + prompts + i`.
      steps, guidance: instead of the checkpoint's defaults.
      vae_clips: held-out renderings to reconstruct.

    Returns:
      A JSON-serialisable dictionary. "heldout" and "seen" hold `scores.summary` of the generated
      videos, a record of each ("prompt", "seed", and `scores.judge`), the seconds they took, and
      as "ceiling" what the oracle reads on true renderings of the same scenes. "vae" has the mean
      PSNR in dB and the oracle's rates on reconstructions. "targets" says what was asked,
      reached and passed.

    Raises:
      ValueError: a count below 1, a seed out of range, clips too short to show a verb, or
        whatever the pipeline refuses.
    """
    _check(pipeline, prompts=prompts, batch_size=batch_size, vae_clips=vae_clips)
    settings = scene_settings(pipeline)
    options = {"steps": steps, "guidance": None if guidance is None else float(guidance)}
    report = on_progress or (lambda stage, done, total: None)
    # Refused seeds and settings show before an hour of sampling does.
    for last in (0, 2 * prompts - 1):
        request = pipeline.request("a check", seed=seed + last, **options)
    run = {"prompts": prompts, "batch_size": batch_size, "seed": seed}
    result = header("paperworld", pipeline, request, **run)
    for i, (split, make_prompts) in enumerate(SPLITS.items()):
        asked = make_prompts(prompts, settings=settings, seed=seed)
        section = score_prompts(
            pipeline,
            asked,
            first_seed=seed + i * prompts,
            batch_size=batch_size,
            options=options,
            on_progress=functools.partial(report, split),
            on_video=functools.partial(on_video, split) if on_video else None,
        )
        truth = score_truth(asked, on_progress=functools.partial(report, f"{split} ceiling"))
        result[split] = section | {"ceiling": truth}
    result["vae"] = score_vae(
        pipeline,
        heldout_prompts(vae_clips, settings=settings, seed=seed),
        batch_size=batch_size,
        on_progress=functools.partial(report, "vae"),
    )
    return result | verdict(result)


def scene_settings(pipeline) -> PaperworldSettings:
    """Scenes of the size and duration that the checkpoint makes by default.

    Raises:
      ValueError: a size that Paperworld does not draw, or too few frames to show a verb.
    """
    sampling = pipeline.sampling
    if sampling.frames < SHORTEST_SHOT:
        raise ValueError(
            f"this checkpoint makes {sampling.frames} frames; the paperworld suite needs at "
            f"least {SHORTEST_SHOT} to tell a verb: raise frames in its sampling.json."
        )
    return PaperworldSettings(
        width=sampling.width, height=sampling.height, frames=sampling.frames, fps=sampling.fps
    )


def score_prompts(
    pipeline,
    prompts: Sequence[Prompt],
    *,
    first_seed: int,
    batch_size: int,
    options: dict[str, Any],
    on_progress: Callable[[int, int], None] | None = None,
    on_video: Callable[[dict[str, Any], np.ndarray], None] | None = None,
) -> dict[str, Any]:
    """`scores.summary` of videos of `prompts`, with a record and the cost of each.

    "seconds_per_video" counts sampling alone, and leaves the first batch, which compiles, out
    where there is another; "seconds_first_batch" is that one.
    """
    requests = [
        pipeline.request(prompt.text, seed=first_seed + i, **options)
        for i, prompt in enumerate(prompts)
    ]
    records, seconds = [], []
    for batch in batches(requests, batch_size):
        begun = time.perf_counter()
        # A short last batch is filled up: another shape would compile the model again.
        fill = [batch[-1]] * (min(batch_size, len(requests)) - len(batch))
        videos = pipeline.run([*batch, *fill])[: len(batch)]
        seconds.append((time.perf_counter() - begun) / len(batch))
        for request, video in zip(batch, videos, strict=True):
            scene = prompts[len(records)].scene
            judgement = scores.judge(video.frames, scene)
            record = {"prompt": request.prompt, "seed": request.seed} | judgement
            records.append(record)
            if on_video is not None:
                on_video(record, video.frames)
        if on_progress is not None:
            on_progress(len(records), len(requests))
    return scores.summary(records) | {
        "seconds_first_batch": seconds[0] * min(batch_size, len(requests)),
        "seconds_per_video": float(np.mean(seconds[1:] or seconds)),
        "records": records,
    }


def score_truth(
    prompts: Sequence[Prompt], *, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """What the oracle makes of true renderings: no model can be seen to be better than this."""
    from sora_jax.data.paperworld.render import render

    judgements = []
    for prompt in prompts:
        judgements.append(scores.judge(render(prompt.scene), prompt.scene))
        if on_progress is not None:
            on_progress(len(judgements), len(prompts))
    return {
        "attributes": scores.rates(judgements),
        "confusions": {n: scores.confusions(judgements, n) for n in scores.ATTRIBUTES},
    }


def psnr(x: UInt8[np.ndarray, "b F H W 3"], y: UInt8[np.ndarray, "b F H W 3"]) -> list[float]:
    """Peak signal-to-noise ratio in dB of each clip over all its values; the peak is 255.

    Identical clips get 126 dB, what the same floor gives in training, as JSON has no infinity.
    """
    error = np.subtract(x, y, dtype=np.float32) / 127.5
    mse = np.mean(np.square(error), axis=(1, 2, 3, 4), dtype=np.float64)
    return (10 * np.log10(4 / np.maximum(mse, 1e-12))).tolist()


def score_vae(
    pipeline,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """PSNR of reconstructed renderings, and the oracle's rates on them.

    Latents are the encoder's means, and both clips are compared as the bytes that are shown.
    """
    import jax

    from sora_jax.data.paperworld.render import render
    from sora_jax.generate import to_bytes

    @jax.jit
    def reconstruct(params, video):
        vae = pipeline.vae.module(params)
        return vae.decode(vae.encode(video))

    judgements, ratios = [], []
    for batch in batches(prompts, batch_size):
        clips = np.stack([render(prompt.scene) for prompt in batch])
        fill = min(batch_size, len(prompts)) - len(batch)
        padded = np.concatenate([clips, np.repeat(clips[-1:], fill, axis=0)])
        recon = reconstruct(pipeline.vae.params, padded.astype(np.float32) / 127.5 - 1)
        shown = to_bytes(recon)[: len(batch)]
        ratios += psnr(clips, shown)
        judgements += [
            scores.judge(clip, prompt.scene) for clip, prompt in zip(shown, batch, strict=True)
        ]
        if on_progress is not None:
            on_progress(len(judgements), len(prompts))
    return {
        "clips": len(ratios),
        "psnr_mean": float(np.mean(ratios)),
        "psnr_std": float(np.std(ratios)),
        "psnr_least": float(np.min(ratios)),
        "attributes": scores.rates(judgements),
        "confusions": {n: scores.confusions(judgements, n) for n in scores.ATTRIBUTES},
    }


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """{"targets": {name: {"value", "target", "passed"}}, "passed": whether all are}."""
    targets = {"vae/psnr": (result["vae"]["psnr_mean"], PSNR_TARGET)}
    for split, target in TARGETS.items():
        for name in scores.ATTRIBUTES:
            value = result[split]["attributes"][name]["rate"]
            targets[f"{split}/{name}"] = (value, target)
    table = {
        name: {"value": value, "target": target, "passed": value >= target}
        for name, (value, target) in targets.items()
    }
    return {"targets": table, "passed": all(row["passed"] for row in table.values())}


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """`items` in runs of `size`, the last of them perhaps shorter."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _check(pipeline, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} {value} is out of range; use at least 1.")
    scene_settings(pipeline)


def header(suite: str, pipeline, request, **run: int) -> dict[str, Any]:
    """What was scored and how, the noise and prompt of a single video left out."""
    import jax

    from sora_jax import __version__

    settings = request.settings()
    for name in ("prompt", "seed"):
        del settings[name]
    return {
        "suite": suite,
        **pipeline.info,
        "sora_jax": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "settings": settings | run,
    }
