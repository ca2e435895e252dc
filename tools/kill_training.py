"""Kills processes of a training run at random moments, and compares what comes out in the end.

python tools/kill_training.py --processes 2 --kills 20 --out DIR [--other 4] [--minutes 30]

A small VAE learns Paperworld on four simulated devices, once undisturbed, once with SIGKILL to a
random process at random moments: between starting and a few steps later, or while a checkpoint is
being written. After each kill the others are killed too, as a launcher does, and all start again.
The final weights, moments and EMA must be the same bit for bit. With --other a third run changes to
that number of processes half-way; it must agree to 1e-6. DIR keeps the undisturbed run for the next
time. Prints the figures as JSON.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
DEVICES = 4
EVERY = 3  # steps between checkpoints
MOST_FAILED = 10
SETTINGS = (
    *("batch_size=8", "log_every=1", f"checkpoint_every={EVERY}", "sample_every=0"),
    *("data.frames=5", "data.width=32", "data.height=32", "data.threads=1"),
    *("vae.base_dim=4", "vae.dim_mult=(1,2)", "vae.num_res_blocks=1", "vae.z_dim=4"),
    *(
        "vae.temporal_downsample=(True,)",
        "vae_loss.crop=(5,32,32)",
        "skip.grad_norm=1000.0",
        "optim.name=adamw",
    ),
)


class Job:
    """N processes that train together in `workdir`."""

    def __init__(self, workdir: Path, *, processes: int, steps: int, settings=()):
        with socket.socket() as listening:
            listening.bind(("localhost", 0))
            port = listening.getsockname()[1]
        command = [sys.executable, "-m", "sora_jax.cli", "train", "--distributed"]
        command += ["--config", "configs/paperworld_vae.py:smoke", "--workdir", str(workdir)]
        command += [f"--config.{s}" for s in (*SETTINGS, f"num_steps={steps}", *settings)]
        shared = {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of what this does
            "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
        workdir.mkdir(parents=True, exist_ok=True)
        self._logs = [(workdir / f"out-{i}.log").open("a") for i in range(processes)]
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | shared | {"JAX_PROCESS_ID": str(i)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for i, log in enumerate(self._logs)
        ]

    def kill(self, first: int) -> None:
        """SIGKILL to process `first`, and to the others a little later."""
        self.processes[first].send_signal(signal.SIGKILL)
        time.sleep(random.uniform(0, 1))
        self.end()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for log in self._logs:
            log.close()

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def finish(self) -> None:
        """Waits for the end; raises RuntimeError unless all end well."""
        codes = [process.wait() for process in self.processes]
        self.end()
        if any(codes):
            raise RuntimeError(f"exit statuses {codes}; see the logs in the folder.")


def last_step(workdir: Path) -> int:
    """The step of the newest row of the log, whatever run wrote it."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def rows(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def is_saving(workdir: Path) -> bool:
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(p.name.startswith("saving") for p in folder.iterdir())


def disturbed(
    workdir: Path, *, processes: int, steps: int, kills: int, minutes: float, seed: int
) -> tuple[list[dict], int]:
    """Trains with `kills` kills: what was killed when, and how many starts failed by themselves.

    After `minutes` nothing more is killed.
    """
    draw, told, failed = random.Random(seed), [], 0
    until = time.monotonic() + 60 * minutes
    while len(told) < kills and time.monotonic() < until:
        job = Job(workdir, processes=processes, steps=steps)
        before = rows(workdir)
        in_save, after = draw.random() < 0.5, draw.randrange(0, EVERY + 2)
        victim = draw.randrange(processes)
        while job.running() and rows(workdir) < before + after:
            time.sleep(0.05)
        while in_save and job.running() and not is_saving(workdir):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3 if in_save else 1.0))
        if not job.running():
            if last_step(workdir) >= steps:
                job.finish()
                break
            # Gloo gives its processes 30 s to find each other, which a busy machine may need.
            job.end()
            failed += 1
            if failed > MOST_FAILED:
                raise RuntimeError(f"{failed} starts failed without a kill; see {workdir}.")
            continue
        during_save = is_saving(workdir)
        job.kill(victim)
        told.append({"step": last_step(workdir), "process": victim, "during_save": during_save})
        print(f"kill {len(told)}: {told[-1]}", file=sys.stderr, flush=True)
    for _ in range(MOST_FAILED):
        try:
            Job(workdir, processes=processes, steps=steps).finish()
            break
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            failed += 1
    return told, failed


def state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by their path."""
    import orbax.checkpoint as ocp

    folder = (workdir / "checkpoints" / str(step) / "state").resolve()
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(folder).item_metadata.tree
    wanted = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in tree}
    return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=wanted))


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[int, float]:
    """(arrays that are not the same bit for bit, the largest difference by its array's size)."""
    assert set(a) == set(b)
    unequal = sum(a[path].tobytes() != b[path].tobytes() for path in a)
    largest = max(
        float(
            np.max(np.abs(a[p].astype(np.float64) - b[p]), initial=0) / max(np.abs(a[p]).max(), 1)
        )
        for p in a
    )
    return unequal, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--other", type=int, default=0, help="processes of the second half")
    parser.add_argument("--minutes", type=float, default=1e9, help="of killing at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    options = {"processes": args.processes, "steps": args.steps}
    begun = time.time()
    if not (args.out / "straight" / "checkpoints" / str(args.steps)).is_dir():
        shutil.rmtree(args.out, ignore_errors=True)
        Job(args.out / "straight", **options).finish()
    for name in ("killed", "other"):
        shutil.rmtree(args.out / name, ignore_errors=True)
    wanted = state(args.out / "straight", args.steps)
    started = time.time()
    told, failed = disturbed(
        args.out / "killed", **options, kills=args.kills, minutes=args.minutes, seed=args.seed
    )
    ended = time.time()
    unequal, largest = difference(wanted, state(args.out / "killed", args.steps))
    goodput = json.loads((args.out / "killed" / "goodput.json").read_text())
    result = {
        "processes": args.processes,
        "steps": args.steps,
        "kills": len(told),
        "starts_that_failed_by_themselves": failed,
        "during_save": sum(kill["during_save"] for kill in told),
        "arrays": len(wanted),
        "arrays_not_bitwise_equal": unequal,
        "largest_difference": largest,
        "damaged_checkpoints": len(list((args.out / "killed" / "checkpoints").glob("damaged-*"))),
        "goodput": goodput["seconds"],
        # Of the whole, beside that from the first start to the last end, as seen from here.
        "goodput_seconds": goodput["wall_seconds"],
        "seconds": ended - started,
    }
    if args.other:
        half = args.steps // 2
        # The schedule goes by num_steps: the first half is cut short, not shortened.
        job = Job(args.out / "other", **options)
        while job.running() and last_step(args.out / "other") <= half:
            time.sleep(0.05)
        job.kill(0)
        Job(args.out / "other", processes=args.other, steps=args.steps).finish()
        log = (args.out / "other" / "out-0.log").read_text()
        again = state(args.out / "other", args.steps)
        result["other"] = {
            "processes": args.other,
            "largest_difference": difference(wanted, again)[1],
            "restored": bool(re.search(r"sora-jax: .* over 2 runs", log)),
        }
    result["minutes"] = (time.time() - begun) / 60
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
