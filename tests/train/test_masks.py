"""The mixture of tasks in a training step, packed and at one size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import tasks, times
from sora_jax.diffusion.tasks import TaskMixture
from sora_jax.dit import patchify
from sora_jax.train import masks

GRIDS = ((5, 2, 2), (1, 4, 3), (3, 1, 2))
TIMES = jnp.array([[0.3, 0.6, 0.9, 0.1]])
SHIFT = jnp.ones_like(TIMES)


@pytest.fixture
def row():
    """Positions and segment ids of three videos and some padding in a row."""
    parts = [np.asarray(patchify.positions(*grid)) for grid in GRIDS]
    ids = np.concatenate([np.full(len(p), i) for i, p in enumerate(parts)] + [np.full(4, -1)])
    positions = np.concatenate([*parts, np.zeros((4, 3), np.int32)])
    return jnp.asarray(positions)[None], jnp.asarray(ids, jnp.int32)[None]


def assigned(row, mixture, key=0):
    positions, ids = row
    return masks.assign(
        jax.random.key(key),
        mixture,
        t=TIMES,
        positions=positions,
        segment_ids=ids,
        time_config=times.TimeConfig("uniform"),
        shift=SHIFT,
    )


def test_extents_are_those_of_each_video(row):
    extents = masks.extents_of(*row, 4)
    assert extents[0, :3].tolist() == [list(grid) for grid in GRIDS]
    assert extents[0, 3].tolist() == [0, 0, 0], "a segment that is not there"


def test_given_tokens_are_clean_and_not_counted(row):
    t, counted = (np.asarray(x)[0] for x in assigned(row, TaskMixture({"first": 1})))
    positions, ids = (np.asarray(x)[0] for x in row)
    given = (positions[:, 0] == 0) & np.isin(ids, (0, 2))  # 1 is an image
    real = ids >= 0
    assert (counted[real] == ~given[real]).all()
    assert (t[given] == 0).all()
    for segment in range(3):
        noisy = (ids == segment) & ~given
        np.testing.assert_array_equal(t[noisy], TIMES[0, segment])


def test_frames_have_times_of_their_own_by_diffusion_forcing(row):
    t = np.asarray(assigned(row, TaskMixture({"none": 1}, frame_noise=1.0)).t)[0]
    positions, ids = (np.asarray(x)[0] for x in row)
    by_frame = {}
    for place, segment, value in zip(positions, ids, t, strict=True):
        by_frame.setdefault((segment, place[0]), set()).add(float(value))
    assert all(len(values) == 1 for (s, _), values in by_frame.items() if s >= 0)
    assert len({v for (s, _), values in by_frame.items() if s >= 0 for v in values}) == 5 + 1 + 3


def test_given_tokens_are_noised_a_little_where_asked(row):
    mixture = TaskMixture({"prefix": 1}, given_noise=0.2)
    given = []
    for key in range(30):
        t, counted = (np.asarray(x)[0] for x in assigned(row, mixture, key))
        given += t[~counted & (np.asarray(row[1])[0] == 0)].tolist()
    assert min(given) == 0 and 0.1 < max(given) < 0.2


def test_the_loss_counts_noisy_tokens_alone(dit_config):
    """What a model says of given tokens changes nothing, and they are clean when it sees them."""
    from sora_jax.train.dit_stage import DiTStage

    dit_config.tasks.weights = {"first": 1.0}
    stage = DiTStage(dit_config)
    seen = {}

    def velocity(params, text_emb, mask):
        def run(x_t, t):
            seen.update(x_t=x_t, t=t)
            first = jnp.arange(x_t.shape[1])[None, :, None, None, None] == 0
            return jnp.where(first, params * jnp.ones_like(x_t), jnp.zeros_like(x_t))

        return run

    stage.velocity = velocity
    stage.text.embed = lambda *_: (jnp.zeros((2, 1, 1)), jnp.ones((2, 1), bool))
    x0 = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, stage.vae_config.z_dim))
    batch = {"latents": x0, "ids": jnp.zeros((2, 1), jnp.int32)}
    losses = [stage.loss(params, {}, batch, jax.random.key(1))[0] for params in (0.0, 1e3)]
    assert float(losses[0]) == float(losses[1]) > 0
    np.testing.assert_array_equal(seen["x_t"][:, 0], x0[:, 0])
    assert (seen["x_t"][:, 1:] != x0[:, 1:]).all()
    assert (seen["t"][:, 0] == 0).all() and (seen["t"][:, 1:] > 0).all()


def test_names_of_the_masks_are_kept_in_order():
    assert tasks.MASKS[:2] == ("none", "first"), "numbers are drawn: new ones go to the end"
