"""The pure training step: gradients, update or skip, EMA; no jit, no input or output."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sora_jax.train.optimizer import OptimConfig, hold
from sora_jax.train.state import TrainState
from sora_jax.train.storage import add_updates, in_turn

# (params, frozen, batch, key) -> (scalar loss, metrics)
LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, config: OptimConfig):
    """Returns train_step(state, frozen, batch, seed_key, limit=inf) -> (state, metrics).

    Where the loss or the gradient's norm is not finite, or the norm is above `limit`, nothing but
    the step count changes, and "train/skipped" is 1 instead of 0. The step's randomness is
    fold_in(seed_key, step), so any step replays alone. With `accumulate` > 1 the batch is cut into
    micro-batches and their gradients averaged.
    """

    def trained_loss(params, *args):
        return loss_fn(hold(params, config.freeze), *args)

    value_and_grad = jax.value_and_grad(trained_loss, has_aux=True)

    def gradients(params, frozen, batch, key):
        if config.accumulate == 1:
            return value_and_grad(params, frozen, batch, key)
        # Strided, so that every device keeps its own rows.
        micro = jax.tree.map(
            lambda x: x.reshape(-1, config.accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        keys = jax.random.split(key, config.accumulate)

        def body(total, inputs):
            (loss, metrics), grads = value_and_grad(params, frozen, *inputs)
            return jax.tree.map(jnp.add, total, (loss, grads)), metrics

        zeros = (jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros(x.shape), params))
        total, metrics = jax.lax.scan(body, zeros, (micro, keys))
        loss, grads = jax.tree.map(lambda x: x / config.accumulate, total)
        # A bucket of t without examples is NaN in some micro-batches; the loss is never left out.
        return (loss, jax.tree.map(lambda x: jnp.nanmean(x, axis=0), metrics)), grads

    def train_step(
        state: TrainState, frozen, batch, seed_key: jax.Array, limit: jax.Array | float = math.inf
    ):
        key = jax.random.fold_in(seed_key, state.step)
        (loss, metrics), grads = gradients(state.params, frozen, batch, key)
        norm = optax.tree.norm(grads)
        sound = jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= limit)

        def kept(new, old):
            return jax.tree.map(lambda x, y: jnp.where(sound, x, y), new, old)

        def update(grads, opt_state, params, keys):
            updates, new = optimizer.update(grads, opt_state, params)
            return kept(add_updates(params, updates, keys), params), kept(new, opt_state)

        keys = jax.random.split(jax.random.fold_in(key, 1), len(jax.tree.leaves(state.params)))
        parts = grads, state.opt_state, state.params, keys
        clipped = functools.partial(clip, most=config.grad_clip)
        params, opt_state = in_turn(update, clipped, *parts) if config.offload else update(*parts)
        # Early averages would remember the initial weights: let the window grow with the step.
        decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
        averaged = params if config.ema_decay else ()
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, averaged)
        metrics = metrics | {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/param_norm": optax.tree.norm(params),
            "train/skipped": 1.0 - sound,
        }
        metrics |= group_norms("grad_norm", grads) | group_norms("param_norm", params)
        return TrainState(state.step + 1, params, opt_state, kept(ema, state.ema)), metrics

    return train_step


def clip(grads, most: float) -> Callable[[Any], Any]:
    """What makes a part of `grads` float32, and the norm of all at most `most`.

    As `optax.clip_by_global_norm` of all of them does it, to the bit.
    """
    exact = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    norm = optax.tree.norm(exact(grads))

    def clipped(part):
        return jax.tree.map(lambda x: jnp.where(norm < most, x, x / norm * most), exact(part))

    return clipped


def group_norms(name: str, tree) -> dict[str, jax.Array]:
    """Norms by module: the two top levels of a path, such as "grad_norm/dit/blocks"."""
    groups: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        groups.setdefault("/".join([name, *parts[:2]]), []).append(leaf)
    return {group: optax.tree.norm(leaves) for group, leaves in groups.items()}
