"""Plans: every record once an epoch, budgets kept, rows well filled, the same wherever resumed."""

import numpy as np
import pytest

from sora_jax.data.packing import (
    PADDING_SEGMENT,
    BucketPlan,
    Lengths,
    PackPlan,
    PackSettings,
    Segment,
    pack,
)

SETTINGS = PackSettings(tokens=1024, text_tokens=256, max_segments=64, look_ahead=32, rows=4)


def mixed_lengths(count=2000, seed=0):
    """Clips of 1 to 9 latent frames, from 2:1 to 1:2, in patches of 16 pixels; short captions."""
    rng = np.random.default_rng(seed)
    sides = np.array([(4, 4), (4, 8), (8, 4), (6, 4), (4, 6)])
    chosen = sides[rng.integers(len(sides), size=count)]
    return Lengths(rng.integers(1, 10, count) * chosen.prod(axis=1), rng.integers(5, 20, count))


def epoch_of(plan, epoch):
    rows, n = [], 0
    while True:
        row = plan.row(n)
        if row[0].epoch > epoch:
            return rows
        rows += [row] if row[0].epoch == epoch else []
        n += 1


def test_every_record_is_in_one_row_of_an_epoch_and_no_budget_is_exceeded():
    lengths = mixed_lengths()
    plan = PackPlan(lengths, SETTINGS, seed=3)
    for epoch in (0, 1):
        rows = epoch_of(plan, epoch)
        assert sorted(pick.index for row in rows for pick in row) == list(range(2000))
        assert {pick.epoch for row in rows for pick in row} == {epoch}
        for row in rows:
            members = [pick.index for pick in row]
            assert lengths.tokens[members].sum() <= 1024
            assert lengths.text[members].sum() <= 256
            assert len(members) <= 64
    assert epoch_of(plan, 0) != epoch_of(plan, 1)


def test_rows_are_filled_and_a_wider_look_ahead_fills_them_better():
    fills = [
        PackPlan(mixed_lengths(), PackSettings(1024, 999, 64, look_ahead), seed=0).fill()
        for look_ahead in (1, 4, 32)
    ]
    assert fills[2] > 0.97
    assert fills[0] < fills[1] < fills[2]


def test_one_segment_a_row_is_padding():
    lengths = mixed_lengths()
    plan = PackPlan(lengths, PackSettings(288, 256, 1, 32), seed=0)
    assert all(len(row) == 1 for row in epoch_of(plan, 0))
    assert plan.fill() == pytest.approx(lengths.tokens.mean() / 288)


def test_a_batch_depends_on_seed_and_number_alone():
    def batches(seed, numbers):
        plan = PackPlan(mixed_lengths(), SETTINGS, seed=seed)
        return [plan.batch(n) for n in numbers]

    assert batches(1, [7, 200, 8])[1:] == batches(1, [200, 8])
    assert batches(1, [7]) != batches(2, [7])


def test_buckets_hold_one_size_each_and_every_record_comes():
    lengths = mixed_lengths()
    plan = BucketPlan(lengths, lengths.tokens.tolist(), tokens=2048, seed=0, multiple=2)
    seen, n = [], 0
    while plan.batch(n)[0][0].epoch == 0:
        members = [pick.index for (pick,) in plan.batch(n)]
        sizes = set(lengths.tokens[members].tolist())
        assert len(sizes) == 1
        assert len(members) == 2048 // sizes.pop() // 2 * 2
        seen += members
        n += 1
    assert set(seen) == set(range(2000))
    most = sum(2048 // size // 2 * 2 for size in set(lengths.tokens.tolist()))
    assert len(seen) < 2000 + most, "only the last batch of a bucket is filled up"
    again = BucketPlan(lengths, lengths.tokens.tolist(), tokens=2048, seed=0, multiple=2)
    assert again.batch(n + 5) == plan.batch(n + 5)
    # Other shards make other batches: a run on them must not go on in the middle of these.
    other = BucketPlan(lengths, lengths.tokens.tolist(), tokens=2048, seed=0, multiple=4)
    assert other.batch(n) != plan.batch(n) and repr(other) != repr(plan) == repr(again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            PackSettings(100, 256, 4),
            r"has \d+ video tokens, a row takes 100; raise config.data.pack.tok",
        ),
        (PackSettings(1024, 9, 4), r"has \d+ text tokens, a row takes 9; raise"),
    ],
)
def test_records_over_the_budget_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PackPlan(mixed_lengths(), settings, seed=0)


