"""build(): inputs -> files -> plan -> shards -> report -> manifest; killed anywhere, it goes on.

Each step leaves what it finished in OUT/.build (see `staging`) and skips what is there. The
manifest is written last: a folder that has one is a whole set.
"""

import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

import sora_jax
from sora_jax.data import records
from sora_jax.data.build import places, shards
from sora_jax.data.build.inputs import InputFile, check_captions, find_inputs, without_caption
from sora_jax.data.build.report import write_report
from sora_jax.data.build.settings import BuildSettings
from sora_jax.data.build.stages import check_packages, process_file
from sora_jax.data.build.staging import (
    MANIFEST,
    Staging,
    Stamps,
    built_manifest,
    failed_row,
    size_and_time,
)
from sora_jax.data.build.tasks import FileTask, Process, give_up, limits_of, process_one
from sora_jax.data.build.workers import (
    CannotStart,
    CannotStore,
    Limits,
    Outcome,
    is_disk_full,
    run_tasks,
)
from sora_jax.locked import locked
from sora_jax.progress import Progress

FORMAT = 1  # of the manifest
LOCAL = "local"
NO_CAPTION = "no caption, and captions = drop"
PICTURES = 8  # frames of a clip that the report is given


def build(
    source: str | os.PathLike,
    out: str | os.PathLike,
    settings: BuildSettings | None = None,
    *,
    workers: int | None = None,
    captions: str = "error",
    runner: str = LOCAL,
    runner_options: Sequence[str] = (),
    process: Process = process_file,
) -> dict[str, Any]:
    """Builds a set of clips from what `source` names, or goes on with it; returns the report.

    Called again, it skips every file that is finished under the same settings; the set is the
    same byte for byte however often it was stopped, and however many workers there were.

    Args:
      source: a folder, pattern, list or manifest; see `inputs`.
      out: a new or empty folder, one that such a build was stopped in, or a gs:// address.
      workers: processes on this machine; None is one a core.
      captions: what to do about files without one: "error", "drop" or "allow".
      runner: "local", or the name of an Apache Beam runner.
      runner_options: Beam's own, such as "--project=NAME".
      process: stands for `process_file` in tests.

    Raises:
      ValueError: nothing to read, captions missing, a folder that holds something else, a full
        disk, or no clip left by the filters; one line.
    """
    settings = BuildSettings() if settings is None else settings
    if workers is not None and workers < 1:
        raise ValueError(f"{workers} workers; give 1 or more.")
    if runner == LOCAL and runner_options:
        raise ValueError(
            f"--runner-options={runner_options[0]} is for Apache Beam; name a --runner, or leave "
            "it out."
        )
    check_packages(settings)
    out = places.absolute(os.fspath(out))
    places.check_scheme(out)
    files = find_inputs(os.fspath(source), out=out)
    if not (settings.caption and settings.caption.model):
        check_captions(files, captions)
    with _locked(out) as staging:
        identity = _identity(files, settings, captions)
        if _is_built(staging, identity):
            staging.remove()
            return json.loads((staging.out / "report.json").read_text())
        step = _Beam(out, runner, runner_options) if runner != LOCAL else _Local(workers)
        work = _Build(staging, files, settings, captions, step, process)
        with work.one_line_errors():
            return work.run(identity)


