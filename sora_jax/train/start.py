"""The state that a run starts from: drawn anew, from given weights, or where it stood."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sora_jax import checkpoint_path, sharding
from sora_jax.checkpoint import Checkpointer
from sora_jax.train import startup
from sora_jax.train.local_checkpoint import LocalCheckpointer
from sora_jax.train.program import Program
from sora_jax.train.state import TrainState


class Start(NamedTuple):
    """Where a run begins or goes on."""

    state: TrainState
    position: dict[str, Any]  # of the loader; {} at the beginning
    skips: dict[str, Any] | None  # `Skips.get_state`, if there is one


def resume(
    config,
    program: Program,
    checkpointer: Checkpointer,
    local: LocalCheckpointer | None,
    *,
    workdir: Path,
) -> Start | None:
    """The newest of: the local copies, where all processes have them; the checkpoints; nothing.

    Raises:
      ValueError: the checkpoint is of another config, or all are damaged.
    """
    shapes, placement = program.shapes, program.placement
    try:
        shared, damaged = checkpointer.newest_sound(set_aside=True), None
    except ValueError as error:
        shared, damaged = None, error
    above = -1 if shared is None else shared
    nearer = None if local is None else local.newest(shapes, placement, above=above)
    if nearer is None and damaged is not None:
        raise damaged
    if nearer is not None:
        state, position, meta = local.restore(nearer, shapes, placement)
        startup.tell(f"going on from step {nearer}, of the hosts' own copies.")
    elif shared is not None:
        meta = checkpointer.read_meta(shared)
    else:
        return None
    changes = startup.check_same_run(config, meta["config"], workdir=workdir)
    if changes:
        startup.tell(f"going on with another config: {', '.join(changes)}.")
    if nearer is None:
        state, position, meta = checkpointer.restore(shapes, placement, step=shared)
    return Start(state, position, meta.get("skips"))


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
    opened = {
        name: folder.open_component(source, name, mesh=program.mesh) for name in stage.components
    }
    _check_fits(config, stage, opened, wanted={name: state.params[name] for name in opened})
    params = {name: part.load() for name, part in opened.items()}
    params = jax.device_put(params, {name: placement.params[name] for name in params})
    params = state.params | params  # a discriminator starts anew
    ema = jax.tree.map(jnp.copy, params) if jax.tree.leaves(state.ema) else state.ema
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True)
    stored = [leaf.astype(like.dtype) for leaf, like in leaves]  # as config.optim.param_dtype says
    return state._replace(params=jax.tree.unflatten(jax.tree.structure(params), stored), ema=ema)


def _check_fits(config, stage, opened, *, wanted) -> None:
    """Raises ValueError for weights of other shapes, or made for other settings."""
    from sora_jax.convert import rewrite

    given, made = _shapes({name: part.abstract for name, part in opened.items()}), _shapes(wanted)
    if differ := [path for path in given | made if given.get(path) != made.get(path)]:
        path = differ[0]
        raise ValueError(
            f"config.init_from {config.init_from} has {path} as {given.get(path, 'nothing')}, "
            f"config.{stage.name} makes it {made.get(path, 'nothing')} ({len(differ)} arrays "
            "differ); make their sizes equal."
        )
    for name, part in opened.items():
        theirs, ours = rewrite.settings(part.config), rewrite.settings(stage.config_of(name))
        for key in theirs:
            # A VAE that is trained measures its statistics anew.
            if theirs[key] != ours[key] and key not in rewrite.STATISTICS:
                raise ValueError(
                    f"config.init_from {config.init_from} was made with {name} {key} "
                    f"{theirs[key]}, config.{name}.{key} is {ours[key]}: the same weights would "
                    "compute something else; make them equal."
                )


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }
