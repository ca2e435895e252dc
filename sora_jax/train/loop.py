"""train(config, workdir) owns the order of a run; no maths, and the mechanisms stand elsewhere.

Hosts compared, program, loader, room, state; then for every step: batch, step, log, preview, save.
"""

import contextlib
import functools
import json
import time
from pathlib import Path

import jax

from sora_jax import agreement, sharding
from sora_jax.agreement import Flags
from sora_jax.checkpoint import Checkpointer
from sora_jax.data import loader as loaders
from sora_jax.progress import Progress
from sora_jax.train import interrupts, local_checkpoint, preview, startup
from sora_jax.train.batches import make_loader
from sora_jax.train.goodput import Goodput
from sora_jax.train.local_checkpoint import LocalCheckpointer
from sora_jax.train.metrics import MetricWriter, Rates, plot_losses
from sora_jax.train.program import Program, build
from sora_jax.train.skips import SkipConfig, Skips
from sora_jax.train.start import Start, first_state, resume
from sora_jax.train.trace import Tracer
from sora_jax.train.watchdog import PATIENCE, Watchdog
from sora_jax.train.window import Window


def train(config, workdir: str | Path, *, devices=None) -> Path:
    """Trains `config` until `num_steps`, resuming from `workdir` if it holds a checkpoint.

    Args:
      config: a ConfigDict as configs/base.py makes it.
      devices: those the mesh is made of; None takes all.

    Returns:
      The folder of training checkpoints.

    Raises:
      ValueError: for a config that cannot run, or that is not the one of the checkpoint; hosts
        that differ; no permission or room in `workdir`.
      FloatingPointError: loss or gradient are not finite more often than config.skip allows; names
        metric, step and the records of the batch.
      KeyboardInterrupt: after Ctrl-C (SIGTERM: Preempted), when the checkpoint is saved; in all
        processes at the same step, whichever was signalled.
    """
    workdir = startup.folder(workdir)
    clock = Goodput(workdir / "goodput.json")
    # What is opened is closed on the way out, an error's too: a checkpoint under way is completed.
    with contextlib.ExitStack() as opened:
        with clock.phase("init"):
            startup.check_settings(config)
            startup.check_hosts(config)
            mesh = sharding.make_mesh(**config.mesh, devices=devices)
            program = build(config, mesh)
            stage = program.stage
            skips = Skips(skip_config(config), file=workdir / "skipped.jsonl")
            loader = opened.enter_context(contextlib.closing(make_loader(config, stage, mesh)))
            check_room(config, workdir, program)
            opened.enter_context(startup.alone(workdir))
            startup.log_apart(workdir)
            run_id = startup.run_id(workdir)
            opened.callback(clock.write)
            opened.callback(loader.close)  # before the clock is read: it waits for reads under way
            writer = opened.enter_context(make_writer(config, workdir, run_id))
            checkpointer = opened.enter_context(make_checkpointer(config, workdir))
            local = make_local(config, run_id)
            if local is not None:
                opened.enter_context(local)
            frozen = stage.place_frozen(mesh)
            seed_key = jax.jit(jax.random.key, out_shardings=sharding.named(mesh))(config.seed + 1)
            with clock.phase("restore"):
                found = resume(config, program, checkpointer, local, workdir=workdir)
            state, position, counted = found or Start(first_state(config, program), {}, None)
            if position:
                loader.set_state(position)
            if counted:
                skips.set_state(counted)
            flags = Flags(mesh, 2)

        first = int(state.step)
        clock.resumed(first)
        hang = workdir / f"hang-{jax.process_index()}.txt"
        # `get`: the configs of earlier runs lack these keys.
        watchdog = opened.enter_context(Watchdog(config.get("watchdog_minutes", 0), hang))
        profile = config.get("profile") or {}
        tracer = opened.enter_context(Tracer(workdir, profile.get("steps", ())))
        signals = opened.enter_context(interrupts.Interrupts())
        progress = Progress("training", total=config.num_steps, start=first)
        opened.enter_context(progress)
        rates, window = Rates(), Window(skips)
        compiled: set = set()  # shapes of batches
        traced = 0

        for step in range(first + 1, config.num_steps + 1):
            asked = time.perf_counter()
            with clock.phase("data"):
                batch = loaders.to_global(next(loader), mesh)
            waited = time.perf_counter() - asked
            window.batch(waited)
            if window.busy:  # the devices did not wait
                clock.move(waited, source="data", target="step")

            shapes = tuple((name, value.shape) for name, value in sorted(batch.items()))
            if shapes not in compiled:
                window.finish(step - 1)
            tracer.before(step, asked=traced)
            limit = skips.limit(step)
            bounds = () if limit is None else (limit,)
            phase = "step" if shapes in compiled else "compile"
            with clock.phase(phase), sharding.use_mesh(mesh):
                state, metrics = program.step(state, frozen, batch, seed_key, *bounds)
            compiled.add(shapes)
            window.started(
                step, metrics, records=functools.partial(loader.records, loader.batches_read - 1)
            )

            with clock.phase("step"):
                stopping, traced = flags.exchange(signals.requested, tracer.asked)
            last = stopping or step == config.num_steps
            saving = last or step % config.checkpoint_every == 0
            showing = config.sample_every and not stopping
            showing = showing and (last or step % config.sample_every == 0)
            copying = local is not None and step % config.local_checkpoint_every == 0
            # One step late, so that the devices never wait for the log; but what is saved has been
            # found finite.
            with clock.phase("step"):
                window.finish(step if saving or showing or copying else step - 1)
            clock.finished(step)
            watchdog.beat(allow=PATIENCE if showing or saving else 1)

            if saving or step % config.log_every == 0:
                row = window.take(step if saving else step - 1)
                if row is not None:
                    logged, values = row
                    values |= rates.update(
                        step,
                        rows=stage.rows(batch),
                        tokens=stage.tokens(batch),
                        flops=stage.flops(batch),
                    )
                    writer.write(logged, values)
                    writer.write_hosts(logged, window.hosts)
                    progress.update(step, loss=f"{values['train/loss']:.4f}")
                clock.write()
            if saving or copying:
                place = {"data": loader.get_state(), "meta": meta_of(config, skips)}
                with clock.phase("save"):
                    if saving:
                        checkpointer.save(step, state, **place, loss=window.loss_since_save())
                        clock.saved(step)
                    else:
                        local.save(step, state, **place)
            if showing:  # behind what is saved, which nothing that is shown may cost
                with clock.phase("preview"):
                    preview.write(stage, config, state.averaged, frozen, batch, workdir, step=step)
                    plot_losses(workdir / "metrics.jsonl", workdir / "loss.png")
            if last:
                with clock.phase("save"):
                    checkpointer.wait()
                    agreement.meet("saved", wait=3600.0)  # while the first process hashes
                startup.tell(clock.line())
            if stopping:
                raise interrupts.end(stopping, step)
    return workdir / "checkpoints"


