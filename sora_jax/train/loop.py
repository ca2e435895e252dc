"""train(config, workdir): jits the steps and owns their order; no maths.

Mesh, stage, loader, state, restore; then for every step: batch, step, log, preview, save.
"""

import math
import signal
from pathlib import Path

import jax
import jax.numpy as jnp

from sora_jax import sharding
from sora_jax.checkpoint import Checkpointer
from sora_jax.data import loader as loaders
from sora_jax.data import sources, transforms
from sora_jax.train import latent_cache, preview
from sora_jax.train.dit_stage import DiTStage
from sora_jax.train.metrics import MetricWriter, Rates, plot_losses
from sora_jax.train.optimizer import OptimConfig, make_optimizer
from sora_jax.train.progress import Progress
from sora_jax.train.state import abstract_state, make_init
from sora_jax.train.step import make_train_step
from sora_jax.train.vae_stage import VAEStage

STAGES = {"vae": VAEStage, "dit": DiTStage}


def train(config, workdir: str | Path) -> Path:
    """Trains `config` until `num_steps`, resuming from `workdir` if it holds a checkpoint.

    Args:
      config: a ConfigDict as configs/base.py makes it.

    Returns:
      The folder of training checkpoints.

    Raises:
      ValueError: for a config that cannot run.
      FloatingPointError: the loss or gradient is not finite; names metric and step.
    """
    workdir = Path(workdir)
    check(config)
    mesh = sharding.make_mesh(**config.mesh)
    stage = STAGES[config.stage](config)
    loader = make_loader(config, stage, mesh)

    optim = OptimConfig(**config.optim)
    optimizer = make_optimizer(optim, config.num_steps)
    init = make_init(stage.init, optimizer)
    shapes, placement = abstract_state(init, mesh)
    replicated = sharding.named(mesh)
    frozen = jax.device_put(stage.frozen, replicated)
    train_step = jax.jit(
        make_train_step(stage.loss, optimizer, optim),
        donate_argnums=0,
        out_shardings=(placement, replicated),
    )

    checkpointer = Checkpointer(workdir / "checkpoints", keep=config.checkpoints_kept)
    if checkpointer.latest_step() is None:
        with sharding.use_mesh(mesh):
            state = jax.jit(init, out_shardings=placement)(jax.random.key(config.seed))
        state = start_from(config, stage, state, placement)
    else:
        state, position, _ = checkpointer.restore(shapes, placement)
        loader.set_state(position)

    first = int(state.step)
    writer = MetricWriter(workdir)
    rates = Rates()
    seed_key = jax.device_put(jax.random.key(config.seed + 1), replicated)
    pending: list[tuple[int, dict]] = []

    def save(step: int) -> None:
        meta = {"config": config.to_json_best_effort(), "stage": config.stage}
        checkpointer.save(step, state, data=loader.get_state(), meta=meta)

    with (
        Interrupts() as interrupts,
        Progress("training", total=config.num_steps, start=first) as progress,
    ):
        for step in range(first + 1, config.num_steps + 1):
            batch = loaders.to_global(next(loader), mesh)
            with sharding.use_mesh(mesh):
                state, metrics = train_step(state, frozen, batch, seed_key)
            pending.append((step, metrics))
            last = step == config.num_steps or interrupts.requested
            saving = last or step % config.checkpoint_every == 0
            if saving or step % config.log_every == 0:
                # Fetched one step late, so that the device never waits for the log; but what is
                # saved has been found finite.
                late = 0 if saving else 1
                ready, pending = pending[: len(pending) - late], pending[len(pending) - late :]
                values = average(ready)
                values |= rates.update(step, clips=config.batch_size, flops=stage.flops(batch))
                writer.write(step, values)
                progress.update(step, loss=f"{values.get('train/loss', math.nan):.4f}")
            if config.sample_every and (step % config.sample_every == 0 or last):
                preview.write(stage, config, state.ema, frozen, batch, workdir, step=step)
                plot_losses(workdir / "metrics.jsonl", workdir / "loss.png")
            if saving:
                save(step)
            if last:
                break
    checkpointer.wait()
    checkpointer.close()
    writer.close()
    if interrupts.requested:
        raise KeyboardInterrupt(f"stopped at step {int(state.step)}; the checkpoint is saved.")
    return workdir / "checkpoints"


def check(config) -> None:
    """Raises ValueError for settings that no stage can run with."""
    if config.stage not in STAGES:
        raise ValueError(f"config.stage {config.stage!r} is not one of {', '.join(STAGES)}.")
    shards = math.prod(
        n for name in ("data", "fsdp") if (n := config.mesh[name]) > 0
    )
    if config.mesh.fsdp == -1:
        shards = jax.device_count() // (config.mesh.tensor * config.mesh.context)
    micro, rest = divmod(config.batch_size, config.optim.accumulate)
    if rest or micro % max(shards, 1):
        raise ValueError(
            f"batch_size {config.batch_size} is not divisible by accumulate * data * fsdp = "
            f"{config.optim.accumulate * shards}; change config.batch_size or config.mesh."
        )


def make_loader(config, stage, mesh):
    """The grain loader of `config`'s source, or of its latent cache."""
    source = sources.make_source(config.data)
    steps = [transforms.HorizontalFlip()] if config.data.flip else []
    if config.data.cache and config.stage == "dit":
        source = latent_cache.build(
            source, config.vae_checkpoint, config.data.cache, clips=config.data.cache_clips
        )
        steps = [latent_cache.PickCaption()]
    return loaders.make_loader(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        transforms=[*steps, stage.prepare],
        num_threads=config.data.threads,
        num_workers=config.data.workers,
        mesh=mesh,
    )


def start_from(config, stage, state, placement):
    """`state` with the weights of the inference folder `config.init_from`, if there is one."""
    if not config.init_from:
        return state
    from sora_jax.convert import folder

    params = {
        name: folder.load_component(Path(config.init_from), name)[2] for name in stage.components
    }
    same = jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, state.params)
    if not same:
        raise ValueError(
            f"config.init_from {config.init_from}: its sizes differ from config.{stage.name}; "
            "make them equal."
        )
    params = jax.device_put(params, placement.params)
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, params))


def average(pending: list[tuple[int, dict]]) -> dict[str, float]:
    """Means over steps, NaN left out where a step has none (a bucket of t without examples).

    Raises:
      FloatingPointError: naming the first metric of train/ that is not finite, and its step.
    """
    rows = jax.device_get(pending)
    if not rows:
        return {}
    for step, metrics in rows:
        for name, value in metrics.items():
            if name.startswith("train/") and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step}; lower config.optim.peak_lr, or resume "
                    "from the last checkpoint with another config.seed."
                )
    names = rows[0][1]
    means = {}
    for name in names:
        values = [float(m[name]) for _, m in rows if not math.isnan(m[name])]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


class Interrupts:
    """Turns Ctrl-C and SIGTERM into a request that the loop honours after the current step."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        def request(*_):
            self.requested = True

        self._old = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, request)
            except ValueError:  # not the main thread: the caller keeps its handlers
                return self
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)
