"""Times of tokens under the mixture of tasks, in packed rows and in batches of one size alike."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sora_jax.diffusion import tasks, times
from sora_jax.diffusion.tasks import TaskMixture, TokenTimes


def extents_of(
    positions: Int[Array, "b n 3"], segment_ids: Int[Array, "b n"], num_segments: int
) -> Int[Array, "b s 3"]:
    """Frames, rows and columns, in tokens, of each segment's video; 0 for those not there."""
    # Padding goes to a segment of its own, which is then left out.
    numbers = jnp.where(segment_ids < 0, num_segments, segment_ids)
    most = jax.vmap(lambda p, s: jax.ops.segment_max(p, s, num_segments=num_segments + 1))(
        positions, numbers
    )
    return jnp.maximum(most[:, :num_segments] + 1, 0)


def assign(
    key: PRNGKeyArray | jax.Array,
    mixture: TaskMixture,
    *,
    t: Float[Array, "b s"],
    positions: Int[Array, "b n 3"],
    segment_ids: Int[Array, "b n"],
    time_config: times.TimeConfig,
    shift: Float[Array, "b s"],
) -> TokenTimes:
    """Draws a mask for each segment; the times of its tokens, and which of them are counted.

    Args:
      t: time of each segment; `shift` is what it was drawn with.
      positions: (time, row, column) of each token in its video.
      segment_ids: in [0, s); others are padding, whose result has no meaning.
    """
    b, s = t.shape
    draw_key, token_key, frame_key = jax.random.split(key, 3)
    draws = tasks.draw(draw_key, (b, s), mixture)
    ids = jnp.clip(segment_ids, 0, s - 1)
    rows = jnp.arange(b)[:, None]
    of_token = jax.tree.map(lambda x: x[rows, ids], draws)
    extents = extents_of(positions, segment_ids, s)[rows, ids]

    def of_frame(number, frame):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(frame_key, number), frame))

    u_frame = jax.vmap(jax.vmap(of_frame))(rows * s + ids, positions[..., 0])
    # Clear of 0 and 1, whose quantiles are infinite.
    u_frame = jnp.clip(u_frame, 1e-6, 1 - 1e-6)
    return tasks.token_times(
        of_token,
        positions,
        extents,
        t=t[rows, ids],
        t_frame=times.from_uniform(u_frame, config=time_config, shift=shift[rows, ids]),
        u_token=jax.random.uniform(token_key, ids.shape),
    )
