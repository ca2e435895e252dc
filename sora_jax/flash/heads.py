"""From a projection to the heads of queries or keys, in one pass over memory each way (Pallas).

RMS normalisation over the full width, rotary embedding, and the change from tokens to heads first
that the attention kernels want: left to XLA these are passes of their own, in float32, with copies
between the layouts that they like best.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sora_jax.flash import tiles as tiling

_ROWS = 128  # tokens of a tile; at a width of 5120 one of float32 takes 2.5 MiB
_HALF = tiling.LANES // 2


def forward(y, scale, cos, sin, *, eps: float, dtype: str, interpret: bool = False):
    """rope(y / rms(y) * scale), its heads before its tokens: (b, h, n, e) in `dtype`.

    Args:
      y: (b, n, h e) float32, heads of `tiling.LANES` channels with their pairs apart.
      scale: (h e,) float32.
      cos: and `sin` (#b, n, e / 2) of the angles, or None, where nothing turns.
    """
    b, n, d = y.shape
    heads = d // tiling.LANES
    turns = () if cos is None else (jnp.concatenate([x] * 2, axis=-1) for x in (cos, sin))
    return pl.pallas_call(
        functools.partial(_forward_kernel, heads=heads, eps=eps, turned=cos is not None),
        grid=(b, pl.cdiv(n, _ROWS)),
        in_specs=[_of_tokens(d), _of_all(d), *_of_turns(cos)],
        out_specs=_of_heads(heads),
        out_shape=jax.ShapeDtypeStruct((b, heads, n, tiling.LANES), dtype),
        compiler_params=_compiler_params(),
        name="heads_forward",
        interpret=interpret,
    )(y, scale[None], *turns)


def backward(y, scale, cos, sin, d_out, *, eps: float, interpret: bool = False):
    """Gradients of y, and of `scale` summed over each tile of tokens (b, tiles, 1, h e)."""
    b, n, d = y.shape
    heads, tiles = d // tiling.LANES, pl.cdiv(n, _ROWS)
    turns = () if cos is None else (jnp.concatenate([x] * 2, axis=-1) for x in (cos, sin))
    return pl.pallas_call(
        functools.partial(_backward_kernel, heads=heads, tokens=n, eps=eps, turned=cos is not None),
        grid=(b, tiles),
        in_specs=[_of_tokens(d), _of_all(d), *_of_turns(cos), _of_heads(heads)],
        out_specs=[
            _of_tokens(d),
            pl.BlockSpec((None, None, 1, d), lambda b, i: (b, i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(y.shape, y.dtype),
            jax.ShapeDtypeStruct((b, tiles, 1, d), jnp.float32),
        ],
        compiler_params=_compiler_params(),
        name="heads_backward",
        interpret=interpret,
    )(y, scale[None], *turns, d_out)


def _of_tokens(width: int):
    return pl.BlockSpec((None, _ROWS, width), lambda b, i: (b, i, 0))


def _of_all(width: int):
    return pl.BlockSpec((1, width), lambda b, i: (0, 0))


def _of_heads(heads: int):
    return pl.BlockSpec((None, heads, _ROWS, tiling.LANES), lambda b, i: (b, 0, i, 0))


def _of_turns(cos):
    if cos is None:
        return ()
    alike = cos.shape[0] == 1
    spec = pl.BlockSpec((None, _ROWS, tiling.LANES), lambda b, i: (0 if alike else b, i, 0))
    return spec, spec


def _compiler_params():
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=tiling.VMEM_BYTES
    )


def _forward_kernel(*refs, heads: int, eps: float, turned: bool):
    y, scale, *turns, out = refs
    inverse = _inverse_rms(y, heads, eps)
    turn = _Turn(*turns) if turned else None

    def one(h, _):
        x = y[:, _lanes(h)] * inverse * scale[:, _lanes(h)]
        out[h] = (turn(x) if turned else x).astype(out.dtype)

    _each(heads, one)


def _backward_kernel(*refs, heads: int, tokens: int, eps: float, turned: bool):
    y, scale, *turns, d_out, dy, d_scale = refs
    inverse = _inverse_rms(y, heads, eps)
    turn = _Turn(*turns) if turned else None
    partial = tokens % _ROWS  # what lies behind the last token is anything
    if partial:
        row = jax.lax.broadcasted_iota(jnp.int32, (_ROWS, tiling.LANES), 0)
        known = row < tokens - pl.program_id(1) * _ROWS
        inverse = jnp.where(known[:, :1], inverse, 0.0)

    def one(h, along):
        x = y[:, _lanes(h)]
        d = d_out[h].astype(jnp.float32)
        d = turn.back(d) if turned else d
        product = d * x
        if partial:
            product = jnp.where(known, product, 0.0)
        d_scale[:, _lanes(h)] = jnp.sum(product * inverse, axis=0, keepdims=True)
        dy[:, _lanes(h)] = d * scale[:, _lanes(h)]
        return along + product * scale[:, _lanes(h)]

    along = _each(heads, one, jnp.zeros((_ROWS, tiling.LANES), jnp.float32))
    # The derivative of x / rms(x) takes the part along x out of a gradient.
    along = jnp.sum(along, axis=1, keepdims=True) * jnp.square(inverse) / (heads * tiling.LANES)

    def rest(h, _):
        dy[:, _lanes(h)] = inverse * (dy[:, _lanes(h)] - along * y[:, _lanes(h)])

    _each(heads, rest)


def _inverse_rms(y, heads: int, eps: float):
    """(rows, 1)"""
    squares = _each(
        heads,
        lambda h, total: total + jnp.square(y[:, _lanes(h)]),
        jnp.zeros((_ROWS, tiling.LANES), jnp.float32),
    )
    mean = jnp.sum(squares, axis=1, keepdims=True) / (heads * tiling.LANES)
    return jax.lax.rsqrt(mean + eps)


class _Turn:
    """Rotary embedding of a tile of one head: channel i and i + e / 2 are a pair."""

    def __init__(self, cos, sin):
        lane = jax.lax.broadcasted_iota(jnp.int32, sin.shape, 1)
        self.cos, self.sin = cos[...], jnp.where(lane < _HALF, -sin[...], sin[...])

    def __call__(self, x):
        return x * self.cos + pltpu.roll(x, _HALF, 1) * self.sin

    def back(self, x):
        return x * self.cos - pltpu.roll(x, _HALF, 1) * self.sin


def _lanes(head):
    return pl.ds(pl.multiple_of(head * tiling.LANES, tiling.LANES), tiling.LANES)


def _each(heads: int, visit, carry=0):
    """visit(head, carry) one after the other."""

    def one(h, carry):
        found = visit(h, carry)
        return carry if found is None else found

    return jax.lax.fori_loop(
        0, heads, one, carry, unroll=next(u for u in (4, 2, 1) if not heads % u)
    )