def test_settings_and_buckets_out_of_range_are_refused():
    with pytest.raises(ValueError, match="look_ahead 0 must be 1 or more"):
        PackSettings(1, 1, 1, 0)
    with pytest.raises(ValueError, match="2 of them do not fit into a batch of 300; raise"):
        BucketPlan(Lengths(np.array([200]), np.array([1])), [0], tokens=300, seed=0, multiple=2)
    empty = Lengths(np.array([], int), np.array([], int))
    with pytest.raises(ValueError, match="no records"):
        PackPlan(empty, SETTINGS, seed=0)


def segment(tokens, text, value):
    positions = np.arange(3 * tokens, dtype=np.int32).reshape(-1, 3)
    return Segment(np.full((tokens, 2), value, np.float32), positions, [np.arange(1, text + 1)])


def test_a_row_tells_its_segments_apart_and_pads():
    row = pack([segment(3, 2, 1.0), segment(2, 1, 2.0)], PackSettings(8, 5, 2))
    pad = PADDING_SEGMENT
    np.testing.assert_array_equal(row["segment_ids"], [0, 0, 0, 1, 1, pad, pad, pad])
    np.testing.assert_array_equal(row["tokens"][:, 0], [1, 1, 1, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(row["positions"][3], [0, 1, 2])
    np.testing.assert_array_equal(row["ids"], [1, 2, 1, 0, 0])
    np.testing.assert_array_equal(row["text_segment_ids"], [0, 0, 1, pad, pad])
    np.testing.assert_array_equal(row["text_positions"], [0, 1, 0, 0, 0])


def test_what_lies_beside_tokens_and_segments_is_padded_like_them():
    segments = [
        segment(tokens, 1, 0.0)._replace(
            given=np.full((tokens, 3), v), image_emb=np.full((2, 4), v)
        )
        for tokens, v in ((3, 1.0), (2, 2.0))
    ]
    row = pack(segments, PackSettings(6, 5, 3))
    np.testing.assert_array_equal(row["given"][:, 2], [1, 1, 1, 2, 2, 0])
    np.testing.assert_array_equal(row["image_emb"][:, 1, 3], [1, 2, 0])
    assert row["image_emb"].shape == (3, 2, 4)


def test_a_segment_of_several_texts_counts_as_several():
    both = segment(3, 2, 1.0)._replace(
        texts=[np.array([7, 8]), np.array([9])], text_of_tokens=np.array([0, 1, 1])
    )
    row = pack([segment(2, 1, 2.0), both], PackSettings(6, 5, 3))
    np.testing.assert_array_equal(row["segment_ids"], [0, 0, 1, 1, 1, PADDING_SEGMENT])
    np.testing.assert_array_equal(row["text_of_tokens"], [0, 0, 1, 2, 2, PADDING_SEGMENT])
    np.testing.assert_array_equal(row["ids"], [1, 7, 8, 9, 0])
    np.testing.assert_array_equal(row["text_segment_ids"], [0, 1, 1, 2, PADDING_SEGMENT])
    np.testing.assert_array_equal(row["text_positions"], [0, 0, 1, 0, 0])
    texts = np.array([1, 2, 2, 1, 1, 1])
    lengths = Lengths(np.ones(6, int), np.ones(6, int), texts)
    plan = PackPlan(lengths, PackSettings(6, 6, 3), seed=0)
    rows = [[pick.index for pick in plan.row(i)] for i in range(3)]
    assert sorted(i for row in rows for i in row) == list(range(6))
    assert all(texts[row].sum() <= 3 for row in rows)
    with pytest.raises(
        ValueError, match="record 1 has 2 sentences with time stamps, a row takes 1"
    ):
        PackPlan(lengths, PackSettings(6, 6, 1), seed=0)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 segments of 2 texts do not fit a row of 1"):
        pack([segment(1, 1, 0.0)] * 2, PackSettings(8, 8, 1))
    with pytest.raises(ValueError, match="holds 9 tokens, 8 fit"):
        pack([segment(9, 1, 0.0)], PackSettings(8, 8, 1))
