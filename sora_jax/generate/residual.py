"""What the transformer's blocks add to the embedded tokens, kept from one step for others."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sora_jax import sharding


class Residual:
    """Of one evaluation while it is traced: given in place of the blocks, or stored by them."""

    def __init__(self, given: jax.Array | None = None):
        self.given = given
        self.stored: jax.Array | None = None

    def around(self, x: jax.Array, blocks: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The `around` of a `DiT`."""
        if self.given is not None:
            spare = x.shape[1] - self.given.shape[1]  # tokens that fill up the sequence
            return x + jnp.pad(self.given, ((0, 0), (0, spare), (0, 0)))
        y = blocks(x)
        self.stored = sharding.constrain(y - x, "batch", "tokens", "act_embed")
        return y
