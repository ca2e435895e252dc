"""Keys and values of given tokens, kept from one evaluation of the transformer for others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sora_jax import sharding


class KV(NamedTuple):
    """Keys and values in heads, of one block or stacked for all of them."""

    keys: Float[Array, "*depth b s k e"]
    values: Float[Array, "*depth b s k e"]


class KVCache:
    """Of one evaluation while it is traced: what it takes, or what it stored.

    Given tokens stay what they are while the others are denoised, and what these see of them, keys
    and values in every block, changes only as far as they see these in turn. An evaluation that
    takes them from another works on the other tokens alone.

    Attributes:
      given: places of the tokens whose keys and values are kept, the same in all rows.
      rest: places of the other tokens.
      taken: of another evaluation with the same rows; None where this one stores its own.
      stored: its own.
    """

    def __init__(self, given: Int[Array, " g"], rest: Int[Array, " r"], *, taken: KV | None = None):
        self.given, self.rest, self.taken = given, rest, taken
        self.stored: KV | None = None

    def seen(self, kv: KV, *, dtype: str) -> KV:
        """What queries of one block see, of whose tokens `kv` are the keys and values."""
        if self.taken is None:
            kept = (part[:, self.given].astype(dtype) for part in kv)
            # Cut as tokens are, or every device that shares them would keep them all.
            self.stored = KV(
                *(sharding.constrain(part, "batch", "tokens", "act_heads", None) for part in kept)
            )
            return kv
        pairs = zip(self.taken, kv, strict=True)
        return KV(*(jnp.concatenate([old.astype(new.dtype), new], axis=1) for old, new in pairs))

    def of_block(self, taken: KV | None) -> "KVCache":
        return KVCache(self.given, self.rest, taken=taken)

    def of_rest(self, values: Shaped[Array, "b n *d"]) -> Shaped[Array, "b r *d"]:
        """Those of the tokens that an evaluation which takes keys and values works on."""
        return values[:, self.rest]

    def cut(self, of_worked: Float[Array, "b n d"]) -> Float[Array, "b r d"]:
        """Those of the rest, of what an evaluation made of all tokens that it worked on."""
        if self.taken is None:
            return self.of_rest(of_worked)
        return of_worked[:, : len(self.rest)]  # before those that fill up the sequence

    def spread(self, values: Float[Array, "b r d"]) -> Float[Array, "b n d"]:
        """`values` of the rest in their places among all tokens; 0 for those that are given."""
        count = len(self.given) + len(self.rest)
        empty = jnp.zeros((values.shape[0], count, values.shape[2]), values.dtype)
        return empty.at[:, self.rest].set(values)

    def ids(self, ids: jax.Array | None, given: jax.Array | None) -> jax.Array | None:
        """Segments of the keys that queries with segments `ids` see.

        Args:
          given: those of given tokens; None, they are of segment 0, as all but those that fill up
            a sequence.
        """
        if ids is None or self.taken is None:
            return ids
        if given is None:
            given = jnp.zeros((ids.shape[0], len(self.given)), ids.dtype)
        return jnp.concatenate([given, ids], axis=1)
