"""The build's two maps, over files and over shards, on an Apache Beam runner.

Each element still goes to a process of its own that can be ended, so that a damaged file costs a
runner's machine no more than one of this. What is made lies in OUT/.build, which all machines see.
"""

import functools
import pickle
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from sora_jax.data.build import places
from sora_jax.data.build.staging import Staging
from sora_jax.data.build.workers import Limits, Outcome, Worker, finish

CHUNK = 256  # tasks in one file: a pipeline's own description must stay small
INSTALL = (
    "Apache Beam is not installed; pip install 'apache-beam[gcp]>=2.77' into an environment of "
    "its own (`make beam` shows how), or leave out --runner."
)

Otherwise = Callable[[Any, Outcome], None]
_idle: dict[str, list[Worker]] = {}  # workers of this process between two elements


def mapper(out: str, runner: str, options: Sequence[str]) -> Callable[..., None]:
    """A function that does tasks on `runner`, to the last, with `build`'s limits.

    Args:
      options: Beam's own, such as "--project=NAME"; each may hold several, as in a shell.

    Raises:
      ValueError: Beam is not there, it does not know the runner, or machines elsewhere could not
        see `out`; one line.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.runner import create_runner
    except ImportError as error:
        raise ValueError(INSTALL) from error
    try:
        create_runner(runner)
    except (ValueError, ImportError) as error:
        raise ValueError(f"--runner {runner}: {' '.join(str(error).split())}") from error
    if runner == "DataflowRunner" and not places.is_remote(out):
        raise ValueError(f"--runner {runner} needs an --out on gs://, not {out}.")
    words = [word for option in options for word in shlex.split(option)]

    def run(
        function: Callable[[Any], str],
        tasks: Sequence[Any],
        *,
        limits: Limits,
        otherwise: Otherwise,
    ) -> None:
        if not tasks:
            return
        parameters = PipelineOptions([f"--runner={runner}", *words])
        step = functools.partial(_in_worker, function=function, limits=limits, otherwise=otherwise)
        try:
            with beam.Pipeline(options=parameters) as pipeline:
                _ = (
                    pipeline
                    | "Lists" >> beam.Create(_write_lists(out, tasks))
                    | "Tasks" >> beam.FlatMap(_read_list)
                    | "Spread" >> beam.Reshuffle()
                    | function.__name__ >> beam.Map(step)
                )
        finally:
            _end_workers()

    return run


def _in_worker(
    task: Any, *, function: Callable[[Any], str], limits: Limits, otherwise: Otherwise
) -> None:
    """Does one element in a process that waits for the next afterwards."""
    idle = _idle.setdefault(function.__qualname__, [])
    try:
        worker = idle.pop()
    except IndexError:  # as many as the runner has threads
        worker = None
    outcome, worker = finish(worker, function, task, limits)
    if worker is not None:
        idle.append(worker)
    if outcome.status != "done":
        otherwise(task, outcome)


def _end_workers() -> None:
    """Ends those of a runner that works in this process; elsewhere they end with theirs."""
    while _idle:
        for worker in _idle.popitem()[1]:
            worker.end()


def _write_lists(out: str, tasks: Sequence[Any]) -> list[str]:
    folder = Staging(out).root / "tmp" / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for start in range(0, len(tasks), CHUNK):
        path = folder / f"{start:09d}.pickle"
        path.write_bytes(pickle.dumps(list(tasks[start : start + CHUNK])))
        names.append(str(path))
    return names


def _read_list(name: str) -> Iterator[Any]:
    yield from pickle.loads(epath.Path(name).read_bytes())
