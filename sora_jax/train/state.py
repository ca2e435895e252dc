"""TrainState and its sharded creation; no update rule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sora_jax import sharding


class TrainState(NamedTuple):
    """Everything a step changes. Random keys are not part of it: they follow from the step."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def make_init(
    init_params: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation
) -> Callable[[jax.Array], TrainState]:
    def init(key: jax.Array) -> TrainState:
        params = init_params(key)
        # A copy, so that donation never sees one buffer twice.
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

    return init


def abstract_state(init: Callable[[jax.Array], TrainState], mesh: Mesh):
    """The state's shapes and its shardings on `mesh`, without allocating anything."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return shapes, sharding.tree_shardings(shapes, mesh)
