"""A packed row is its members run alone: loss, gradients, and nothing seen across segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.data.packing import PADDING_SEGMENT, PackSettings, pack
from sora_jax.diffusion import objective
from sora_jax.dit import patchify
from sora_jax.prompts import timed
from sora_jax.text.tokenizer import ByteTokenizer
from sora_jax.train import packed
from sora_jax.train.batches import Segmenter
from sora_jax.train.dit_stage import DiTStage

SIZES = [(2, 3, 2), (1, 2, 2), (3, 1, 2), (1, 4, 1)]  # latent frames, rows, columns
CAPTIONS = ["a ball", "", "two words more", "x"]
SETTINGS = PackSettings(tokens=40, text_tokens=48, max_segments=5)
TIMES = jnp.array([[0.3, 0.9, 0.5, 1.0, 0.7]])


@pytest.fixture
def stage(dit_config):
    dit_config.data.batching = "pack"
    dit_config.data.pack.max_segments = SETTINGS.max_segments
    return DiTStage(dit_config)


@pytest.fixture
def params(stage):
    """No parameter is zero, so that no gate hides a path."""
    leaves, tree = jax.tree.flatten(stage.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, draw)


def records():
    rng = np.random.default_rng(0)
    return [
        {"latents": rng.standard_normal((*size, 4), np.float32), "caption": caption}
        for size, caption in zip(SIZES, CAPTIONS, strict=True)
    ]


@pytest.fixture
def batch(stage):
    segment = Segmenter(ByteTokenizer(), stage.text.text_tokens, stage.dit_config.patch_size)
    row = pack([segment(record) for record in records()], SETTINGS)
    return {name: jnp.asarray(value)[None] for name, value in row.items()}


def noise():
    return jax.random.normal(jax.random.key(3), (1, SETTINGS.tokens, 4))


def text_of(stage, params, batch):
    """Embedded captions, none of them dropped."""
    none = jnp.zeros((1, SETTINGS.max_segments), bool)
    return stage.text.embed_packed(params, {}, batch, none)


def losses_of(velocity, x0, batch):
    """Losses at TIMES, which the model is told by segment."""
    ids = batch["segment_ids"]
    return packed.segment_losses(
        functools.partial(velocity, t=TIMES, t_of_segments=True),
        x0,
        noise=noise(),
        t=packed.spread(TIMES, ids),
        segment_ids=ids,
        num_segments=SETTINGS.max_segments,
    )


def packed_losses(params, stage, batch):
    velocity = stage.packed_velocity(params, text_of(stage, params, batch), batch)
    return losses_of(velocity, batch["tokens"], batch)


def alone_losses(params, stage):
    """Each clip by the path that a batch of one size takes, with the noise of its place."""
    losses, start = [], 0
    text = stage.text.encoder(params, {})
    for i, record in enumerate(records()):
        count = int(np.prod(SIZES[i]))
        own = noise()[:, start : start + count]
        start += count
        texts = ByteTokenizer().batch([record["caption"]], length=stage.text.text_tokens)
        ids, mask = map(jnp.asarray, texts)
        losses.append(
            objective.flow_matching_loss(
                stage.velocity(params, text(ids, mask), mask),
                jnp.asarray(record["latents"])[None],
                noise=patchify.unpatchify(own, (1, 1, 1), grid=SIZES[i]),
                t=TIMES[:, i],
            )[0]
        )
    return jnp.stack(losses)


def test_losses_and_gradients_of_a_row_are_those_of_its_members_alone(stage, params, batch):
    def mean_packed(params):
        losses = packed_losses(params, stage, batch)
        sizes = packed.segment_sizes(batch["segment_ids"], SETTINGS.max_segments)
        return packed.mean_over_segments(losses, sizes, weight="clip"), losses

    def mean_alone(params):
        losses = alone_losses(params, stage)
        return jnp.mean(losses), losses

    grad = functools.partial(jax.value_and_grad, has_aux=True)
    (loss, losses), gradients = jax.jit(grad(mean_packed))(params)
    (expected, alone), expected_gradients = jax.jit(grad(mean_alone))(params)
    np.testing.assert_allclose(losses[0, :4], alone, rtol=1e-5)
    assert losses[0, 4] == 0, "a segment that is not there"
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for got, want in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()) + 1e-7)


@pytest.mark.parametrize("kernel", ["reference", "xla", "blocked"])
def test_no_segment_sees_anything_of_another(dit_config, params, batch, kernel):
    dit_config.data.batching = "pack"
    dit_config.data.pack.max_segments = SETTINGS.max_segments
    dit_config.dit.attention = kernel
    stage = DiTStage(dit_config)
    table = stage.text.encoder(params, {}).embed
    ids = batch["text_segment_ids"]

    def losses(x0, embedded):
        """As `packed_losses`, from the text's token embeddings on."""
        encoder = stage.text.encoder(params, {})
        encoder.embed = lambda _: embedded
        emb = encoder(batch["ids"], ids != PADDING_SEGMENT, segment_ids=ids)
        velocity = stage.packed_velocity(params, packed.PackedText(emb, ids), batch)
        return losses_of(velocity, x0, batch)[0]

    embedded = table(batch["ids"]).astype(jnp.float32)
    by_video, by_text = jax.jit(jax.jacrev(losses, argnums=(0, 1)))(batch["tokens"], embedded)
    for of, places in ((by_video, batch["segment_ids"]), (by_text, ids)):
        reach = np.abs(of).max(axis=(1, 3))  # (segment, place)
        for segment in range(4):
            own = np.asarray(places[0]) == segment
            assert (reach[segment, own] > 0).all()
            assert (reach[segment, ~own] == 0).all()


