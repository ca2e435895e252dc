"""What is found before the first step: hosts that differ, another config's workdir, no room."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import sora_jax
from sora_jax import agreement, video_io
from sora_jax.locked import locked

ROOM = 2.2  # free space wanted, in sizes of the state: a new checkpoint beside the last one
_NEW = 1.1  # of it, what a new one takes; the rest may be taken by what a run has kept already
_SHOWN = 6  # differing keys that are listed

# A workdir goes on with other values of any key but these: they change the state, or the order of
# the data.
_FIXED = (
    *("stage", "seed", "batch_size", "data", "vae", "text", "text_tokens", "dit"),
    *("optim.name", "optim.freeze", "optim.param_dtype", "optim.moment_dtype"),
    "vae_loss.adversarial",
)
# Below them, what may change all the same: places, readers, and how the same thing is computed.
_FREE = {
    *("path", "cache", "cache_clips", "threads", "workers"),
    *("dtype", "quantization", "remat", "context", "attention"),
}
_LEASE = 120.0  # seconds after which file servers (NFS) give up the locks of who is gone
_ON_OR_OFF = ("optim.ema_decay",)  # may change, but not to or from 0: the state has it or has not


def folder(path: str | Path, *, key: str = "--workdir") -> Path:
    """`path`, which must be a folder of the file system.

    Raises:
      ValueError: it is empty, or a URL, of which pathlib would make a folder named "gs:" here.
    """
    if not str(path).strip():
        raise ValueError(f"{key} is empty; name a folder, such as runs/mine.")
    if "://" in str(path):
        raise ValueError(
            f"{key} {path} is no folder: mount the bucket, for runs append to files and rename "
            "folders (launch/tpu.py and launch/gke.py do it with --bucket; elsewhere, `gcsfuse "
            "--implicit-dirs --rename-dir-limit=200000 BUCKET /mnt/sora`)."
        )
    return Path(path)


def check_settings(config) -> None:
    """Raises ValueError for settings of this machinery that are out of range."""
    # `get`: the configs of earlier runs lack these keys.
    least = {"checkpoint_every_kept": 0, "checkpoint_best": 0, "watchdog_minutes": 0}
    for name, smallest in least.items():
        if config.get(name, 0) < smallest:
            raise ValueError(f"config.{name} {config[name]} must be 0 (off) or more.")
    if config.get("local_checkpoint_dir") and config.local_checkpoint_every < 1:
        raise ValueError(
            f"config.local_checkpoint_every {config.local_checkpoint_every} must be 1 or more."
        )
    steps = (config.get("profile") or {}).get("steps", ())
    if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
        raise ValueError(
            f"config.profile.steps {tuple(steps)}: give the first and the last step, as (10, 12)."
        )


def check_hosts(config) -> None:
    """Raises ValueError in every process unless all have the same config, code and JAX."""
    mine = {
        "config": flat_config(json.loads(config.to_json_best_effort())),
        "files": source_files(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    }
    rows = agreement.gather(mine)
    for number, row in enumerate(rows):
        found = [
            f"{'config.' if kind == 'config' else ''}{what}"
            for kind in mine
            for what in _differences(rows[0][kind], row[kind], both=kind != "files")
        ]
        if found:
            raise ValueError(
                f"process {number} differs from process 0 in {_listed(found)}; start all processes "
                "with the same config, code and versions."
            )


def source_files() -> dict[str, str]:
    """A digest of every source file of this package, by its name."""
    root = Path(sora_jax.__file__).parent
    return {
        file.relative_to(root).as_posix(): hashlib.blake2b(
            file.read_bytes(), digest_size=8
        ).hexdigest()
        for file in sorted(root.rglob("*.py"))
    }


def check_same_run(config, saved: str, *, workdir: Path) -> list[str]:
    """Compares `config` with the JSON of that which a checkpoint was written with.

    Keys that one of them lacks are no difference: versions add keys.

    Returns:
      The keys that differ and may, as "key old -> new".

    Raises:
      ValueError: a key differs that changes the state or the order of the data.
    """
    given = flat_config(json.loads(config.to_json_best_effort()))
    old = flat_config(json.loads(saved))
    # A part of a mixture is no key of a version.
    parts = [key for key in old | given if key.startswith("data.parts.")]
    missing = [key for key in parts if (key in old) != (key in given)]
    differ = [key for key in old if key in given and old[key] != given[key]] + missing
    wrong = [k for k in differ if _is_fixed(k) or (k in _ON_OR_OFF and 0 in (old[k], given[k]))]
    if wrong:
        rows = [f"{k} {old.get(k, 'nothing')!r}, not {given.get(k, 'nothing')!r}" for k in wrong]
        raise ValueError(
            f"{workdir} holds a run of another config: {_listed(rows)}; set config as it was, or "
            "start from the run's export (config.init_from) in another workdir."
        )
    return [f"{k} {old.get(k, 'nothing')!r} -> {given.get(k, 'nothing')!r}" for k in differ]


def _is_fixed(key: str) -> bool:
    fixed = any(f"{key}.".startswith(f"{name}.") for name in _FIXED)
    return fixed and key.split(".")[-1] not in _FREE


def flat_config(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a nested dictionary by their dotted keys."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flat_config(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _differences(first: dict[str, Any], other: dict[str, Any], *, both: bool) -> list[str]:
    """Keys of two flat dictionaries whose values are not the same, with the values if wanted."""
    keys = [key for key in first | other if first.get(key) != other.get(key)]
    if not both:
        return keys
    return [f"{key} ({other.get(key)!r}, not {first.get(key)!r})" for key in keys]


def _listed(rows: list[str]) -> str:
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return "; ".join(rows[:_SHOWN]) + more


def state_bytes(shapes, placement) -> tuple[int, int]:
    """Bytes of a tree of shapes: as a whole, and of the pieces that this process holds."""
    whole = mine = 0
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(placement), strict=True)
    for leaf, where in leaves:
        whole += leaf.size * leaf.dtype.itemsize
        pieces = {str(i) for i in where.addressable_devices_indices_map(leaf.shape).values()}
        mine += math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize * len(pieces)
    return whole, mine


def check_room(
    folder: Path,
    needed: int,
    *,
    key: str,
    room: float = ROOM,
    kept: Path | None = None,
    everywhere: bool = False,
) -> None:
    """Makes `folder` and tries whether `room` times `needed` bytes can be written to it.

    Args:
      needed: bytes of what is to be saved.
      kept: folder of what was saved before and will be replaced, which needs no room again; None:
        `folder`.
      key: what names the folder, for the message.
      everywhere: each process tries for itself, since the folder is on its own disk; else the
        first one tries for all.

    Raises:
      ValueError: in all processes, if any finds no permission or too little space.
    """
    problem = None
    if everywhere or jax.process_index() == 0:
        there = _bytes_in(folder if kept is None else kept)
        wanted = max(_NEW * needed, room * needed - there)
        problem = _no_room(Path(folder), needed, wanted, key)
    problems = [p for p in agreement.gather(problem) if p]
    if problems:
        raise ValueError(problems[0])


def _bytes_in(folder: Path) -> int:
    """Of the files below `folder`; some may go meanwhile."""
    found = 0
    for file in Path(folder).rglob("*"):
        with contextlib.suppress(OSError):
            found += file.stat().st_size if file.is_file() else 0
    return found


def _no_room(folder: Path, needed: int, wanted: float, key: str) -> str | None:
    there = folder
    while not there.exists():
        there = there.parent
    try:
        free = shutil.disk_usage(there).free
        if free >= wanted:
            folder.mkdir(parents=True, exist_ok=True)
            video_io.try_folder(folder)
            return None
    except OSError as error:
        return f"{key} {folder}: {error.strerror}; give a folder that this process may write to."
    return (
        f"{key} {folder} has {free / 1e9:.1f} GB free, checkpoints of {needed / 1e9:.2f} GB want "
        f"{wanted / 1e9:.1f} GB; make room, or give another folder."
    )


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Holds `workdir` for this run, by its first process.

    A job of several processes waits a while: a host that died may leave its lock on a file server.

    Raises:
      ValueError: in all processes, if another run is there.
    """
    busy = f"--workdir {workdir}: another run trains there; wait for it, or give another."
    problem = None
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            wait = _LEASE if jax.process_count() > 1 else 0.0
            try:
                held.enter_context(locked(workdir, busy=busy, wait=wait))
            except ValueError as error:
                problem = str(error)
        if problem := agreement.of_first(problem):
            raise ValueError(problem)
        yield


def run_id(workdir: Path) -> str:
    """A name that this run, and no other in the same folder before or after it, has."""
    file = Path(workdir) / "run_id"
    if jax.process_index() == 0 and not file.is_file():
        partial = file.with_suffix(".partial")
        partial.write_text(uuid.uuid4().hex[:12])
        os.replace(partial, file)
    return agreement.of_first(file.read_text() if jax.process_index() == 0 else None)


def log_apart(workdir: Path) -> None:
    """Sends the warnings of all processes but the first to workdir/logs/process-N.log."""
    number = jax.process_index()
    if number == 0:
        return
    folder = Path(workdir) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"process-{number}.log", delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().handlers[:] = [handler]
    logging.captureWarnings(True)
    warnings.simplefilter("default")


def tell(text: str) -> None:
    """Prints a line on stderr, in the first process alone."""
    if jax.process_index() == 0:
        print(f"sora-jax: {text}", file=sys.stderr, flush=True)
