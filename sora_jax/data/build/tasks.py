"""What workers are given: one file to process, with everything that can go wrong with it named."""

import dataclasses
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from sora_jax.data.build import places
from sora_jax.data.build.inputs import InputFile
from sora_jax.data.build.settings import BuildSettings
from sora_jax.data.build.stages import process_file
from sora_jax.data.build.staging import Staging, Stamps, failed_row
from sora_jax.data.build.workers import Limits, Outcome, is_disk_full

CAPTIONER_MEBIBYTES = 2048  # torch and its libraries, without weights
Process = Callable[[InputFile, BuildSettings, Path], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class FileTask:
    """One input of the build into `out`; `process` is `process_file` but in tests."""

    out: str
    file: InputFile
    settings: BuildSettings
    process: Process = process_file


def limits_of(settings: BuildSettings) -> Limits:
    """What a file may cost, beside what the captioner costs for all files."""
    limits = settings.limits
    if not (settings.caption and settings.caption.model):
        return Limits(seconds=limits.seconds, mebibytes=limits.mebibytes)
    weights = sum(path.stat().st_size for path in Path(settings.caption.model).glob("*.*"))
    # In float32 they may be twice as large, and a part is there twice while they are loaded.
    extra = CAPTIONER_MEBIBYTES + 3 * weights / 2**20
    return Limits(limits.seconds, limits.mebibytes + extra, address_space=False)


def process_one(task: FileTask) -> str:
    """Processes a file and makes its row and clips final; says nothing.

    Any number of processes may do the same task: each leaves the same row and clips.

    Raises:
      OSError: what was made could not be kept, as on a full disk.
      ImportError: a package that the settings need is not there.
      MemoryError: the file asks for more memory than the limit.
    """
    staging, stamps = Staging(task.out), Stamps(task.settings)
    if staging.is_finished(task.file, stamps):  # done by a task that was thought lost
        return ""
    with staging.folder() as folder:
        clips = folder / "clips"
        clips.mkdir()
        row = _row(task, clips)
        costly = row["stage"] == "crash"
        staging.commit(task.file.key, row, stamps.of(task.file, costly=costly), clips)
    return ""


def give_up(task: FileTask, outcome: Outcome) -> None:
    """Makes the row final of a file whose worker had to be ended."""
    row = failed_row(task.file.key, outcome.status, f"the file {outcome.text}")
    stamp = Stamps(task.settings).of(task.file, costly=True)
    Staging(task.out).commit(task.file.key, row, stamp)


def _row(task: FileTask, clips: Path) -> dict[str, Any]:
    """The row of `process`, or one that names what it stumbled over."""
    try:
        return task.process(_at_hand(task.file, clips.parent), task.settings, clips)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        # Files come from anywhere: whatever a library does not foresee is that file's reason.
        if is_disk_full(error) or _is_below(error, clips):
            raise OSError(f"{error}, while clips of {task.file.path} were kept") from error
        shutil.rmtree(clips)
        clips.mkdir()
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        place = f"{os.path.basename(last.filename)}:{last.lineno}"
        return failed_row(task.file.key, "crash", f"cannot be processed ({what}, {place})")


def _is_below(error: Exception, folder: Path) -> bool:
    """A file of ours could not be written."""
    name = getattr(error, "filename", None)
    return isinstance(name, str | os.PathLike) and places.within(os.fspath(name), str(folder))


def _at_hand(file: InputFile, folder: Path) -> InputFile:
    """`file`, fetched into `folder` if it lies elsewhere: decoders seek."""
    if not places.is_remote(file.path):
        return file
    local = folder / f"source{os.path.splitext(file.path)[1]}"
    epath.Path(file.path).copy(local)
    return file._replace(path=str(local))
