"""What `sora-jax sample` runs, traced and compiled for one host: a denoising step, and decoding."""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax import compile_options, sharding
from sora_jax.diffusion import guidance, sampler, times
from sora_jax.generate import conditions
from sora_jax.generate.mesh import sampling_axes
from sora_jax.plan import count, steps
from sora_jax.plan.topology import Slice
from sora_jax.train import program


class _Host(NamedTuple):
    """A stage's models on the devices of a host, as `sample --mesh auto` places them."""

    stage: Any
    mesh: jax.sharding.Mesh
    parts: dict[str, Any]  # placed parameters: "dit", "vae", "text", "image"
    latent: tuple[int, ...]  # of one video


def _on_host(config: Any, host: Slice) -> _Host:
    stage = program.STAGES[config.stage](config, abstract=True)
    axes = sampling_axes(len(host.devices))
    mesh = sharding.make_mesh(fsdp=1, devices=list(host.devices), **axes)
    dtypes = dict.fromkeys(("dit", "text", "image"), config.dit.dtype) | {"vae": "float32"}
    shapes = {
        "dit": jax.eval_shape(lambda: stage.init(jax.random.key(0))["dit"]),
        "text": stage.text.abstract,
        "vae": stage.vae.abstract,
        "image": {} if stage.pictures is None else stage.pictures.abstract,
    }
    parts = {}
    for name, tree in shapes.items():
        tree = jax.tree.map(lambda p, d=dtypes[name]: jax.ShapeDtypeStruct(p.shape, d), tree)
        parts[name] = _placed(tree, sharding.tree_shardings(tree, mesh))
    data = config.data
    latent = stage.latent_shape(data.frames, data.height, data.width)
    return _Host(stage, mesh, parts, latent)


def denoise(config: Any, host: Slice) -> steps.Step:
    """One denoising step of one video, with both branches where `config.sample` has guidance.

    Weights of transformer and text encoder are in config.dit.dtype. A picture that the model
    takes is among the arguments; what encodes it is not.

    Raises:
      TooLarge: by how much.
    """
    begun = time.perf_counter()
    stage, mesh, parts, latent = _on_host(config, host)
    length = int(config.text_tokens)
    tokens = stage.tokens_of(latent[:3])
    shift = times.shift_for_tokens(tokens, stage.token_shift)
    table, told = times.schedule(config.sample.schedule, config.sample.steps, shift=float(shift))
    guide = guidance.of_config(config.sample)
    branches = 2 if guide.needs_uncond else 1
    if branches == 2:  # a step within its intervals, which takes most
        always = (0.0, 1.0)
        guide = dataclasses.replace(guide, interval=always, blocks_interval=always)

    def step(state, i, params, text, given):
        dit = nnx.merge(stage.dit_graphdef, params)
        velocity = conditions.conditioned(dit, text, given, guide=guide)
        guided = guidance.guided_velocity(velocity, config=guide)
        solver = sampler.make_solver(guided, table, solver=config.sample.solver, model_times=told)
        return solver.step(state, i)

    whole = sharding.named(mesh)
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)  # noqa: E731
    x = array(1, *latent)
    solver = sampler.make_solver(lambda x, t: x, table, solver=config.sample.solver)
    state = jax.eval_shape(solver.init, x)
    state = _placed(state, jax.tree.map(lambda _: whole, state))
    rows = (branches, length)
    text = conditions.Text(array(*rows, stage.text.config.width), array(*rows, dtype=jnp.bool_))
    given, shown = conditions.Conditions(), stage.pictures
    if shown is not None:
        extra = stage.dit_config.in_channels - latent[-1]
        features = None
        if stage.dit_config.image_dim is not None:
            features = array(1, stage.image_rows, stage.dit_config.image_dim)
        given = conditions.Conditions(array(1, *latent[:3], extra), features)
    arguments = (state, array(dtype=jnp.int32), parts["dit"], text, given)
    memory = _memory(parts, state, text, given)
    # The state is not given away: previews look at the latents before a step.
    jitted = jax.jit(step, compiler_options=compile_options.of_mesh(mesh))
    with sharding.use_mesh(mesh):
        traced = jitted.trace(*arguments)
        counts = count.of_jaxpr(traced.jaxpr.jaxpr)
        lowered = traced.lower()
    forwards = branches * sampler.num_evaluations(config.sample.solver, 1)
    one = steps.dit_flops(stage, tokens, length, image_rows=stage.image_rows)
    flops = {name: forwards * v for name, v in one.items()}
    return steps.compile_step(
        *("sample", mesh, lowered, host, memory, steps.device_bytes(state), counts, flops),
        *(branches * tokens, begun),
        beside=memory["frozen"],
    )


def decode(config: Any, host: Slice) -> steps.Step:
    """The VAE making frames of one video's latents.

    Raises:
      TooLarge: by how much.
    """
    begun = time.perf_counter()
    stage, mesh, parts, latent = _on_host(config, host)
    x = jax.ShapeDtypeStruct((1, *latent), jnp.float32, sharding=sharding.named(mesh))
    make = lambda params, x: nnx.merge(stage.vae.graphdef, params).decode(x)  # noqa: E731
    jitted = jax.jit(make, compiler_options=compile_options.of_mesh(mesh))
    memory = _memory(parts, x)
    with sharding.use_mesh(mesh):
        traced = jitted.trace(parts["vae"], x)
        counts = count.of_jaxpr(traced.jaxpr.jaxpr)
        lowered = traced.lower()
    flops = {"VAE": decode_flops(config)}
    beside = memory["weights"] + steps.device_bytes((parts["text"], parts["image"]))
    return steps.compile_step(
        *("decode", mesh, lowered, host, memory, 0.0, counts, flops),
        *(stage.tokens_of(latent[:3]), begun),
        beside=beside,
    )


def decode_flops(config: Any) -> float:
    """Of the VAE making one video of `config.data`'s size; counted, not compiled."""
    stage = program.STAGES[config.stage](config, abstract=True)
    latent = stage.latent_shape(config.data.frames, config.data.height, config.data.width)
    vae, x = stage.vae, jax.ShapeDtypeStruct((1, *latent), jnp.float32)
    make = lambda params, x: nnx.merge(vae.graphdef, params).decode(x)  # noqa: E731
    return float(sum(count.of_function(make, vae.abstract, x).values()))


def _memory(parts: dict[str, Any], *batch: Any) -> dict[str, float]:
    """Bytes of one device by kind; frozen are the VAE and the encoders, as in training."""
    frozen = (parts["vae"], parts["text"], parts["image"])
    return {
        "weights": steps.device_bytes(parts["dit"]),
        "frozen": steps.device_bytes(frozen),
        "batch": steps.device_bytes(batch),
    }


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )
