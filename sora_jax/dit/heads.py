"""Queries and keys out of their projections: normalised, turned by rope, cut into heads."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sora_jax import attention, layers, sharding
from sora_jax.dit import rope
from sora_jax.dit.config import DiTConfig

# Cosines and sines of `rope.rotation`.
Rotation = tuple[Float[Array, "#b n e2"], Float[Array, "#b n e2"]]
_LANES = 128  # channels of a head that the kernel takes
_TILE = 1024  # tokens that attention works on at a time


class Pass(NamedTuple):
    """How the kernel makes queries or keys.

    Args:
      factor: of the result.
      dtype: of the result.
      eps: of the normalisation.
      interpret: runs it in Pallas' interpreter, for tests off TPU.
    """

    factor: float
    dtype: str
    eps: float
    interpret: bool = False


def is_fused(config: DiTConfig, count: int, *, biased: bool = False) -> bool:
    """Whether one pass makes the heads of `count` queries.

    It does on a TPU, for "flash", where no device has some heads alone: the norm goes over all.
    """
    mesh = sharding.current_mesh()
    if config.head_dim != _LANES or (mesh is not None and mesh.shape["tensor"] > 1):
        return False
    platform = sharding.platform()
    kernel = attention.select(
        config.attention,
        config.dtype,
        platform=platform,
        head_dim=config.head_dim,
        q_len=count,
        kv_bias=biased,
    )
    return platform == "tpu" and kernel == "flash"


def takes_whole_text(config: DiTConfig, count: int, length: int) -> bool:
    """Whether `count` queries attend to padding as such, and not to one key that stands for it.

    cuDNN takes no weights of keys, and is worth up to twice the keys of a text of `length`.
    """
    kernel = attention.select(
        config.attention,
        config.dtype,
        platform=sharding.platform(),
        head_dim=config.head_dim,
        q_len=count,
        kv_bias=False,
    )
    return kernel == "cudnn" and config.text_len <= 2 * length


def spare_tokens(config: DiTConfig, count: int) -> int:
    """Tokens to add to `count`, so that attention's tiles are full on every device.

    Where no kernel attends in tiles, or where they would be more than one in a hundred, so many
    that devices share them evenly: tokens that do not divide would be worked on by all.
    """
    mesh = sharding.current_mesh()
    shards = 1 if mesh is None else mesh.shape[sharding.CONTEXT]
    full = -count % math.lcm(_TILE, shards * _LANES)
    if is_fused(config, count) and full <= count // 100:
        return full
    return -count % shards


def row_major(x: Float[Array, "b n d"], config: DiTConfig) -> Float[Array, "b n d"]:
    """`x`, channels next to each other in memory, where the kernels run that want it so.

    Left alone, XLA kept the residual stream the other way round and turned it for every kernel.
    """
    if not is_fused(config, x.shape[1]):
        return x
    from jax.experimental import layout

    def constrain(x: jax.Array) -> jax.Array:
        return layout.with_layout_constraint(x, layout.Layout(major_to_minor=(0, 1, 2)))

    mesh = sharding.current_mesh()
    if mesh is None or mesh.size == 1:
        return constrain(x)
    # Of each shard: the partitioner would gather what it constrains as a whole.
    where = sharding.fitted(mesh, x.shape, "batch", "tokens", None)
    return jax.shard_map(constrain, mesh=mesh, in_specs=where, out_specs=where, check_vma=False)(x)


def passes(
    config: DiTConfig, count: int, *, biased: bool, turned: bool
) -> tuple[Pass | None, Pass | None]:
    """How the kernel makes `count` queries and their keys; None where it does not.

    Keys that are not turned are those of a text, which are too few to be worth it.
    """
    if not is_fused(config, count, biased=biased):
        return None, None
    from sora_jax import flash  # Pallas costs a second that only TPUs need to pay

    one = functools.partial(Pass, dtype=config.dtype, eps=config.eps)
    return one(flash.query_scale(config.head_dim)), one(1.0) if turned else None


def project(
    projection: layers.Linear,
    norm: layers.RMSNorm,
    x: Float[Array, "b n d"],
    rotation: Rotation | None,
    *,
    num_heads: int,
    fused: Pass | None = None,
) -> Float[Array, "b n k e"]:
    """Queries or keys of `x`; see `split`."""
    y = projection(x, order=_order(rotation, projection.kernel.shape[1] // num_heads))
    return split(y, norm, rotation, num_heads=num_heads, fused=fused)


def _order(rotation: Rotation | None, head_dim: int) -> Callable[[jax.Array], jax.Array] | None:
    """Of the channels that `rotation` turns."""
    return None if rotation is None else functools.partial(rope.pairs_apart, head_dim=head_dim)


def split(
    y: Float[Array, "b n d"],
    norm: layers.RMSNorm,
    rotation: Rotation | None,
    *,
    num_heads: int,
    fused: Pass | None = None,
) -> Float[Array, "b n k e"]:
    """rope(y / rms(y) * scale) in heads; rms over the full width, as Wan has it.

    Args:
      y: where `rotation` turns it, with each head's pairs of channels apart.
      rotation: None turns nothing.
      fused: in one pass, on a TPU.
    """
    head_dim = y.shape[-1] // num_heads
    order = _order(rotation, head_dim)
    if fused is not None:
        scale = norm.scale[...] if order is None else order(norm.scale[...])
        return _fused(y, scale * fused.factor, rotation, fused).swapaxes(1, 2)
    x = norm(y, order=order).reshape(*y.shape[:2], num_heads, head_dim)
    return x if rotation is None else rope.apply(x, *rotation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(y, scale, rotation, how: Pass):
    """(b, h, n, e)"""
    return _fused_forward(y, scale, rotation, how)[0]


def _fused_forward(y, scale, rotation, how):
    from sora_jax.flash import heads

    forward = functools.partial(
        heads.forward, eps=how.eps, dtype=how.dtype, interpret=how.interpret
    )
    out = _on_mesh(forward, (y,), scale, rotation, out=("heads",))
    return out, (y, scale, rotation)


def _fused_backward(how, residuals, d_out):
    from sora_jax.flash import heads

    y, scale, rotation = residuals
    backward = functools.partial(heads.backward, eps=how.eps, interpret=how.interpret)
    dy, d_scale = _on_mesh(backward, (y, d_out), scale, rotation, out=("tokens", "sums"))
    turns = jax.tree.map(jnp.zeros_like, rotation)  # positions are given
    return dy, jnp.sum(d_scale, axis=(0, 1, 2)), turns


_fused.defvjp(_fused_forward, _fused_backward)


def _on_mesh(kernel, arrays, scale, rotation, *, out: tuple[str, ...]):
    """`kernel` on each device's tokens; y (b, n, d), and the gradient of its heads (b, h, n, e)."""
    y, *d_out = arrays
    cos, sin = (None, None) if rotation is None else rotation
    mesh = sharding.current_mesh()
    if mesh is None or mesh.size == 1:
        return kernel(y, scale, cos, sin, *d_out)
    b, n, _ = y.shape
    # What has a part for every tile of tokens is cut as tokens are.
    specs = {
        "tokens": sharding.fitted(mesh, (b, n, 1), "batch", "tokens", None),
        "heads": sharding.fitted(mesh, (b, 1, n, 1), "batch", None, "tokens", None),
        "sums": sharding.fitted(mesh, (b, n, 1, 1), "batch", "tokens", None, None),
    }
    turns = None if cos is None else sharding.fitted(mesh, cos.shape, "batch", "tokens", None)
    whole = sharding.fitted(mesh, scale.shape, None)
    inputs = (specs["tokens"], whole, turns, turns, *(specs["heads"] for _ in d_out))
    outputs = tuple(specs[name] for name in out)
    return jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=inputs,
        out_specs=outputs if len(out) > 1 else outputs[0],
        check_vma=False,
    )(y, scale, cos, sin, *d_out)