def begin(config, workdir: str | Path, *, devices=None) -> Path:
    """Writes step 0 of a run, its weights those of `config.init_from`, for `train` to go on from.

    Returns:
      `workdir`.

    Raises:
      ValueError: for a config that cannot run, or a workdir that holds a run already.
    """
    workdir = startup.folder(workdir)
    program = build(config, sharding.make_mesh(**config.mesh, devices=devices))
    if (workdir / "checkpoints").exists():
        raise ValueError(f"{workdir}: holds a training run already; name another folder.")
    state = first_state(config, program)
    with make_checkpointer(config, workdir) as checkpointer:
        checkpointer.save(0, state, data={}, meta=meta_of(config, Skips(skip_config(config))))
    return workdir


def meta_of(config, skips: Skips) -> dict:
    """What a checkpoint tells of its run."""
    return {
        "config": config.to_json_best_effort(),
        "stage": config.stage,
        "skips": skips.get_state(),
    }


# `get` below: the configs of earlier runs lack these keys.


def skip_config(config) -> SkipConfig:
    return SkipConfig(**(config.get("skip") or {}))


def make_checkpointer(config, workdir: Path) -> Checkpointer:
    return Checkpointer(
        workdir / "checkpoints",
        keep=config.checkpoints_kept,
        keep_every=config.get("checkpoint_every_kept", 0),
        keep_best=config.get("checkpoint_best", 0),
    )


def make_local(config, run_id: str) -> LocalCheckpointer | None:
    folder = config.get("local_checkpoint_dir", "")
    return LocalCheckpointer(Path(folder), run=run_id) if folder else None


def make_writer(config, workdir: Path, run_id: str) -> MetricWriter:
    return MetricWriter(
        workdir,
        wandb_project=config.get("wandb_project", ""),
        run_id=run_id,
        config=startup.flat_config(json.loads(config.to_json_best_effort())),
    )


def check_room(config, workdir: Path, program: Program) -> None:
    """Raises ValueError where checkpoints would find no room or no permission."""
    whole, mine = startup.state_bytes(program.shapes, program.placement)
    startup.check_room(workdir / "checkpoints", whole, key="--workdir")
    if folder := config.get("local_checkpoint_dir", ""):
        key, room = "config.local_checkpoint_dir", local_checkpoint.ROOM
        folder = startup.folder(folder, key=key)
        kept = local_checkpoint.folder_of(folder)
        startup.check_room(folder, mine, key=key, room=room, kept=kept, everywhere=True)
