"""The diffusion transformer: predicts velocity from noisy latents, time and text.

Wan's architecture (Wan Team 2025, arXiv:2503.20314, section 4.2): every block is
self-attention, cross-attention to text, MLP; the first and last are modulated by time (adaLN,
Peebles and Xie 2023, arXiv:2212.09748) through one shared projection plus a table per block.

At initialisation the modulation (tables and projection), the cross-attention's output and the
head are zero: all gates are closed, every block is the identity and the velocity is zero.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sora_jax import layers, sharding, types
from sora_jax.dit import embed, heads, patchify, rope
from sora_jax.dit.block import Apart, DiTBlock, Pictures, to_tokens
from sora_jax.dit.config import REMAT, DiTConfig
from sora_jax.dit.kv_cache import KVCache

# Segment of tokens that fill up a sequence; packing's own, -1, would attend to them.
_FILL_SEGMENT = -2
_zeros = nnx.initializers.zeros_init()

# Time of each token: per example, per token, or per cell of the grid of patches.
Time = Float[Array, " b"] | Float[Array, "b n"] | Float[Array, "b f_grid h_grid w_grid"]

# Called with the embedded tokens and what runs the blocks on them; gives what the head reads.
Around = Callable[[jax.Array, Callable[[jax.Array], jax.Array]], jax.Array]


def _fill_up(x: jax.Array, *, count: int, value: int = 0) -> jax.Array:
    """`count` more tokens of `value` (b, n + count, ...)."""
    return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2), constant_values=value)


class DiT(nnx.Module):
    """Velocity of latents under the rectified flow, given time and text."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        patch, d = math.prod(config.patch_size), config.width
        self.patch_embed = layers.Linear(
            patch * config.in_channels, d, axes=("patch", "embed"), rngs=rngs, dtype=config.dtype
        )
        self.time_embed = embed.TimeEmbed(config.freq_dim, d, rngs=rngs)
        self.time_proj = layers.Linear(d, 6 * d, axes=("embed", "time"), init=_zeros, rngs=rngs)
        self.text_embed = embed.TextEmbed(config.text_dim, d, rngs=rngs, dtype=config.dtype)
        self.image_embed = (
            None
            if config.image_dim is None
            else embed.ImageEmbed(
                config.image_dim,
                d,
                positions=config.image_positions,
                rngs=rngs,
                dtype=config.dtype,
            )
        )
        self.blocks = jax.vmap(lambda r: DiTBlock(config, rngs=r))(rngs.split(config.depth))
        self.norm_out = layers.LayerNorm(d, eps=config.eps, affine=False)
        self.modulation_out = nnx.Param(jnp.zeros((2, d)), axes=("time", "norm"))
        self.proj_out = layers.Linear(
            d,
            patch * config.out_channels,
            axes=("embed", "patch"),
            init=_zeros,
            rngs=rngs,
            dtype=config.dtype,
        )
        self.config = config

    def __call__(
        self,
        latents: types.Latents,
        t: Time,
        text_emb: Float[Array, "b l d_text"],
        *,
        text_mask: Bool[Array, "b l"] | None = None,
        text_segment_ids: Int[Array, "b l"] | None = None,
        text_of_frames: Int[Array, "b f_grid"] | None = None,
        num_texts: int = 1,
        image_emb: Float[Array, "b i d_image"] | None = None,
        frames_apart: tuple[Sequence[int], Bool[Array, "b #f_grid"]] | None = None,
        around: Around | None = None,
        cache: KVCache | None = None,
    ) -> Float[Array, "b f h w c_out"]:
        """Velocity at time `t` of every example (b,), token (b, n) or patch (b, f', h', w').

        With `text_of_frames` a video has several texts, one after the other in `text_emb`, and the
        tokens of a frame attend to its own.

        Args:
          latents: noisy latents x_t, in_channels wide.
          t: flow time; 0 is data, 1 is noise.
          text_emb: the text encoder's output, of any length up to `config.text_len`.
          text_mask: True for real tokens; None: all of them.
          text_segment_ids: which of the texts, in [0, num_texts), a text token belongs to.
          text_of_frames: the text of every frame of patches.
          image_emb: image features, for models that take them (`config.image_dim`).
          frames_apart: blocks, counted from 0, in which some frames of patches see only
            themselves, and which do (`diffusion.guidance`).
          around: looks at what the blocks do, or stands in for them (a cache between steps).
          cache: stores keys and values of given tokens, or takes them from another evaluation.
            Then the velocity of those tokens, which are not worked on, is 0.

        Raises:
          ValueError: if the patches do not tile the latents, `t` does not fit the tokens, or
            the text is longer than `config.text_len`.
        """
        grid = patchify.grid(*latents.shape[1:4], patch_size=self.config.patch_size)
        if t.ndim != 1 and t.shape[1:] not in ((math.prod(grid),), grid):
            raise ValueError(
                f"t of shape {t.shape} fits neither examples {t.shape[:1]}, nor tokens "
                f"{(t.shape[0], math.prod(grid))}, nor the grid {(t.shape[0], *grid)}."
            )
        of_frame = functools.partial(jnp.repeat, repeats=grid[1] * grid[2], axis=1)
        text_of_tokens = None if text_of_frames is None else of_frame(text_of_frames)
        apart = None
        if frames_apart is not None:
            blocks, alone = frames_apart
            ids = jnp.where(alone, jnp.arange(grid[0], dtype=jnp.int32), grid[0])
            runs = grid[0] + 1 if alone.shape[1] == 1 else None  # else they may lie in between
            apart = Apart(tuple(blocks), of_frame(ids), runs)
        x, t = patchify.patchify(latents, self.config.patch_size), t.reshape(t.shape[0], -1)
        positions = patchify.positions(*grid)[None]
        takes = cache is not None and cache.taken is not None
        if takes:
            x, positions = cache.of_rest(x), cache.of_rest(positions)
            t = t if t.shape[1] == 1 else cache.of_rest(t)
            text_of_tokens = None if text_of_frames is None else cache.of_rest(text_of_tokens)
            if apart is not None:
                given = apart.ids[:, cache.given]
                apart = Apart(apart.blocks, cache.of_rest(apart.ids), given=given)
        velocity = self.tokens(
            x,
            t,
            text_emb,
            text_mask=text_mask,
            text_segment_ids=text_segment_ids,
            text_of_tokens=text_of_tokens,
            num_segments=num_texts,
            image_emb=image_emb,
            positions=positions,
            apart=apart,
            around=around,
            cache=cache,
        )
        velocity = cache.spread(velocity) if takes else velocity
        return patchify.unpatchify(velocity, self.config.patch_size, grid=grid)

    def tokens(
        self,
        x: Float[Array, "b n p"],
        t: Float[Array, "b times"],
        text_emb: Float[Array, "b l d_text"],
        *,
        positions: Int[Array, "#b n 3"],
        text_mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b n"] | None = None,
        text_segment_ids: Int[Array, "b l"] | None = None,
        text_of_tokens: Int[Array, "b n"] | None = None,
        num_segments: int = 1,
        t_of_segments: bool = False,
        image_emb: Float[Array, "b i d_image"] | Float[Array, "b s i d_image"] | None = None,
        apart: Apart | None = None,
        around: Around | None = None,
        cache: KVCache | None = None,
    ) -> Float[Array, "b n p_out"]:
        """The model on patch tokens, where several examples may share a row (packing).

        A token sees the video and text tokens of its own segment, and as many padding rows of
        text as would fill that segment's text up to `config.text_len`.

        Args:
          t: time of every token, or one for a whole row, or with `t_of_segments` one for each
            segment: a token's own takes six vectors of the model's width beside it.
          positions: (time, row, column) of every token within its own video.
          segment_ids: which example a token belongs to, in [0, num_segments), one after the
            other; other ids are padding, whose output has no meaning.
          text_segment_ids: the same for text; needed with more than one segment.
          text_of_tokens: the segment of text that a token attends to, where it is not its own.
          num_segments: static bound on the number of segments in a row.
          image_emb: image features of the whole row, or of each of s = `num_segments` segments.
          apart: blocks in which other segments than `segment_ids` see each other.
          around, cache: as in `__call__`; tokens are those that are worked on.

        Raises:
          ValueError: if the text is longer than `config.text_len`, or segment ids are given
            for text or image features but not for video.
        """
        config, count = self.config, x.shape[1]
        spare = heads.spare_tokens(config, count)
        if spare:  # once here, for otherwise each layer would fill up its operands, or share none
            if segment_ids is None:
                segment_ids = jnp.zeros(x.shape[:2], jnp.int32)
            fill = functools.partial(_fill_up, count=spare)
            filled = self.tokens(
                fill(x),
                fill(t) if t.shape[1] == count and not t_of_segments else t,
                text_emb,
                positions=fill(positions),
                text_mask=text_mask,
                segment_ids=fill(segment_ids, value=_FILL_SEGMENT),
                text_segment_ids=text_segment_ids,
                text_of_tokens=None if text_of_tokens is None else fill(text_of_tokens),
                num_segments=num_segments,
                t_of_segments=t_of_segments,
                image_emb=image_emb,
                apart=apart and apart._replace(ids=fill(apart.ids, value=_FILL_SEGMENT)),
                around=around,
                cache=cache,
            )
            return filled[:, :count]
        length = text_emb.shape[1]
        if text_segment_ids is None and length > config.text_len:
            raise ValueError(
                f"text of {length} tokens is longer than dit.text_len {config.text_len}; cut it "
                "or raise dit.text_len."
            )
        text_of_tokens = segment_ids if text_of_tokens is None else text_of_tokens
        if text_segment_ids is not None and text_of_tokens is None:
            raise ValueError("text_segment_ids need segment_ids; give both or neither.")
        if text_mask is None:
            text_mask = jnp.ones(text_emb.shape[:2], bool)
        if text_segment_ids is None and heads.takes_whole_text(config, count, length):
            text_emb, text_bias = embed.whole_text(text_emb, text_mask, config.text_len), None
        else:
            padding_rows = 1 if text_segment_ids is None else num_segments
            text_bias = embed.padding_bias(
                text_mask, text_segment_ids, text_len=config.text_len, num_segments=padding_rows
            )
            text_emb = embed.append_zero_rows(text_emb, padding_rows)
        if text_segment_ids is not None:
            ids = jnp.broadcast_to(jnp.arange(num_segments)[None], (x.shape[0], num_segments))
            text_segment_ids = jnp.concatenate(
                [text_segment_ids, ids.astype(text_segment_ids.dtype)], axis=1
            )
        membership = None
        if t_of_segments and num_segments > 1:
            numbers = jnp.arange(num_segments)[None, None]
            membership = (segment_ids[:, :, None] == numbers).astype(jnp.float32)
        time = self.time_embed(t)
        modulation = jnp.split(self.time_proj(jax.nn.silu(time)), 6, axis=-1)
        x = sharding.constrain(self.patch_embed(x), "batch", "tokens", "act_embed")
        blocks = functools.partial(
            self._run_blocks,
            text=self.text_embed(text_emb),
            modulation=modulation,
            rotation=rope.rotation(positions, config.head_dim),
            text_bias=text_bias,
            segment_ids=segment_ids,
            text_segment_ids=text_segment_ids,
            text_of_tokens=text_of_tokens,
            image=self._pictures(image_emb, segment_ids, num_segments),
            membership=membership,
            num_segments=num_segments,
            apart=apart,
            cache=cache,
        )
        x = blocks(x) if around is None else around(x, blocks)
        modulation_out = time[:, :, None] + self.modulation_out[...][None, None]
        shift, scale = (to_tokens(modulation_out[:, :, i], membership) for i in range(2))
        return self.proj_out(self.norm_out(x) * (1 + scale) + shift)

    def _pictures(
        self,
        image_emb: jax.Array | None,
        segment_ids: Int[Array, "b n"] | None,
        num_segments: int,
    ) -> Pictures | None:
        """Embedded image features, of the row or of its segments."""
        if image_emb is None:
            return None
        if self.image_embed is None:
            raise ValueError("image features were given to a model whose dit.image_dim is None.")
        if image_emb.ndim == 3:
            return Pictures(self.image_embed(image_emb))
        if segment_ids is None or image_emb.shape[1] != num_segments:
            raise ValueError(
                f"image features of {image_emb.shape[1]} segments need segment_ids, and "
                f"num_segments {num_segments} to be as many."
            )
        b, _, i, d = image_emb.shape
        rows = self.image_embed(image_emb.reshape(-1, i, d)).reshape(b, num_segments * i, -1)
        numbers = jnp.arange(num_segments, dtype=segment_ids.dtype)
        ids = jnp.broadcast_to(jnp.repeat(numbers, i)[None], rows.shape[:2])
        return Pictures(rows, ids, segment_ids)

    def _run_blocks(
        self,
        x: jax.Array,
        text: jax.Array,
        *,
        apart: Apart | None = None,
        cache: KVCache | None = None,
        **kwargs,
    ) -> jax.Array:
        """Scans the stacked blocks, or unrolls them, each rematerialised by `config.remat`."""
        graph, params = nnx.split(self.blocks, nnx.Param)
        config = self.config
        is_apart = None
        if apart is not None:
            is_apart = jnp.isin(jnp.arange(config.depth), jnp.array(apart.blocks))
        stacked = (params, is_apart, None if cache is None else cache.taken)

        def block(x, of_block):
            params, is_apart, taken = of_block
            x = heads.row_major(x, config)
            asked = None if apart is None else (apart, is_apart)
            own = None if cache is None else cache.of_block(taken)
            x = nnx.merge(graph, params)(x, text, apart=asked, cache=own, **kwargs)
            return x, None if own is None else own.stored

        if config.remat != "none":
            # Inside scan, nothing outside a block can be merged with its recomputation.
            policy = REMAT[config.remat]
            block = jax.checkpoint(block, policy=policy, prevent_cse=config.unroll)
        if config.unroll:
            stored = []
            for i in range(config.depth):
                x, own = block(x, jax.tree.map(operator.itemgetter(i), stacked))
                stored.append(own)
            stored = jax.tree.map(lambda *parts: jnp.stack(parts), *stored)
        else:
            x, stored = jax.lax.scan(block, x, stacked)
        if cache is not None:
            cache.stored = stored
        return x