STAMPED = "[0s-1s] a ball [1s-3s] a box"


@pytest.fixture
def stamped(stage):
    """A row of which the second clip has a time-stamped caption."""
    segment = Segmenter(
        ByteTokenizer(), stage.text.text_tokens, stage.dit_config.patch_size, temporal=4
    )
    first, _, clip, _ = (segment(record | {"fps": 4.0}) for record in records())
    told = segment(records()[2] | {"caption": STAMPED, "fps": 4.0})
    assert len(clip.texts) == 1 and len(told.texts) == 2
    row = pack([first, told], SETTINGS)
    return {name: jnp.asarray(value)[None] for name, value in row.items()}


def test_each_frame_of_a_packed_clip_follows_the_text_of_its_time(stage, params, stamped):
    losses = losses_of(
        stage.packed_velocity(params, text_of(stage, params, stamped), stamped),
        stamped["tokens"],
        stamped,
    )
    texts, of_frames = timed.latent_texts(STAMPED, frames=9, fps=4.0, temporal=4)
    assert of_frames.tolist() == [0, 0, 1]
    ids, mask = map(jnp.asarray, ByteTokenizer().batch(texts, length=24))
    emb = stage.text.encoder(params, {})(ids, mask)
    dit = nnx.merge(stage.dit_graphdef, params["dit"])
    start, count = int(np.prod(SIZES[0])), int(np.prod(SIZES[2]))
    alone = objective.flow_matching_loss(
        lambda x, t: dit(
            x,
            t,
            emb.reshape(1, 48, -1),
            text_mask=mask.reshape(1, 48),
            text_segment_ids=jnp.repeat(jnp.arange(2), 24)[None],
            text_of_frames=jnp.asarray(of_frames)[None],
            num_texts=2,
        ),
        jnp.asarray(records()[2]["latents"])[None],
        noise=patchify.unpatchify(noise()[:, start : start + count], (1, 1, 1), grid=SIZES[2]),
        t=TIMES[:, 1],
    )
    np.testing.assert_allclose(losses[0, 1], alone[0], rtol=1e-5)


def test_all_texts_of_a_dropped_clip_are_dropped(stamped):
    drop = jnp.array([[False, True, True, False, False]])
    texts = packed.of_texts(drop, stamped["segment_ids"], stamped["text_of_tokens"])
    np.testing.assert_array_equal(texts, [[False, True, True, False, False]])
    texts = packed.of_texts(~drop, stamped["segment_ids"], stamped["text_of_tokens"])
    np.testing.assert_array_equal(texts, [[True, False, False, False, False]])


def test_dropped_captions_become_the_empty_one(batch):
    drop = jnp.array([[True, False, False, True, False]])
    empty = jnp.asarray(ByteTokenizer().batch([""], length=1)[0][0])
    given = packed.PackedText(batch["ids"], batch["text_segment_ids"])
    text = packed.drop_captions(given, batch["text_positions"], drop, empty=empty)
    for i, caption in enumerate(CAPTIONS):
        shown = "" if drop[0, i] else caption
        ids, mask = ByteTokenizer().batch([shown], length=24)
        got = text.values[0][text.segment_ids[0] == i]
        np.testing.assert_array_equal(got, ids[0][mask[0]])


def test_time_is_that_of_the_own_segment_and_padding_has_none(batch):
    t = packed.spread(TIMES, batch["segment_ids"])[0]
    ids = np.asarray(batch["segment_ids"][0])
    for segment in range(4):
        np.testing.assert_array_equal(t[ids == segment], TIMES[0, segment])
    np.testing.assert_array_equal(t[ids == PADDING_SEGMENT], 0)


@pytest.mark.parametrize(("weight", "expected"), [("clip", 2.0), ("token", 1.5)])
def test_means_count_every_clip_or_every_token_alike(weight, expected):
    losses, sizes = jnp.array([[1.0, 3.0, 9.0]]), jnp.array([[9, 3, 0]])
    assert packed.mean_over_segments(losses, sizes, weight=weight) == expected
    with pytest.raises(ValueError, match="pack_weight 'row': use one of clip, token"):
        packed.mean_over_segments(losses, sizes, weight="row")


def test_padding_may_hold_anything(stage, params, batch):
    wild = batch["tokens"].at[:, -5:].set(1e3)
    np.testing.assert_allclose(
        packed_losses(params, stage, batch | {"tokens": wild}),
        packed_losses(params, stage, batch),
        rtol=1e-6,
    )


def test_loss_of_the_stage_on_a_row_is_finite_and_counts_its_fill(stage, params, batch):
    loss, metrics = jax.jit(stage.loss)(params, stage.frozen, batch, jax.random.key(5))
    assert np.isfinite(loss)
    assert metrics["packing/fill"] == pytest.approx(sum(np.prod(s) for s in SIZES) / 40)
    assert stage.tokens(batch) == 40
