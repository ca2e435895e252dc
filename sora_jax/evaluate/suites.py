"""The suites that `sora-jax eval` knows, by name."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Suite(NamedTuple):
    """A suite; `run(pipeline, out, **options)` scores, writes `out` and returns what it wrote."""

    summary: str
    run: Callable[..., dict[str, Any]]


def _paperworld(pipeline, out: Path, **options) -> dict[str, Any]:
    from sora_jax.evaluate import report
    from sora_jax.evaluate.paperworld import evaluate

    gallery = report.Gallery()
    result = evaluate(pipeline, on_video=gallery.add, **options)
    report.write(result, out, gallery=gallery)
    return result


def _tasks(pipeline, out: Path, **options) -> dict[str, Any]:
    from sora_jax.evaluate import report
    from sora_jax.evaluate.task_report import TaskGallery
    from sora_jax.evaluate.tasks import evaluate

    gallery = TaskGallery()

    def keep(result: dict[str, Any]) -> None:
        """A suite takes hours, and what is known is worth keeping."""
        report.save_json(result, report.partial_path(out))

    result = evaluate(pipeline, on_video=gallery.add, on_result=keep, **options)
    gallery.save(out)
    report.save_json(result, out)
    report.partial_path(out).unlink(missing_ok=True)
    return result


SUITES = {
    "paperworld": Suite(
        "colour, shape, place and verb of generated videos, read back by the oracle", _paperworld
    ),
    "tasks": Suite(
        "pictures animated, videos extended, joined and painted in; permanence, cuts, physics",
        _tasks,
    ),
}


def find_suite(name: str) -> Suite:
    """The suite called `name`.

    Raises:
      ValueError: there is none; names the nearest.
    """
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(SUITES)}."
        raise ValueError(f"unknown suite {name!r}; {hint}")
    return SUITES[name]


def chosen_tasks(suite: str, words: str) -> tuple[str, ...]:
    """The option `tasks` of `suite` for words such as "animate,extend".

    Raises:
      ValueError: a suite that has none, or an unknown task.
    """
    from sora_jax.evaluate import tasks

    if suite != "tasks":
        raise ValueError(f"--tasks is for --suite tasks, not for {suite!r}; leave it out.")
    groups = tuple(word.strip() for word in words.split(","))
    tasks.chosen(groups)
    return groups


def run_suite(name: str, pipeline, out: str | Path, **options) -> dict[str, Any]:
    """Scores `pipeline` by the suite `name`; writes `out` (.json) and contact sheets beside it.

    Args:
      options: those of the suite, such as `prompts` of `evaluate.paperworld.evaluate`.

    Raises:
      ValueError: an unknown suite or an unwritable `out`, before any work; or a bad option.
    """
    from sora_jax import video_io

    suite = find_suite(name)
    return suite.run(pipeline, video_io.check_output_path(out, allowed=(".json",)), **options)
