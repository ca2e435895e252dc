"""The compiled training step of a config on a mesh: `train` runs it, `plan` only compiles it.

With `abstract=True` no weights are read and nothing is allocated: VAE and frozen text encoder have
the shapes that `config.vae` and `config.text` say.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sora_jax import compile_options, sharding
from sora_jax.train import shown, storage
from sora_jax.train.dit_stage import DiTStage
from sora_jax.train.optimizer import OptimConfig, make_optimizer
from sora_jax.train.pictures import reads_latents
from sora_jax.train.state import TrainState, abstract_state, make_init
from sora_jax.train.step import make_train_step
from sora_jax.train.vae_stage import VAEStage

STAGES = {"vae": VAEStage, "dit": DiTStage}


class Program(NamedTuple):
    """What one step of a run is made of."""

    mesh: Mesh
    stage: Any
    init: Any  # key -> TrainState, not yet jitted
    shapes: TrainState  # of ShapeDtypeStructs
    placement: TrainState  # of shardings
    step: Any  # jitted (state, frozen, batch, seed_key) -> (state, metrics); donates the state


def build(config, mesh: Mesh, *, abstract: bool = False) -> Program:
    """The program of `config` on `mesh`.

    Raises:
      ValueError: for a config that cannot run.
    """
    check(config)
    check_batch(config, mesh)
    check_heads(config, mesh)
    optim = OptimConfig(**config.optim)
    stage = STAGES[config.stage](config, abstract=abstract)
    optimizer = storage.stored(make_optimizer(optim, config.num_steps), optim.moment_dtype)
    init = make_init(stage.init, optimizer, optim)
    shapes, placement = abstract_state(init, mesh, offload=optim.offload)
    step = jax.jit(
        make_train_step(stage.loss, optimizer, optim),
        donate_argnums=0,
        out_shardings=(placement, sharding.named(mesh)),
        compiler_options=compile_options.of_mesh(mesh),
    )
    return Program(mesh, stage, init, shapes, placement, step)


def abstract_arguments(program: Program, batch: dict[str, jax.ShapeDtypeStruct]) -> tuple:
    """(state, frozen, batch, seed_key) as ShapeDtypeStructs with shardings, for `step.lower`.

    Args:
      batch: as `abstract_batch` gives it.
    """
    mesh = program.mesh

    def placed(shapes, shardings):
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            shardings,
        )

    frozen = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), program.stage.frozen
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.named(mesh))
    rows = sharding.named(mesh, "batch")
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows)
        for name, leaf in batch.items()
    }
    frozen = placed(frozen, program.stage.frozen_shardings(mesh))
    return placed(program.shapes, program.placement), frozen, batch, key


def abstract_batch(config, stage, *, shards: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the largest batch that `config`'s loader gives `stage`, over all devices.

    Cached latents, pictures and embeddings where the config reads them (kind "latents", `cache`,
    `text_embeddings`).

    Args:
      shards: devices that rows are cut over, times `optim.accumulate`: buckets divide over them.
    """
    data, rows = config.data, config.batch_size
    array = jax.ShapeDtypeStruct
    if config.stage == "vae":
        return {"video": array((rows, data.frames, data.height, data.width, 3), jnp.uint8)}
    latent = stage.latent_shape(data.frames, data.height, data.width)
    packed = data.batching == "pack"
    if data.batching == "bucket":
        rows = max(1, data.bucket_tokens // stage.tokens_of(latent[:3]) // shards) * shards
    length = data.pack.text_tokens if packed else config.text_tokens
    if stage.text.is_cached:
        text = {"text_emb": array((rows, length, stage.text.config.width), jnp.bfloat16)}
    else:
        text = {"ids": array((rows, length), jnp.int32)}
    if packed:
        n, width = data.pack.tokens, math.prod(stage.dit_config.patch_size) * latent[-1]
        text |= _given(config, stage, rows, latent)
        return text | {
            "tokens": array((rows, n, width), jnp.float32),
            "positions": array((rows, n, 3), jnp.int32),
            "segment_ids": array((rows, n), jnp.int32),
            "text_of_tokens": array((rows, n), jnp.int32),
            "text_segment_ids": array((rows, length), jnp.int32),
            "text_positions": array((rows, length), jnp.int32),
        }
    if reads_latents(data):
        pixels = {"latents": array((rows, *latent), jnp.bfloat16)}
        pixels |= _given(config, stage, rows, latent)
    else:
        pixels = {"video": array((rows, data.frames, data.height, data.width, 3), jnp.uint8)}
    pictures = stage.pictures
    if pictures is not None and pictures.image_size is not None:
        size = pictures.image_size
        pixels["image"] = array((rows, pictures.pictures, size, size, 3), jnp.float32)
    return pixels | text | {"mask": array((rows, length), jnp.bool_)}


def _given(config, stage, rows: int, latent: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of cached pictures, for models that take any."""
    if stage.pictures is None:
        return {}
    dit, pack = stage.dit_config, config.data.pack
    channels = dit.in_channels - latent[-1]
    given, segments = (*latent[:-1], channels), ()
    if config.data.batching == "pack":
        given, segments = (pack.tokens, math.prod(dit.patch_size) * channels), (pack.max_segments,)
    shapes = {"given": given}
    if stage.image_rows:
        shapes["image_emb"] = (*segments, stage.image_rows, dit.image_dim)
    return {
        name: jax.ShapeDtypeStruct((rows, *shape), jnp.float32) for name, shape in shapes.items()
    }


def check(config) -> None:
    """Raises ValueError for settings that no stage can run with."""
    if config.stage not in STAGES:
        raise ValueError(f"config.stage {config.stage!r} is not one of {', '.join(STAGES)}.")
    for name in ("num_steps", "batch_size", "log_every", "checkpoint_every", "checkpoints_kept"):
        if config[name] < 1:
            raise ValueError(f"config.{name} {config[name]} must be 1 or more.")
    if config.sample_every < 0:
        raise ValueError(f"config.sample_every {config.sample_every} must be 0 (never) or more.")
    shown.of_config(config)


def check_batch(config, mesh: Mesh) -> None:
    """Raises ValueError unless every device gets the same number of clips of every micro-batch."""
    if config.data.get("batching") == "bucket":
        return  # the plan makes them divide
    parts = config.optim.accumulate * sharding.axis_size(mesh, "batch")
    if config.batch_size % parts:
        below = config.batch_size // parts * parts
        near = f"{below} or {below + parts}" if below else str(parts)
        raise ValueError(
            f"batch_size {config.batch_size} is not divisible by accumulate * data * fsdp = "
            f"{parts}; change config.batch_size to {near}, or config.mesh."
        )


def check_heads(config, mesh: Mesh) -> None:
    """Raises ValueError for heads that do not divide over `tensor`: every device had them all."""
    if config.stage != "dit":
        return
    heads, parts = config.dit.num_heads, mesh.shape["tensor"]
    if heads % parts:
        raise ValueError(
            f"dit.num_heads {heads} is not divisible by mesh.tensor {parts}; change "
            f"config.mesh.tensor to {sharding.near_divisors(heads, parts)}."
        )
