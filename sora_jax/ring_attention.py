"""Exact attention over keys that lie on several devices (Liu et al. 2023, arXiv:2310.01889).

Every device attends with its queries to the keys that it has, and passes them on to the next, until
each has seen all; the results are joined by the softmax's sums. In the backward pass the gradients
of keys and values travel with them, back to where they came from. A ring of one device is plain
attention: one gradient rule serves both.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sora_jax import blocked_attention
from sora_jax.blocked_attention import Keys

# Name of what the backward pass needs beside q, k and v, for policies of rematerialisation.
RESIDUALS = "attention_out"
# Of the larger memory beside accelerators' matrix units; blocked_attention's own is for CPU caches.
_ACCELERATOR_TILE_BYTES = 64_000_000


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Which kernel runs on each part, and how.

    Args:
      name: "blocked" or "flash"; "cudnn" runs elsewhere, on one device's keys alone.
      dtype: of the operands of its products, and of its result.
      platform: that the kernel runs on.
      interpret: runs "flash" in Pallas' interpreter, for tests off TPU.
      runs: as `attention` takes it; for cuDNN, which this file does not run.
    """

    name: str
    dtype: str
    platform: str
    interpret: bool = False
    runs: int | None = None

    def query_scale(self, head_dim: int) -> float:
        """What queries are to be multiplied with beforehand."""
        if self.name == "blocked":
            return head_dim**-0.5
        from sora_jax import flash

        return flash.query_scale(head_dim)

    def _module(self):
        if self.name == "blocked":
            on_cpu = self.platform == "cpu"
            options = {} if on_cpu else {"tile_bytes": _ACCELERATOR_TILE_BYTES}
            return blocked_attention, options
        # Imported here: Pallas costs a second that only TPUs need to pay.
        from sora_jax import flash

        return flash, {"interpret": self.interpret}

    def forward(self, q, q_ids, keys: Keys, *, out_dtype: str):
        module, options = self._module()
        return module.forward(q, q_ids, keys, dtype=self.dtype, out_dtype=out_dtype, **options)

    def backward(self, q, q_ids, keys: Keys, *sums, out_dtype: str):
        module, options = self._module()
        return module.backward(
            q, q_ids, keys, *sums, dtype=self.dtype, out_dtype=out_dtype, **options
        )


@dataclasses.dataclass(frozen=True)
class Ring:
    """`size` devices along mesh axis `axis` of `axis_size`, `axis_size / size` apart.

    Those between are rings of their own.
    """

    axis: str = ""
    axis_size: int = 1
    size: int = 1

    def pass_on(self, tree):
        """What the next device of the ring has."""
        apart = self.axis_size // self.size
        pairs = [(i, (i - apart) % self.axis_size) for i in range(self.axis_size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)


ALONE = Ring()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend(q, q_ids, keys: Keys, kernel: Kernel, ring: Ring = ALONE):
    """softmax(q k^T + bias) v over the keys of all devices of `ring`, in `kernel.dtype`.

    Args:
      q: (b, n, h, e), times `kernel.query_scale`; `q_ids` (b, n) or None.
      keys: the part on this device; ids and bias have no gradient.
    """
    return _forward(q, q_ids, keys, kernel, ring)[0]


def _forward(q, q_ids, keys, kernel: Kernel, ring: Ring):
    alone = ring.size == 1
    part = functools.partial(
        kernel.forward, q, q_ids, out_dtype=kernel.dtype if alone else "float32"
    )
    out, log_sum = part(keys)
    moving = keys
    for _ in range(ring.size - 1):
        moving = ring.pass_on(moving)
        more, more_sum = part(moving)
        both = jnp.logaddexp(log_sum, more_sum)
        out = out * _weight(log_sum - both) + more * _weight(more_sum - both)
        log_sum = both
    # Named, so that a rematerialised block may keep them and need not attend again.
    out = checkpoint_name(out.astype(kernel.dtype), RESIDUALS)
    log_sum = checkpoint_name(log_sum, RESIDUALS)
    return out, (q, q_ids, keys, out, log_sum)


def _weight(log_share):
    """(b, h, n) to factors of (b, n, h, e)."""
    return jnp.exp(log_share).swapaxes(1, 2)[..., None]


def _backward(kernel: Kernel, ring: Ring, residuals, d_out):
    q, q_ids, keys, out, log_sum = residuals
    pull = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    # What is to be added, or sent around, is in float32.
    out_dtype = kernel.dtype if ring.size == 1 else "float32"

    def part(keys):
        return kernel.backward(q, q_ids, keys, log_sum, pull, d_out, out_dtype=out_dtype)

    dq, *d_keys = part(keys)
    moving = keys
    for _ in range(ring.size - 1):
        # Sums of gradients go the keys' way, in float32, and are home after the last step.
        moving, d_keys = ring.pass_on(moving), ring.pass_on(d_keys)
        more, *d_more = part(moving)
        dq, d_keys = dq + more, jax.tree.map(jnp.add, d_keys, d_more)
    if ring.size > 1:
        d_keys = ring.pass_on(d_keys)
    dk, dv = d_keys
    d_keys = Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), None, None)
    return dq.astype(q.dtype), None, d_keys


attend.defvjp(_forward, _backward)
