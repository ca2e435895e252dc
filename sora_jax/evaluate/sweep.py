"""Chooses the defaults of guidance and steps by what the oracle reads, not by habit."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from sora_jax.evaluate import scores
from sora_jax.evaluate.paperworld import SPLITS, scene_settings, score_prompts


def sweep(
    pipeline,
    *,
    guidance: Sequence[float | int],
    steps: Sequence[int],
    blocks: Sequence[Sequence[int] | None] = (None,),
    prompts: int = 64,
    batch_size: int = 16,
    seed: int = 1,
    split: str = "seen",
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Scores scales, numbers of steps and blocks of guidance, in all combinations, on the same
    prompts and noise.

    By default on seen combinations and other scenes and noise than `evaluate` uses, so that the
    held-out ones stay a test and nothing is tuned on them.

    Args:
      blocks: `GuidanceConfig.blocks`; None are the checkpoint's.

    Returns:
      One row a combination, the best first (see `merit`): {"guidance", "steps",
      "guidance_blocks", "attributes" as in `scores.rates`, "seconds_per_video"}.

    Raises:
      ValueError: an empty list, an unknown split, a count below 1, or a setting out of range.
    """
    if not guidance or not steps or not blocks:
        raise ValueError("nothing to sweep; give at least one guidance and one number of steps.")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}.")
    if prompts < 1 or batch_size < 1:
        raise ValueError(f"prompts {prompts} and batch_size {batch_size} must be at least 1.")
    chosen = [None if given is None else tuple(given) for given in blocks]
    combinations = [
        {"guidance": float(g), "steps": n, "guidance_blocks": b}
        for g, n, b in itertools.product(guidance, steps, chosen)
    ]
    for options in combinations:  # a wrong one last should not cost the others' time
        pipeline.request("a check", seed=seed + prompts - 1, **options)
    asked = SPLITS[split](prompts, settings=scene_settings(pipeline), seed=seed)
    rows = []
    for options in combinations:
        section = score_prompts(
            pipeline, asked, first_seed=seed, batch_size=batch_size, options=options
        )
        kept = {name: section[name] for name in ("attributes", "seconds_per_video")}
        rows.append(options | kept)
        if on_row is not None:
            on_row(rows[-1])
    return sorted(rows, key=merit, reverse=True)


def merit(row: dict[str, Any]) -> tuple[float | int, ...]:
    """Greater is better: the worst attribute, then all four at once, then fewer steps.

    The worst comes first because each attribute has to reach its target by itself. Of equals the
    one with less guidance is preferred, which distorts colours least.
    """
    rates = row["attributes"]
    worst = min(rates[name]["rate"] for name in scores.ATTRIBUTES)
    return worst, rates["all"]["rate"], -row["steps"], -row["guidance"]
