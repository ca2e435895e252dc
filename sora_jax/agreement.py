"""What the processes of a run tell each other: JSON now and then, flags along with every step.

With one process nothing is sent. With several, all must make the same calls in the same order.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sora_jax import sharding

_LAST_WORDS = "sora_jax/last_words"


def gather(value: Any) -> list:
    """`value`, which JSON can hold, of every process, in the order of their numbers."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size], np.int32)).reshape(-1)
    # To a power of two, so that few shapes are compiled for.
    padded = np.zeros(1 << max(8, int(max(sizes) - 1).bit_length()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def of_first(value: Any) -> Any:
    """The `value` of process 0, in all."""
    return gather(value if jax.process_index() == 0 else None)[0]


def last_words(text: str, *, wait: float = 10.0) -> str:
    """What this process prints where it ends with the error `text`; "" where the first tells it.

    Process 0 leaves its words with the job's coordinator and the others look there, since on the
    way out nobody knows who still takes part in a collective. What is another process's own says
    which one it is.

    Args:
      wait: seconds that a process waits for the words of the first.
    """
    from jax._src import distributed  # the coordinator's store has no public name

    job = distributed.global_state
    if job.client is None:  # alone, or not joined yet
        return text
    if job.process_id == 0:
        job.client.key_value_set(_LAST_WORDS, text)
        return text
    try:
        told = job.client.blocking_key_value_get(_LAST_WORDS, round(1000 * wait))
    except jax.errors.JaxRuntimeError:  # none came, or the first process is gone
        told = None
    return "" if told == text else f"process {job.process_id}: {text}"


def meet(where: str, *, wait: float) -> bool:
    """Whether all processes come to this point within `wait` seconds; without a collective.

    JAX has a process that ends wait for the others, and aborts all of them after five minutes: so
    one that leaves alone must do it by `os._exit`, and one that is done must wait here.

    Args:
      where: names the point; a run comes to it once.
    """
    from jax._src import distributed

    client = distributed.global_state.client
    try:
        if client is not None:
            client.wait_at_barrier(f"sora_jax/{where}", round(1000 * wait))
        return True
    except jax.errors.JaxRuntimeError:
        return False


class Flags:
    """Small whole numbers of which every process learns the largest that any of them gave.

    An all-reduce of `count` numbers a step, started behind the step and read behind the next one:
    it never makes a device wait, and all processes learn of a flag at the same step.
    """

    def __init__(self, mesh: Mesh, count: int):
        self._alone = jax.process_count() == 1
        if not self._alone:
            devices = mesh.devices.flatten()
            flat = sharding.make_mesh(data=-1, fsdp=1, devices=devices)
            self._placement, self._shape = sharding.named(flat, "batch"), (len(devices), count)
            self._max = jax.jit(lambda x: jnp.max(x, axis=0), out_shardings=sharding.named(flat))
            self._sent = self._send((0,) * count)  # compiles it, apart from the first step

    def exchange(self, *flags: int) -> tuple[int, ...]:
        """Sends `flags`; the agreed ones of this call (one process), or of the call before."""
        if self._alone:
            return flags
        before, self._sent = self._sent, self._send(flags)
        return tuple(int(flag) for flag in np.asarray(before.addressable_data(0)))

    def _send(self, flags: tuple[int, ...]) -> jax.Array:
        row = np.array([flags], np.int32)
        sent = jax.make_array_from_callback(self._shape, self._placement, lambda index: row)
        return self._max(sent)
