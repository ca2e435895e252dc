"""Which steps take keys and values of given tokens from one before, instead of computing them."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

from sora_jax.dit.kv_cache import KV, KVCache
from sora_jax.generate.request import Request


def check(request: Request, *, given: bool = True, tiles: bool = False) -> None:
    """Raises ValueError for a `kv_cache` where nothing could be kept.

    Args:
      given: some tokens of the video are.
      tiles: several windows, or parts of a large picture, are denoised together.
    """
    if request.kv_cache == 1:
        return
    if not given:
        raise ValueError(
            "kv_cache (--kv-cache) is for videos of which a part is given as clean tokens, and of "
            "this one none is; leave it out."
        )
    if tiles:
        raise ValueError(
            "kv_cache (--kv-cache) keeps what one window is given, and here several are "
            "denoised together; leave it out."
        )


class Taken(NamedTuple):
    """What a step needs to know of given tokens, as operands of its program.

    Attributes:
      given: places of tokens whose keys and values are kept, in raster order.
      rest: places of the others.
      kv: of the given tokens, from a step before; None where this one stores its own.
    """

    given: Int[np.ndarray, " g"] | Int[Array, " g"]
    rest: Int[np.ndarray, " r"] | Int[Array, " r"]
    kv: KV | None = None

    def cache(self) -> KVCache:
        return KVCache(self.given, self.rest, taken=self.kv)


class GivenKV:
    """Keys and values of given tokens from step to step of one video.

    Args:
      every: a step computes them, and the next `every - 1` take them; 1 never takes any.
      shards: that tokens are cut into, which must stay even.
    """

    def __init__(self, every: int, *, shards: int = 1):
        self._every, self._shards = every, shards
        self._places: Taken | None = None
        self._kv: KV | None = None
        self._age = 0

    def begin(self, keep: Bool[Array, "b f h w"] | None) -> None:
        """From now on these tokens are given; those that are so in all rows are kept."""
        self._places, self._kv = None, None
        if self._every == 1 or keep is None:
            return
        everywhere = np.asarray(keep).all(axis=0).reshape(-1)
        given = np.flatnonzero(everywhere)
        given = given[: len(given) // self._shards * self._shards]
        rest = np.setdiff1d(np.arange(len(everywhere)), given)
        if len(given) and len(rest):
            self._places = Taken(given.astype(np.int32), rest.astype(np.int32))

    def next(self, *, fresh: bool = False, runs: bool = True) -> Taken | None:
        """For the next step; None where it treats all tokens alike.

        Args:
          fresh: what was stored before is of no use to it.
          runs: it runs the transformer's blocks, so that it could store.
        """
        if self._places is None:
            return None
        if runs and (fresh or self._age == self._every):
            self._kv = None
        if self._kv is None:
            self._age = 0
        self._age += runs
        return self._places._replace(kv=self._kv)

    def store(self, kv: Any) -> None:
        """What the step gave back; None where it took them."""
        if kv is not None:
            self._kv = kv
