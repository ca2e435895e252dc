"""How the state of training is stored between steps: in fewer bits, or in the host's memory."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sora_jax.train.optimizer import decays


def store_parameters(params, dtype: str):
    """Matrices and kernels in `dtype`; norms, biases and tables of modulation stay float32."""
    if dtype == "float32":
        return params
    return jax.tree.map(lambda x, cast: x.astype(dtype) if cast else x, params, decays(params))


def add_updates(params, updates, keys: Sequence[jax.Array] | jax.Array):
    """params + updates; bfloat16 parameters are rounded at random, up or down, without bias.

    Rounded to nearest, they would never move by less than 1/256 of themselves (Gupta et al. 2015,
    arXiv:1502.02551, section 3.1).

    Args:
      keys: one for every parameter.
    """
    leaves, structure = jax.tree.flatten(params)
    new = []
    for leaf, update, leaf_key in zip(leaves, jax.tree.leaves(updates), keys, strict=True):
        exact = leaf.astype(jnp.float32) + update.astype(jnp.float32)
        new.append(
            round_at_random(exact, leaf_key)
            if leaf.dtype == jnp.bfloat16
            else exact.astype(leaf.dtype)
        )
    return jax.tree.unflatten(structure, new)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of its two bfloat16 neighbours, the nearer one the more likely."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # The noise carries into the upper half with the probability that the lower half says.
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def on_device(tree):
    """Arrays of a traced step that come from the host's memory."""
    return jax.device_put(tree, jax.memory.Space.Device)


def on_host(tree):
    """Arrays of a traced step that go to the host's memory; scalars stay."""
    move = lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x  # noqa: E731
    return jax.tree.map(move, tree)


# (gradients, optimizer's state, parameters, keys) -> (parameters, state) of a part of the model
Update = Callable[[Any, Any, Any, Sequence[jax.Array] | jax.Array], tuple[Any, Any]]


def in_turn(update: Update, clip: Callable[[Any], Any], grads, opt_state, params, keys: jax.Array):
    """`update` of a state in the host's memory, one parameter after the other.

    The moments of a parameter are fetched when the one before is updated: on the device there are
    those of one or two, not of all. For updates that treat every parameter alone; of others (the
    parts of the state do not have the parameters' structure) all is fetched at once.

    Args:
      update: called with lists of one parameter's, or with everything.
      clip: of all gradients, what `update` would do to each by the norm of all: done before it
        sees one alone.
      keys: one for every parameter.
    """
    structure = jax.tree.structure(params)
    like_params = lambda node: jax.tree.structure(node) == structure  # noqa: E731
    parts, around = jax.tree.flatten(opt_state, is_leaf=like_params)
    if not any(like_params(part) for part in parts):
        return update(grads, on_device(opt_state), params, keys)
    leaves, of_leaves = _variables(params)
    clipped = clip(grads)
    rows = [_variables(part)[0] if like_params(part) else None for part in parts]
    new_leaves, new_rows, new_alone, before = [], [[] for _ in parts], {}, ()
    for i, (leaf, grad) in enumerate(zip(leaves, _variables(grads)[0], strict=True)):
        own = [part if row is None else [row[i]] for part, row in zip(parts, rows, strict=True)]
        # The gradient too: made float32 for all, it would take twice what all gradients do.
        own, grad, before = jax.lax.optimization_barrier((own, grad, before))
        state = on_device(jax.tree.unflatten(around, own))
        (new,), state = update([clipped(grad)], state, [leaf], keys[i : i + 1])
        state = on_host(state)
        before = new, state
        new_leaves.append(new)
        made = jax.tree.flatten(state, is_leaf=lambda node: isinstance(node, list))[0]
        for number, (part, row) in enumerate(zip(made, rows, strict=True)):
            if row is None:
                new_alone[number] = part  # counts, which every parameter's update gives alike
            else:
                new_rows[number].append(part[0])
    whole = [
        new_alone[number] if row is None else jax.tree.unflatten(_variables(part)[1], new)
        for number, (part, row, new) in enumerate(zip(parts, rows, new_rows, strict=True))
    ]
    return jax.tree.unflatten(of_leaves, new_leaves), jax.tree.unflatten(around, whole)


def _variables(tree):
    return jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def stored(optimizer: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`optimizer`, computing in float32, with its moments kept in `dtype`."""
    if dtype == "float32":
        return optimizer

    def cast(tree, to: str):
        def one(x):
            return x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim else x

        return jax.tree.map(one, tree)

    def init(params):
        return cast(optimizer.init(cast(params, "float32")), dtype)

    def update(updates, state, params=None):
        updates, params = cast(updates, "float32"), cast(params, "float32")
        updates, state = optimizer.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
