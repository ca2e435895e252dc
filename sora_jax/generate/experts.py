"""The transformers of a pipeline: one, or one for much noise and one for little (Wan 2.2 A14B)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx


class Part(NamedTuple):
    """A loaded module: its settings, its definition and its parameters."""

    config: Any
    graphdef: Any
    params: Any

    def module(self, params):
        return nnx.merge(self.graphdef, params)


class Experts:
    """Which transformer denoises at a time t, and its parameters on the device.

    Of two, the one that is not in use lies in the host's memory; they change places once a video.
    """

    def __init__(self, parts: Sequence[Part], boundary: float | None):
        if len(parts) == 2 and parts[0].config != parts[1].config:
            raise ValueError(
                "transformer and transformer_2 have different sizes; two experts must agree, since "
                "one program runs both."
            )
        self.parts, self.boundary = tuple(parts), boundary
        self._placed: tuple[int, Any] | None = None

    @classmethod
    def load(
        cls, names: Sequence[str], load: Callable[[str], Part], boundary: float | None
    ) -> "Experts":
        """Loads one straight to the device, two into the host's memory."""
        if len(names) == 1:
            return cls([load(names[0])], None)
        try:
            host = jax.local_devices(backend="cpu")[0]
        except RuntimeError as error:
            raise ValueError(
                "two transformers change places through the CPU's backend, which JAX_PLATFORMS "
                "leaves out; set it to cuda,cpu or tpu,cpu, or unset it."
            ) from error
        with jax.default_device(host):
            return cls([load(name) for name in names], boundary)

    def at(self, t: float) -> int:
        """The number of the transformer for flow time `t`: 0 from the boundary on, 1 below it."""
        # Times are a multiple of 1/1000 in floating point: .9 must not fall below .9.
        below = self.boundary is not None and round(float(t) - self.boundary, 9) < 0
        return int(below)

    def placed(self, number: int) -> bool:
        """Whether transformer `number` lies on the device already."""
        return len(self.parts) == 1 or (self._placed is not None and self._placed[0] == number)

    def params(self, number: int):
        """Parameters of transformer `number`, on the default device."""
        if len(self.parts) == 1:
            return self.parts[0].params
        if not self.placed(number):
            self._placed = None  # first out, then in: both may not fit
            self._placed = (number, jax.device_put(self.parts[number].params, jax.devices()[0]))
        return self._placed[1]
