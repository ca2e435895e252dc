"""How the state of training is stored between steps: in fewer bits, or in the host's memory."""

import jax
import jax.numpy as jnp
import optax

from sora_jax.train.optimizer import decays


def store_parameters(params, dtype: str):
    """Matrices and kernels in `dtype`; norms, biases and tables of modulation stay float32."""
    if dtype == "float32":
        return params
    return jax.tree.map(lambda x, cast: x.astype(dtype) if cast else x, params, decays(params))


def add_updates(params, updates, key: jax.Array):
    """params + updates; bfloat16 parameters are rounded at random, up or down, without bias.

    Rounded to nearest, they would never move by less than 1/256 of themselves (Gupta et al. 2015,
    arXiv:1502.02551, section 3.1).
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
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
