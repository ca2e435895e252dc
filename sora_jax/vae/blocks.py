"""Causal residual, attention and resampling blocks of the video VAE; no full model.

Every block maps (x, carry) to x. Without a carry, x is a whole clip that starts at frame 0;
with one, x is its next chunk. Both give the same values, because each layer's view of the
past is either zeros (before frame 0) or what the carry kept.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.vae import space
from sora_jax.vae.conv import Carry, CausalConv3d, FrameConv

Features = Float[Array, "b t h w c"]


class ChannelRMSNorm(nnx.Module):
    """x / |x| * sqrt(c) * scale over the channels."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels), axes=("norm",))

    def __call__(self, x: Features) -> Features:
        x = x.astype(jnp.float32)
        # The floor is under the root, so that the gradient at 0 is 0 and not NaN.
        square = jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24)
        scale = self.scale[...] * x.shape[-1] ** 0.5
        return x * jax.lax.rsqrt(square) * scale.reshape(1, 1, 1, 1, -1)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs, dtype: str):
        conv = {"rngs": rngs, "dtype": dtype}
        self.norm1 = ChannelRMSNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, size=(3, 3, 3), **conv)
        self.norm2 = ChannelRMSNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, size=(3, 3, 3), **conv)
        self.shortcut = (
            CausalConv3d(in_channels, out_channels, size=(1, 1, 1), **conv)
            if in_channels != out_channels
            else None
        )

    def __call__(self, x: Features, carry: Carry | None = None) -> Float[Array, "b t h w o"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)), carry)
        y = self.conv2(jax.nn.silu(self.norm2(y)), carry)
        return y + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """Single-head attention among the positions of each frame, with a residual connection."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: str):
        self.norm = ChannelRMSNorm(channels)
        self.to_qkv = FrameConv(channels, 3 * channels, size=1, rngs=rngs, dtype=dtype)
        zeros = nnx.initializers.zeros_init()
        self.proj = FrameConv(channels, channels, size=1, rngs=rngs, init=zeros, dtype=dtype)

    def __call__(self, x: Features) -> Features:
        b, t, h, w, c = x.shape
        q, k, v = jnp.split(self.to_qkv(self.norm(x)).reshape(b, t, h * w, 3 * c), 3, axis=-1)
        k, v = space.gather(k, 2), space.gather(v, 2)
        logits = jnp.einsum("btqc,btkc->btqk", q, k) * c**-0.5
        y = jnp.einsum("btqk,btkc->btqc", jax.nn.softmax(logits, axis=-1), v)
        return x + self.proj(y.reshape(x.shape))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: str):
        self.resnets = nnx.List(
            [ResidualBlock(channels, channels, rngs=rngs, dtype=dtype) for _ in range(2)]
        )
        self.attention = FrameAttention(channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: Features, carry: Carry | None = None) -> Features:
        x = self.resnets[0](x, carry)
        return self.resnets[1](self.attention(x), carry)


def _mean_of_pair_init(key, shape, dtype=jnp.float32):
    """Time-halving kernel that averages the two frames which a latent frame stands for."""
    kernel = jnp.zeros(shape, dtype)
    return kernel.at[1:, 0, 0].set(0.5 * jnp.eye(shape[-1], dtype=dtype)[None])


def _repeat_init(key, shape, dtype=jnp.float32):
    """Time-doubling kernel that shows each frame twice."""
    eye = jnp.eye(shape[-2], dtype=dtype)
    return jnp.zeros(shape, dtype).at[-1, 0, 0].set(jnp.concatenate([eye, eye], axis=1))


class Downsample(nnx.Module):
    """Halves height and width, and with `time` also t = 1 + 2k frames to 1 + k.

    The first frame passes the time step untouched; each pair after it becomes one frame that
    also sees the frame before.
    """

    def __init__(self, channels: int, *, time: bool, rngs: nnx.Rngs, dtype: str):
        self.conv = FrameConv(
            channels, channels, size=3, stride=2, padding=(0, 1), rngs=rngs, dtype=dtype
        )
        self.time_conv = (
            CausalConv3d(
                channels,
                channels,
                size=(3, 1, 1),
                stride=(2, 1, 1),
                rngs=rngs,
                init=_mean_of_pair_init,
                dtype=dtype,
            )
            if time
            else None
        )

    def __call__(self, x: Features, carry: Carry | None = None) -> Float[Array, "b T H W c"]:
        x = self.conv(x)
        if self.time_conv is None:
            return x
        first = carry is None or carry.first
        frames = x if carry is None else carry.extend(x, 1)
        if not first:
            return self.time_conv(frames, causal=False)
        if x.shape[1] == 1:
            return x
        return jnp.concatenate([x[:, :1], self.time_conv(x, causal=False)], axis=1)


class Upsample(nnx.Module):
    """Doubles height and width, and with `time` also t = 1 + k frames to 1 + 2k.

    The first frame passes the time step untouched, and the frames after it do not see it: their
    causal convolution, which makes two frames of one, starts with zeros.
    """

    def __init__(self, channels: int, out_channels: int, *, time: bool, rngs: nnx.Rngs, dtype: str):
        self.conv = FrameConv(
            channels, out_channels, size=3, padding=(1, 1), rngs=rngs, dtype=dtype
        )
        self.time_conv = (
            CausalConv3d(
                channels, 2 * channels, size=(3, 1, 1), rngs=rngs, init=_repeat_init, dtype=dtype
            )
            if time
            else None
        )

    def __call__(self, x: Features, carry: Carry | None = None) -> Float[Array, "b T H W o"]:
        if self.time_conv is not None:
            if carry is None or carry.first:
                x = jnp.concatenate([x[:, :1], self._double(x[:, 1:], carry)], axis=1)
            else:
                x = self._double(x, carry)
        return self.conv.of_doubled(x)

    def _double(self, x, carry):
        if carry is None:
            y = self.time_conv(x) if x.shape[1] else self._no_frames(x)
        else:
            frames = carry.extend(x, 2)
            y = self.time_conv(frames, causal=False) if x.shape[1] else self._no_frames(x)
        b, t, h, w, c = x.shape
        return jnp.moveaxis(y.reshape(b, t, h, w, 2, c), 4, 2).reshape(b, 2 * t, h, w, c)

    def _no_frames(self, x):
        return jnp.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)


@dataclasses.dataclass(frozen=True)
class Fold:
    """A box of `time` x `space` x `space` values, traded for channels."""

    channels: int  # of the result
    time: int
    space: int


def average_down(x: Features, fold: Fold, *, first: bool) -> Float[Array, "b T H W o"]:
    """Folds boxes into channels and averages groups of these to `fold.channels`.

    Where the clip begins, zeros stand before frame 0 to fill its box.
    """
    channels, time, space = fold.channels, fold.time, fold.space
    if first and x.shape[1] % time:
        front = time - x.shape[1] % time
        x = jnp.pad(x, ((0, 0), (front, 0), (0, 0), (0, 0), (0, 0)))
    b, t, h, w, c = x.shape
    x = x.reshape(b, t // time, time, h // space, space, w // space, space, c)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return jnp.mean(x.reshape(*x.shape[:4], channels, -1), axis=-1)


def repeat_up(x: Features, fold: Fold, *, first: bool) -> Float[Array, "b T H W o"]:
    """Repeats channels until they fill `fold.channels` boxes, and unfolds these.

    Where the clip begins, frame 0 yields one frame: the others would lie before it.
    """
    channels, time, space = fold.channels, fold.time, fold.space
    b, t, h, w, c = x.shape
    x = jnp.repeat(x, channels * time * space * space // c, axis=-1)
    x = x.reshape(b, t, h, w, channels, time, space, space).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(b, t * time, h * space, w * space, channels)
    return x[:, time - 1 :] if first else x


class Stage(nnx.Module):
    """`depth` residual blocks, then a resampling unless it is the last stage.

    Subclasses set `resample`, or None, and `fold`, of the shortcut around all (Wan 2.2), or None.
    """

    def __init__(self, in_channels: int, channels: int, *, depth: int, rngs: nnx.Rngs, dtype: str):
        blocks = [ResidualBlock(in_channels, channels, rngs=rngs, dtype=dtype)]
        for _ in range(depth - 1):
            blocks.append(ResidualBlock(channels, channels, rngs=rngs, dtype=dtype))
        self.resnets = nnx.List(blocks)

    def shortcut(self, x: Features, *, first: bool) -> Float[Array, "b T H W o"]:
        raise NotImplementedError

    def __call__(
        self, x: Features, carry: Carry | None = None, *, remat: bool = False
    ) -> Float[Array, "b T H W o"]:
        y = x
        for block in self.resnets:
            y = run_block(block, y, carry, remat=remat)
        if self.resample is not None:
            y = self.resample(y, carry)
        if self.fold is None:
            return y
        return y + self.shortcut(x, first=carry is None or carry.first)


class DownStage(Stage):
    """An encoder stage; `down` halves height and width, `time` the frames."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        depth: int,
        down: bool,
        time: bool,
        residual: bool,
        rngs: nnx.Rngs,
        dtype: str,
    ):
        super().__init__(in_channels, channels, depth=depth, rngs=rngs, dtype=dtype)
        resample = Downsample(channels, time=time, rngs=rngs, dtype=dtype) if down else None
        self.resample = resample
        self.fold = Fold(channels, 2 if time else 1, 2 if down else 1) if residual else None

    def shortcut(self, x: Features, *, first: bool) -> Float[Array, "b T H W o"]:
        return average_down(x, self.fold, first=first)


class UpStage(Stage):
    """A decoder stage; `up` doubles height and width, `time` the frames."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        depth: int,
        up: bool,
        time: bool,
        residual: bool,
        rngs: nnx.Rngs,
        dtype: str,
    ):
        super().__init__(in_channels, channels, depth=depth, rngs=rngs, dtype=dtype)
        # Without the shortcut, the upsampling convolution also halves the width (Wan 2.1).
        after = channels if residual else channels // 2
        resample = Upsample(channels, after, time=time, rngs=rngs, dtype=dtype) if up else None
        self.resample = resample
        self.fold = Fold(channels, 2 if time else 1, 2) if up and residual else None

    def shortcut(self, x: Features, *, first: bool) -> Float[Array, "b T H W o"]:
        return repeat_up(x, self.fold, first=first)


def run_block(block: nnx.Module, x: jax.Array, carry: Carry | None, *, remat: bool) -> jax.Array:
    """Runs `block`, recomputed in the backward pass with `remat` (whole clips only)."""
    if not remat or carry is not None:
        return block(x, carry)
    graph, state = nnx.split(block)
    return jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)
