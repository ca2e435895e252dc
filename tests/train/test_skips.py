"""Skipped steps: how many may be, what is told of them, and the limit that norms have."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.data import loader as loaders
from sora_jax.data import packing
from sora_jax.train.optimizer import make_optimizer
from sora_jax.train.skips import SkipConfig, Skips
from sora_jax.train.state import make_init
from sora_jax.train.step import make_train_step
from tests.train.test_step import OPTIM, STEPS, batch_of, init_params, squared_error


def metrics(*, loss=1.0, norm=1.0, skipped=0.0):
    return {"train/loss": loss, "train/grad_norm": norm, "train/skipped": skipped}


def bad(skips, step, **values):
    skips.judge(step, metrics(skipped=1.0, **values), records=lambda: [step, 40])


def test_without_leave_the_first_bad_step_stops_the_run_and_is_named(tmp_path):
    skips = Skips(SkipConfig(), file=tmp_path / "skipped.jsonl")
    skips.judge(1, metrics(), records=lambda: pytest.fail("nobody asked"))
    with pytest.raises(
        FloatingPointError, match=r"train/loss is nan at step 2; lower .* records 2, 40\."
    ):
        bad(skips, 2, loss=math.nan, norm=math.nan)
    row = json.loads((tmp_path / "skipped.jsonl").read_text())
    assert row == {"step": 2, "metric": "train/loss", "value": "nan", "records": [2, 40]}


def test_so_many_in_a_row_and_so_many_in_all_may_be_skipped(caplog):
    skips = Skips(SkipConfig(in_row=2, in_all=4))
    for step in (1, 2, 4, 5):
        bad(skips, step, norm=math.inf)
        if step == 2:
            skips.judge(3, metrics(), records=list)
    assert "train/grad_norm is inf at step 5: skipped; its batch is records 5, 40" in caplog.text
    again = Skips(SkipConfig(in_row=2, in_all=4))
    again.set_state(json.loads(json.dumps(skips.get_state())))
    skips.judge(6, metrics(), records=list)
    with pytest.raises(FloatingPointError, match=r"at step 7 \(1 skipped in a row, 5 in all\)"):
        bad(skips, 7, norm=math.inf)
    with pytest.raises(FloatingPointError, match=r"at step 6 \(3 skipped in a row, 5 in all\)"):
        bad(again, 6, norm=math.inf)


def test_the_limit_of_norms_goes_by_steps_two_before_and_is_the_same_after_a_restart():
    skips = Skips(SkipConfig(grad_norm=10.0, in_row=5))
    norms = np.random.default_rng(0).uniform(1, 2, 300)
    for step in range(1, 250):
        skips.judge(step, metrics(norm=norms[step]), records=list)
        limit = skips.limit(step + 1)
        if step <= 20:
            assert limit == math.inf
        else:
            expected = 10 * np.median(norms[max(1, step - 100) : step])
            assert limit == pytest.approx(expected)
        if step == 120:
            again = Skips(SkipConfig(grad_norm=10.0, in_row=5))
            again.set_state(json.loads(json.dumps(skips.get_state())))
        elif step > 120:
            again.judge(step, metrics(norm=norms[step]), records=list)
            assert again.limit(step + 1) == limit
    before = skips.limit(251)
    bad(skips, 250, norm=1e9)
    assert skips.limit(252) == pytest.approx(before, rel=0.05), "what was skipped is not usual"
    assert Skips(SkipConfig()).limit(100) is None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"in_row": -1}, "skip.in_row -1 must be 0 or more"),
        ({"grad_norm": 0.5}, "skip.grad_norm 0.5 would skip half of the steps"),
    ],
)
def test_settings_out_of_range_are_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        SkipConfig(**setting)


def test_a_skipped_step_changes_the_step_count_and_nothing_else():
    def loss(params, frozen, batch, key):
        error, metrics = squared_error(params, frozen, batch, key)
        return error * batch["factor"][0], metrics

    optimizer = make_optimizer(OPTIM, STEPS)
    step = jax.jit(make_train_step(loss, optimizer, OPTIM))
    key, good = jax.random.key(2), batch_of() | {"factor": jnp.ones(8)}
    state, first = step(make_init(init_params, optimizer)(jax.random.key(0)), (), good, key)
    assert first["train/skipped"] == 0
    for value, limit in ((math.nan, math.inf), (math.inf, math.inf), (1.0, 1e-3)):
        after, told = step(state, (), good | {"factor": jnp.full(8, value)}, key, limit)
        assert told["train/skipped"] == 1, (value, limit)
        assert after.step == state.step + 1 == 2
        for x, y in zip(jax.tree.leaves(after[1:]), jax.tree.leaves(state[1:]), strict=True):
            np.testing.assert_array_equal(x, y)
    free, _ = step(state, (), good, key, 1e9)
    assert not np.array_equal(free.params["bias"][...], state.params["bias"][...])
    groups = {name: value for name, value in first.items() if name.startswith("grad_norm/")}
    assert len(groups) == 2
    whole = np.sqrt(sum(float(value) ** 2 for value in groups.values()))
    np.testing.assert_allclose(whole, first["train/grad_norm"], rtol=1e-6)


class Numbers:
    """Record i is its number."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"number": np.int64(index)}


@pytest.mark.parametrize("planned", [False, True])
def test_the_loader_tells_which_records_a_batch_showed(planned):
    if planned:
        lengths = packing.Lengths(np.arange(10) % 3 + 1, np.ones(10, int))
        plan = packing.PackPlan(lengths, packing.PackSettings(4, 9, 4, 4, rows=2), seed=1)
        loader = loaders.make_planned_loader(
            Numbers(),
            plan,
            collate=lambda rows: {"number": np.array([r["number"] for row in rows for r in row])},
            seed=1,
        )
    else:
        loader = loaders.make_loader(Numbers(), batch_size=4, seed=1)
    seen = []
    for n in range(6):  # two epochs, each of an order of its own
        assert loader.batches_read == n
        seen.append(next(loader)["number"].tolist())
        assert loader.records(n) == seen[-1]
    order = [number for batch in seen for number in batch][:10]
    assert sorted(order) != order
    loader.close()
