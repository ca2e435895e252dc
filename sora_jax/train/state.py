"""TrainState and its sharded creation; no update rule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sora_jax import sharding
from sora_jax.train.optimizer import OptimConfig
from sora_jax.train.storage import store_parameters


class TrainState(NamedTuple):
    """Everything a step changes. Random keys are not part of it: they follow from the step."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any  # in float32; () without an average

    @property
    def averaged(self):
        """The parameters to show and to export."""
        return self.ema if jax.tree.leaves(self.ema) else self.params


def make_init(
    init_params: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    config: OptimConfig | None = None,
) -> Callable[[jax.Array], TrainState]:
    """Makes the first state from a key; `config` says what it holds, and in which precision."""

    def init(key: jax.Array) -> TrainState:
        drawn = init_params(key)
        params = drawn if config is None else store_parameters(drawn, config.param_dtype)
        # A copy, so that donation never sees one buffer twice.
        ema = () if config is not None and not config.ema_decay else jax.tree.map(jnp.copy, drawn)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

    return init


def abstract_state(
    init: Callable[[jax.Array], TrainState], mesh: Mesh, *, offload: bool = False
) -> tuple[TrainState, TrainState]:
    """The state's shapes and its shardings on `mesh`, without allocating anything.

    Args:
      offload: moments of the optimizer lie in the hosts' memory.
    """
    shapes = jax.eval_shape(init, jax.random.key(0))
    placement = sharding.tree_shardings(shapes, mesh)
    if offload:
        placement = placement._replace(
            opt_state=sharding.in_host_memory(placement.opt_state, shapes.opt_state)
        )
    return shapes, placement
