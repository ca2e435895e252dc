"""The transformers of a pipeline: one, or one for much noise and one for little (Wan 2.2 A14B)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from sora_jax import sharding


class Part:
    """A module of a checkpoint: its settings, its definition, the shapes of its parameters.

    The parameters themselves are read when they are first asked for, `before_reading` is called
    then if it is set.
    """

    before_reading: Callable[[], None] | None = None

    def __init__(self, config: Any, graphdef: Any, abstract: Any, read: Callable[[], Any]):
        self.config, self.graphdef, self.abstract = config, graphdef, abstract
        self._read, self._params = read, None

    @property
    def is_read(self) -> bool:
        return self._params is not None

    @property
    def params(self):
        if not self.is_read and self.before_reading is not None:
            self.before_reading()  # which may read this part, with others
        if not self.is_read:
            self._params = self._read()
        return self._params

    def module(self, params):
        return nnx.merge(self.graphdef, params)


class Experts:
    """Which transformer denoises at a time t, and its parameters on the device.

    Of two, the one that is not in use lies in the host's memory; they change places once a video.
    """

    def __init__(self, parts: Sequence[Part], boundary: float | None, *, mesh: Mesh | None = None):
        if len(parts) == 2 and parts[0].config != parts[1].config:
            raise ValueError(
                "transformer and transformer_2 have different sizes; two experts must agree, since "
                "one program runs both."
            )
        self.parts, self.boundary, self._mesh = tuple(parts), boundary, mesh
        self._placed: tuple[int, Any] | None = None

    @staticmethod
    def in_host_memory(read: Callable[[], Any]) -> Callable[[], Any]:
        """`read`, whose arrays stay with the host.

        Raises:
          ValueError: JAX was started without a CPU backend.
        """
        try:
            host = jax.local_devices(backend="cpu")[0]
        except RuntimeError as error:
            raise ValueError(
                "two transformers change places through the CPU's backend, which JAX_PLATFORMS "
                "leaves out; set it to cuda,cpu or tpu,cpu, or unset it."
            ) from error

        def read_there():
            with jax.default_device(host):
                return read()

        return read_there

    def at(self, t: float) -> int:
        """The number of the transformer for flow time `t`: 0 from the boundary on, 1 below it."""
        # Times are a multiple of 1/1000 in floating point: .9 must not fall below .9.
        below = self.boundary is not None and round(float(t) - self.boundary, 9) < 0
        return int(below)

    def placed(self, number: int) -> bool:
        """Whether transformer `number` lies on the device already."""
        return len(self.parts) == 1 or (self._placed is not None and self._placed[0] == number)

    def params(self, number: int):
        """Parameters of transformer `number`, on the mesh or the default device."""
        if len(self.parts) == 1:
            return self.parts[0].params
        if not self.placed(number):
            self._placed = None  # first out, then in: both may not fit
            part = self.parts[number]
            if self._mesh is None:
                params = jax.device_put(part.params, jax.local_devices()[0])
            else:
                where = sharding.tree_shardings(part.abstract, self._mesh)
                params = sharding.place(part.params, where)
            self._placed = (number, params)
        return self._placed[1]