class _Build:
    """The steps of one build, in their order."""

    def __init__(
        self,
        staging: Staging,
        files: list[InputFile],
        settings: BuildSettings,
        captions: str,
        step: "_Local | _Beam",
        process: Process,
    ) -> None:
        self.staging, self.settings, self.step, self.process = staging, settings, step, process
        self.files = files
        self.drop_clips = captions == "drop"
        modelled = bool(settings.caption and settings.caption.model)
        files_dropped = self.drop_clips and not modelled
        self.dropped = {f.key for f in without_caption(files)} if files_dropped else set()
        self.finished = 0

    def run(self, identity: dict[str, Any]) -> dict[str, Any]:
        self.staging.sweep()
        self._process_files()
        stamps = hashlib.sha256()
        plan = shards.make_plan(self._rows(stamps), self.settings)
        if not plan.shards[0]:
            self._report(plan)
            raise ValueError(self._nothing_kept())
        out = os.fspath(self.staging.out)
        tasks = shards.shard_tasks(out, plan, made_from=stamps.hexdigest())
        self.step.write_shards(tasks)
        report = self._report(plan)
        self._complete(identity, plan, [shards.written(task) for task in tasks])
        return report

    def _rows(self, stamps: Any = None) -> Iterator[dict[str, Any]]:
        """The rows of all files, in order, read one by one; `stamps` takes in what they are of."""
        for file in self.files:
            if file.key in self.dropped:
                yield failed_row(file.key, "caption", NO_CAPTION)
                continue
            stamp, row = self.staging.saved(file.key)
            if stamps is not None:
                stamps.update(stamp.encode())
            # Even a model may have had nothing to say of some clip.
            yield shards.with_captions_alone(row) if self.drop_clips else row

    def _process_files(self) -> None:
        stamps = Stamps(self.settings)
        out = os.fspath(self.staging.out)
        wanted = [file for file in self.files if file.key not in self.dropped]
        tasks = [
            FileTask(out, file, self.settings, self.process)
            for file in wanted
            if not self.staging.is_finished(file, stamps)
        ]
        self.finished = len(wanted) - len(tasks)
        with Progress(
            "Processing", total=len(wanted), unit="files", start=self.finished, alone=True
        ) as bar:
            for given_up in self.step.process_files(tasks, limits_of(self.settings)):
                self.finished += 1
                bar.update(self.finished, **({"given up": str(given_up)} if given_up else {}))

    def _report(self, plan: shards.Plan) -> dict[str, Any]:
        sources = {clip.key: clip for shard in plan.shards for clip in shard}

        def frames(key: str) -> np.ndarray | None:
            clip = sources.get(key)
            if clip is None:
                return None
            stride = max(1, clip.num_frames // PICTURES)
            return records.decode_clip(self.staging.clip(clip.source, key), stride=stride)

        rows = shards.final_rows(self._rows(), plan.duplicates)
        with self.staging.folder() as folder:
            report = write_report(folder, rows, settings=self.settings.to_dict(), frames=frames)
            for name in ("report.json", "report.html"):
                self.staging.publish(folder / name, name)
        return report

    def _complete(
        self, identity: dict[str, Any], plan: shards.Plan, written: list[dict[str, Any]]
    ) -> None:
        """Everything beside the shards, and the manifest at the very end."""
        out = self.staging.out
        names = {shard["file"] for shard in written}
        for path in out.glob(f"{shards.PATTERN}*"):
            if path.name not in names:  # of an earlier plan
                path.unlink()
        with self.staging.folder() as folder:
            (folder / "index.npz").write_bytes(shards.index_bytes(plan))
            shards.write_dataset_info(folder, written)
            for name in ("features.json", "dataset_info.json", "index.npz"):
                self.staging.publish(folder / name, name)
        beside = [
            {"file": name, "bytes": path.stat().length, "sha256": shards.sha256_of(path)}
            for name in ("dataset_info.json", "features.json", "index.npz", "report.json")
            for path in [out / name]
        ]
        manifest = {
            "format": FORMAT,
            "version": sora_jax.__version__,
            **identity,
            "split": shards.SPLIT,
            "records": sum(shard["records"] for shard in written),
            "shards": written,
            "files": beside,
        }
        with self.staging.folder() as folder:
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
            self.staging.publish(folder / MANIFEST, MANIFEST)
        self.staging.remove()

    def _nothing_kept(self) -> str:
        rows = list(self._rows())
        failed = [row for row in rows if row["error"]]
        where = f"see {self.staging.out}/report.html"
        if len(failed) == len(rows):
            return (
                f"no readable video found: none of {len(rows)} files gave a clip (first: "
                f"{failed[0]['source']}: {failed[0]['error']}); {where}."
            )
        stages = [clip["dropped"]["stage"] for row in rows for clip in row["clips"]]
        counts = sorted(((stages.count(s), s) for s in set(stages)), reverse=True)
        why = ", ".join(f"{stage} {count}" for count, stage in counts) or "no clip was cut"
        return f"the filters left no clip of {len(rows)} files ({why}); {where}, then relax them."

    def _state(self) -> str:
        return f"{self.finished} of {len(self.files)} files are finished"

    @contextlib.contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """A full disk, a folder that cannot be written and a missing package, each in one line."""
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; {self._state()}: the same command goes on."
            ) from None
        except (CannotStore, OSError) as error:
            reason = " ".join(str(error).split())
            full = is_disk_full(error) or os.strerror(errno.ENOSPC) in reason
            fix = "free some space" if full else "put it right"
            raise ValueError(
                f"{self.staging.out}: cannot be written ({reason}); {self._state()}: {fix} and run "
                "the same command again."
            ) from error
        except (ImportError, CannotStart) as error:
            raise ValueError(str(error)) from error


class _Local:
    """Steps done by processes of this machine."""

    def __init__(self, workers: int | None) -> None:
        self.workers = workers or _cores()

    def process_files(self, tasks: Sequence[FileTask], limits: Limits) -> Iterator[int]:
        """Does all `tasks`; yields, after each, how many were given up so far."""
        given_up = 0
        running = run_tasks(process_one, tasks, workers=self.workers, limits=limits)
        with contextlib.closing(running):
            for outcome in running:
                if outcome.status != "done":
                    give_up(tasks[outcome.index], outcome)
                    given_up += 1
                yield given_up

    def write_shards(self, tasks: Sequence[shards.ShardTask]) -> None:
        todo = [task for task in tasks if not shards.is_written(task)]
        done = len(tasks) - len(todo)
        if len(todo) == 1:  # sooner done than a process is started
            shards.write_shard(todo.pop())
        running = run_tasks(shards.write_shard, todo, workers=self.workers)
        with (
            Progress("Writing", total=len(tasks), unit="shards", start=done, alone=True) as bar,
            contextlib.closing(running),
        ):
            for outcome in running:
                if outcome.status != "done":
                    raise RuntimeError(f"shard {todo[outcome.index].index} {outcome.text}")
                done += 1
                bar.update(done)


