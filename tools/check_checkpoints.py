"""Damages checkpoints and times saving them: what docs/training.md states.

python tools/check_checkpoints.py [--trials 200] [--megabytes 512] [--out FOLDER]

Changes one random byte of a random file of a checkpoint, manifest included, as often as asked, and
counts how many changes are found and named. Then saves a larger state and prints how long training
is blocked, against how long it takes until all is on disk with its checksums.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from sora_jax.checkpoint import Checkpointer

REPEATS = 5


def damages(folder: Path, trials: int) -> dict:
    """How many of `trials` changes of one byte are found, over which files."""
    keys = jax.random.split(jax.random.key(0), 8)
    state = {f"w{i}": jax.random.normal(key, (64, 32)) for i, key in enumerate(keys)}
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(3, state, data={"records_read": 24}, meta={"config": "{}"}, loss=1.0)
    files = [f for f in sorted((folder / "3").rglob("*")) if f.is_file() and f.stat().st_size]
    rng, found, named = np.random.default_rng(0), 0, 0
    for trial in range(trials):
        file = files[trial % len(files)] if trial < len(files) else rng.choice(files)
        old = file.read_bytes()
        new = bytearray(old)
        new[rng.integers(len(old))] ^= int(rng.integers(1, 256))
        file.write_bytes(new)
        with Checkpointer(folder) as checkpointer:
            try:
                checkpointer.newest_sound()
            except ValueError as error:
                found += 1
                named += str(file.relative_to(folder / "3")) in str(error)
        file.write_bytes(old)
    return {"files": len(files), "trials": trials, "found": found, "named": named}


def blocking(folder: Path, megabytes: int) -> dict:
    """Median seconds that `save` blocks, and until the step is complete."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    shape = (megabytes // 16, 1 << 18)
    keys = jax.random.split(jax.random.key(1), 16)  # what can be compressed is written faster
    state = step({f"w{i}": jax.random.normal(key, shape) for i, key in enumerate(keys)})
    blocked, whole = [], []
    with Checkpointer(folder, keep=1) as checkpointer:
        for n in range(REPEATS + 1):
            jax.block_until_ready(state)
            begun = time.perf_counter()
            checkpointer.save(n, state, data={}, meta={})
            blocked.append(time.perf_counter() - begun)
            checkpointer.wait()
            whole.append(time.perf_counter() - begun)
            state = step(state)
    blocked, whole = blocked[1:], whole[1:]  # the first one starts threads
    return {
        "megabytes": megabytes,
        "blocks_seconds": statistics.median(blocked),
        "synchronous_seconds": statistics.median(whole),
        "share": statistics.median(b / w for b, w in zip(blocked, whole, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=512, help="of the state that is timed")
    parser.add_argument("--out", type=Path, help="a folder on the disk to time; default: temporary")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        result = {
            "damage": damages(Path(folder) / "damaged", args.trials),
            "saving": blocking(Path(folder) / "timed", args.megabytes),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
