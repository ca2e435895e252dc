"""train(config, workdir): jits the steps and owns their order; no maths.

Mesh, stage, loader, state, restore; then for every step: batch, step, log, preview, save.
"""

import contextlib
import math
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sora_jax import checkpoint_path, sharding
from sora_jax.checkpoint import Checkpointer
from sora_jax.data import loader as loaders
from sora_jax.progress import Progress
from sora_jax.train import preview
from sora_jax.train.batches import make_loader
from sora_jax.train.metrics import MetricWriter, Rates, plot_losses
from sora_jax.train.program import Program, build
from sora_jax.train.state import TrainState


def train(config, workdir: str | Path, *, devices=None) -> Path:
    """Trains `config` until `num_steps`, resuming from `workdir` if it holds a checkpoint.

    Args:
      config: a ConfigDict as configs/base.py makes it.
      devices: those the mesh is made of; None takes all.

    Returns:
      The folder of training checkpoints.

    Raises:
      ValueError: for a config that cannot run, or that is not the one of the checkpoint.
      FloatingPointError: the loss or gradient is not finite; names metric and step.
      KeyboardInterrupt: after Ctrl-C or SIGTERM, when the checkpoint is saved.
    """
    workdir = Path(workdir)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    program = build(config, mesh)
    stage, placement = program.stage, program.placement
    frozen = stage.place_frozen(mesh)
    seed_key = jax.jit(jax.random.key, out_shardings=sharding.named(mesh))(config.seed + 1)
    rates = Rates()
    pending: list[tuple[int, dict]] = []

    # All are closed on the way out, an error's too: a checkpoint being written is completed.
    with (
        contextlib.closing(make_loader(config, stage, mesh)) as loader,
        Checkpointer(workdir / "checkpoints", keep=config.checkpoints_kept) as checkpointer,
        MetricWriter(workdir) as writer,
        Interrupts() as interrupts,
    ):
        if checkpointer.latest_step() is None:
            state = first_state(config, program)
        else:
            state, position, _ = checkpointer.restore(program.shapes, placement)
            if position:  # a run that `begin` wrote has read nothing yet
                loader.set_state(position)

        first = int(state.step)
        with Progress("training", total=config.num_steps, start=first) as progress:
            for step in range(first + 1, config.num_steps + 1):
                batch = loaders.to_global(next(loader), mesh)
                with sharding.use_mesh(mesh):
                    state, metrics = program.step(state, frozen, batch, seed_key)
                pending.append((step, metrics))
                stopping = interrupts.requested
                last = stopping or step == config.num_steps
                saving = last or step % config.checkpoint_every == 0
                # Fetched one step late, so that the device never waits for the log; but what is
                # saved has been found finite.
                ready = pending if saving else pending[:-1]
                if ready and (saving or step % config.log_every == 0):
                    values = average(ready)
                    values |= rates.update(
                        step,
                        rows=stage.rows(batch),
                        tokens=stage.tokens(batch),
                        flops=stage.flops(batch),
                    )
                    writer.write(ready[-1][0], values)
                    progress.update(step, loss=f"{values['train/loss']:.4f}")
                    pending = pending[len(ready) :]
                showing = config.sample_every and not stopping
                if showing and (last or step % config.sample_every == 0):
                    preview.write(stage, config, state.ema, frozen, batch, workdir, step=step)
                    plot_losses(workdir / "metrics.jsonl", workdir / "loss.png")
                if saving:
                    meta = {"config": config.to_json_best_effort(), "stage": config.stage}
                    checkpointer.save(step, state, data=loader.get_state(), meta=meta)
                if stopping:
                    checkpointer.wait()
                    raise KeyboardInterrupt(f"stopped at step {step}; the checkpoint is saved.")
    return workdir / "checkpoints"


def begin(config, workdir: str | Path, *, devices=None) -> Path:
    """Writes step 0 of a run, its weights those of `config.init_from`, for `train` to go on from.

    Returns:
      `workdir`.

    Raises:
      ValueError: for a config that cannot run, or a workdir that holds a run already.
    """
    workdir = Path(workdir)
    program = build(config, sharding.make_mesh(**config.mesh, devices=devices))
    if (workdir / "checkpoints").exists():
        raise ValueError(f"{workdir}: holds a training run already; name another folder.")
    state = first_state(config, program)
    with Checkpointer(workdir / "checkpoints", keep=config.checkpoints_kept) as checkpointer:
        meta = {"config": config.to_json_best_effort(), "stage": config.stage}
        checkpointer.save(0, state, data={}, meta=meta)
    return workdir


def first_state(config, program: Program) -> TrainState:
    """The state before the first step: drawn by `config.seed`, or from `config.init_from`."""
    make = jax.jit(program.init, out_shardings=program.placement, compiler_options=init_options())
    with sharding.use_mesh(program.mesh):
        state = make(jax.random.key(config.seed))
    return start_from(config, program, state)


def init_options() -> dict[str, int] | None:
    """XLA options for the program that makes the parameters and runs once.

    LLVM took 27 s of a core for a VAE's hundred initialisers, and takes 3 s at level 0.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def start_from(config, program: Program, state: TrainState) -> TrainState:
    """`state` with the weights of the inference folder `config.init_from`, if there is one."""
    if not config.init_from:
        return state
    from sora_jax.convert import folder

    stage, placement = program.stage, program.placement
    source = checkpoint_path(config.init_from)
    params = {
        name: folder.load_component(source, name, mesh=program.mesh)[2] for name in stage.components
    }
    wanted = _shapes({name: state.params[name] for name in stage.components})
    given = _shapes(params)
    differ = [path for path in given | wanted if given.get(path) != wanted.get(path)]
    if differ:
        path = differ[0]
        raise ValueError(
            f"config.init_from {config.init_from} has {path} as {given.get(path, 'nothing')}, "
            f"config.{stage.name} makes it {wanted.get(path, 'nothing')} ({len(differ)} arrays "
            "differ); make their sizes equal."
        )
    params = jax.device_put(params, {name: placement.params[name] for name in params})
    params = state.params | params  # a discriminator starts anew
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, params))


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def average(pending: list[tuple[int, dict]]) -> dict[str, float]:
    """Means over steps, NaN left out where a step has none (a bucket of t without examples).

    Raises:
      FloatingPointError: naming the first metric of train/ that is not finite, and its step.
    """
    rows = jax.device_get(pending)
    if not rows:
        return {}
    for step, metrics in rows:
        # The loss first: what else is not finite follows from it more often than not.
        for name in sorted(metrics, key=lambda name: name != "train/loss"):
            value = metrics[name]
            if name.startswith("train/") and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step}; lower config.optim.peak_lr and run again, "
                    "which goes on from the last checkpoint."
                )
    means = {}
    for name in rows[0][1]:
        values = [float(m[name]) for _, m in rows if not math.isnan(m[name])]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


class Interrupts:
    """Turns Ctrl-C and SIGTERM into a request that the loop honours after the current step.

    A second Ctrl-C stops at once, without a checkpoint.
    """

    def __init__(self):
        self.requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        # Elsewhere signals cannot be caught: the caller keeps its handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._request)
        return self

    def _request(self, *_) -> None:
        if self.requested:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is kept.")
        self.requested = True

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