class _Beam:
    """The same steps on a Beam runner."""

    def __init__(self, out: str, runner: str, options: Sequence[str]) -> None:
        from sora_jax.data.build import beam_runner

        self._map: Callable = beam_runner.mapper(out, runner, options)

    def process_files(self, tasks: Sequence[FileTask], limits: Limits) -> Iterator[int]:
        self._map(process_one, tasks, limits=limits, otherwise=give_up)
        yield from [0] * len(tasks)

    def write_shards(self, tasks: Sequence[shards.ShardTask]) -> None:
        todo = [task for task in tasks if not shards.is_written(task)]
        self._map(shards.write_shard, todo, limits=Limits(), otherwise=_must_be_written)


def _must_be_written(task: shards.ShardTask, outcome: Outcome) -> None:
    raise RuntimeError(f"shard {task.index} {outcome.text}")


def verify(out: str | os.PathLike) -> dict[str, Any]:
    """Checks every file of a built set against its checksum; returns the manifest.

    Raises:
      ValueError: no built set, or the first file that is missing or damaged; one line.
    """
    out = os.fspath(out)
    places.check_scheme(out)
    folder = epath.Path(places.absolute(out))
    manifest = built_manifest(folder)
    if manifest is None:
        if Staging(folder).root.exists():
            raise ValueError(f"{out}: the build is not finished; run the same command again.")
        raise ValueError(f"{out}: no {MANIFEST}; give the --out folder of `sora-jax data build`.")
    listed = [*manifest["shards"], *manifest["files"]]
    with Progress("Checking", total=len(listed), unit="files", alone=True) as bar:
        for done, entry in enumerate(listed, 1):
            _check_file(folder / entry["file"], entry)
            bar.update(done)
    return manifest


def _check_file(path: epath.Path, entry: dict[str, Any]) -> None:
    again = "build the set again, or copy the file anew"
    if not path.exists():
        raise ValueError(f"{path}: missing; {again}.")
    size = path.stat().length
    if size != entry["bytes"]:
        raise ValueError(f"{path}: damaged: {size} bytes, not {entry['bytes']}; {again}.")
    if shards.sha256_of(path) != entry["sha256"]:
        raise ValueError(f"{path}: damaged: its bytes have changed (sha256); {again}.")


def _identity(files: Sequence[InputFile], settings: BuildSettings, captions: str) -> dict[str, Any]:
    """What a set is made from, without paths and times: the same files elsewhere make the same."""
    digest = hashlib.sha256()
    for file in files:
        size, _ = size_and_time(file.path)
        digest.update(json.dumps([*file[1:], size]).encode())
    return {
        "settings": settings.to_dict(),
        "inputs": {"files": len(files), "captions": captions, "sha256": digest.hexdigest()},
    }


def _is_built(staging: Staging, identity: dict[str, Any]) -> bool:
    """The set is there already, made from the same.

    Raises:
      ValueError: the folder holds another set, or files that are none of ours.
    """
    out = staging.out
    manifest = built_manifest(out)
    if manifest is None:
        ours = {staging.root.name, "report.json", "report.html", "index.npz", "features.json"}
        ours |= {"dataset_info.json"}
        others = [
            path.name
            for path in (out.iterdir() if out.exists() else ())
            if path.name not in ours and shards.PATTERN not in path.name
        ]
        if others:
            raise ValueError(
                f"{out} holds other files ({sorted(others)[0]}); choose a new --out, or an empty "
                "folder."
            )
        return False
    # As JSON has them: tuples are lists there.
    identity = json.loads(json.dumps(identity))
    if _without_limits(manifest) != _without_limits(identity):
        raise ValueError(
            f"{out} holds a set of other files or settings; choose another --out, or remove it."
        )
    return True


def _without_limits(manifest: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in manifest["settings"].items() if k != "limits"}
    return {"settings": settings, "inputs": manifest["inputs"]}


@contextlib.contextmanager
def _locked(out: str) -> Iterator[Staging]:
    """The staging of `out`, which no other build of this machine has until the block ends.

    Raises:
      ValueError: another has it, or the folder cannot be made.
    """
    staging = Staging(out)
    if staging.is_remote:  # nothing there to lock with
        yield staging
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{out}: cannot be made ({error.strerror}); choose another --out."
        ) from error
    busy = f"{out}: another build is writing there; wait for it, or choose another --out."
    with locked(out, busy=busy):
        yield staging


def _cores() -> int:
    if sys.platform.startswith("linux"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
