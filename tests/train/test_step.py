"""The update rule: gradients of micro-batches, EMA, weight decay and schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import sharding
from sora_jax.dit.model import DiT, DiTConfig
from sora_jax.train.optimizer import OptimConfig, decays, make_optimizer, schedule
from sora_jax.train.state import make_init
from sora_jax.train.step import make_train_step

OPTIM = OptimConfig(
    name="adamw",
    peak_lr=0.1,
    warmup_steps=0,
    final_lr=0.1,
    b1=0.9,
    b2=0.99,
    weight_decay=0.0,
    grad_clip=1e9,
    accumulate=1,
    ema_decay=0.9,
)
STEPS = 20


def init_params(key):
    kernel_key, bias_key = jax.random.split(key)
    return {
        "kernel": nnx.Param(jax.random.normal(kernel_key, (3, 2)), axes=("embed", "mlp")),
        "bias": nnx.Param(jax.random.normal(bias_key, (2,)), axes=("mlp",)),
    }


def squared_error(params, frozen, batch, key):
    """A loss without randomness, so that a mean over halves is the mean of the whole."""
    y = batch["x"] @ params["kernel"][...] + params["bias"][...][None]
    error = jnp.mean(jnp.square(jnp.tanh(y) - batch["y"]))
    return error, {"train/error": error}


def batch_of(n=8):
    x_key, y_key = jax.random.split(jax.random.key(1))
    return {"x": jax.random.normal(x_key, (n, 3)), "y": jax.random.normal(y_key, (n, 2))}


def run(config=OPTIM, loss=squared_error, *, steps=1):
    """(states before and after every step, metrics of every step)."""
    optimizer = make_optimizer(config, STEPS)
    step = jax.jit(make_train_step(loss, optimizer, config))
    states, metrics = [make_init(init_params, optimizer)(jax.random.key(0))], []
    for _ in range(steps):
        state, values = step(states[-1], (), batch_of(), jax.random.key(2))
        states.append(state)
        metrics.append(values)
    return states, metrics


def assert_close(got, expected, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_micro_batches_equal_one_batch(accumulate):
    whole, whole_metrics = run(steps=3)
    parts, part_metrics = run(dataclasses.replace(OPTIM, accumulate=accumulate), steps=3)
    assert_close(parts[-1], whole[-1])
    assert_close(part_metrics, whole_metrics)


def test_micro_batches_draw_their_own_noise_and_every_step_its_own():
    def loss(params, frozen, batch, key):
        value, _ = squared_error(params, frozen, batch, key)
        return value, {"draw": jax.random.normal(key)}

    # The mean of two equal draws would be one of them.
    _, one = run(OPTIM, loss, steps=2)
    _, two = run(dataclasses.replace(OPTIM, accumulate=2), loss, steps=2)
    key = jax.random.fold_in(jax.random.key(2), 1)
    np.testing.assert_allclose(one[1]["draw"], jax.random.normal(key), rtol=1e-6)
    expected = np.mean([jax.random.normal(k) for k in jax.random.split(key, 2)])
    np.testing.assert_allclose(two[1]["draw"], expected, rtol=1e-6)
    assert one[0]["draw"] != one[1]["draw"]


def test_metric_missing_from_one_micro_batch_is_the_mean_of_the_others():
    def loss(params, frozen, batch, key):
        value, _ = squared_error(params, frozen, batch, key)
        first = batch["x"][0, 0] == batch_of()["x"][0, 0]
        return value, {"bucket": jnp.where(first, jnp.nan, 3.0)}

    _, metrics = run(dataclasses.replace(OPTIM, accumulate=2), loss)
    assert float(metrics[0]["bucket"]) == 3.0


def test_not_a_number_in_one_micro_batch_reaches_the_loss():
    def loss(params, frozen, batch, key):
        value, _ = squared_error(params, frozen, batch, key)
        first = batch["x"][0, 0] == batch_of()["x"][0, 0]
        return value * jnp.where(first, jnp.nan, 1.0), {}

    _, metrics = run(dataclasses.replace(OPTIM, accumulate=2), loss)
    assert np.isnan(metrics[0]["train/loss"]) and np.isnan(metrics[0]["train/grad_norm"])


def test_ema_is_the_running_average_with_a_growing_window():
    states, _ = run(dataclasses.replace(OPTIM, ema_decay=0.3), steps=6)
    expected = np.asarray(states[0].params["kernel"][...])
    for step, state in enumerate(states[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["kernel"][...])
        np.testing.assert_allclose(state.ema["kernel"][...], expected, rtol=1e-5, atol=1e-6)
    assert (1 + 2) / (10 + 2) < 0.3 < (1 + 3) / (10 + 3), "both branches must have been taken"


def test_reported_norms_are_those_before_clipping_and_after_the_update():
    def norm(tree):
        return np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree)))

    states, metrics = run(dataclasses.replace(OPTIM, grad_clip=1e-3))
    (loss, _), grads = jax.value_and_grad(squared_error, has_aux=True)(
        states[0].params, (), batch_of(), None
    )
    np.testing.assert_allclose(metrics[0]["train/loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics[0]["train/grad_norm"], norm(grads), rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["train/param_norm"], norm(states[1].params), rtol=1e-5)
    # Adam's first moment has seen the clipped gradient.
    moment = states[1].opt_state[1][0].mu
    np.testing.assert_allclose(norm(moment), (1 - OPTIM.b1) * 1e-3, rtol=1e-4)


def test_weight_decay_pulls_kernels_and_nothing_else():
    flat = lambda params, frozen, batch, key: (  # noqa: E731
        sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)) * 0.0,
        {},
    )
    states, _ = run(dataclasses.replace(OPTIM, weight_decay=0.5), flat)
    before, after = states[0].params, states[1].params
    np.testing.assert_allclose(after["kernel"][...], before["kernel"][...] * (1 - 0.1 * 0.5))
    np.testing.assert_array_equal(after["bias"][...], before["bias"][...])


def test_weight_decay_spares_stacked_biases_norms_and_tables():
    config = DiTConfig(
        in_channels=4, out_channels=4, depth=3, width=12, num_heads=2, ffn_dim=8, text_dim=6
    )
    model = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    params = nnx.split(model, nnx.Param)[1]
    seen = {True: set(), False: set()}
    for path, decayed in nnx.to_flat_state(decays(params)):
        seen[bool(decayed.get_raw_value())].add(path[-1])
    assert seen[True] == {"kernel"}
    assert {"bias", "scale", "modulation", "modulation_out"} <= seen[False]
    assert "kernel" not in seen[False]


def test_muon_orthogonalises_each_layer_of_a_stacked_kernel_and_nothing_else():
    shapes = {"kernel": ((3, 6, 4), ("embed", "mlp")), "bias": ((3, 4), ("mlp",))}
    keys = jax.random.split(jax.random.key(0), 2)
    gradients = {
        name: nnx.Param(jax.random.normal(key, shape), axes=axes)
        for key, (name, (shape, axes)) in zip(keys, shapes.items(), strict=True)
    }
    config = dataclasses.replace(OPTIM, name="muon")
    optimizer = make_optimizer(config, STEPS)
    params = jax.tree.map(jnp.zeros_like, gradients)
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    kernel = np.asarray(updates["kernel"][...])
    for layer in kernel:
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.max() < 2 * singular.min()
        # The root mean square of Adam's updates, arXiv:2502.16982.
        np.testing.assert_allclose(np.sqrt(np.mean(layer**2)), 0.2 * 0.1, rtol=0.25)
    # Adam's first step: every value moves by the learning rate, downhill.
    bias = np.asarray(updates["bias"][...] * -jnp.sign(gradients["bias"][...]))
    np.testing.assert_allclose(bias, 0.1, rtol=1e-4)
    # The momenta lie on the mesh as their kernels do.
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    placed = jax.tree.leaves(sharding.tree_shardings(state, mesh))
    wanted = sharding.tree_shardings(params, mesh)["kernel"].get_raw_value()
    assert [leaf.spec for leaf in placed].count(wanted.spec) == 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay_and_the_others_move_as_before(name):
    config = dataclasses.replace(OPTIM, name=name, weight_decay=0.1)
    states, metrics = run(dataclasses.replace(config, freeze=("kernel",)), steps=3)
    before, after = states[0].params, states[-1].params
    np.testing.assert_array_equal(after["kernel"][...], before["kernel"][...])
    assert (after["bias"][...] != before["bias"][...]).all()
    free_states, free_metrics = run(config, steps=1)
    assert_close(states[1].params["bias"], free_states[1].params["bias"])
    assert metrics[0]["train/grad_norm"] < free_metrics[0]["train/grad_norm"]


def test_a_freeze_that_names_nothing_is_refused():
    config = dataclasses.replace(OPTIM, freeze=("kernel", "bias/encoder"))
    with pytest.raises(ValueError, match="names bias/encoder, which is no part of the model"):
        run(config)


def test_schedule_rises_to_its_peak_and_ends_at_its_share():
    config = dataclasses.replace(OPTIM, peak_lr=2e-3, warmup_steps=10, final_lr=0.05)
    rate = schedule(config, 100)
    points = [float(rate(step)) for step in (0, 5, 10, 55, 100, 200)]
    middle = 2e-3 * (0.05 + 0.95 / 2)
    np.testing.assert_allclose(points, [0, 1e-3, 2e-3, middle, 1e-4, 1e-4], rtol=1e-5)


def test_wsd_stays_at_its_peak_then_falls_as_a_square_root():
    config = dataclasses.replace(
        OPTIM, peak_lr=2e-3, warmup_steps=10, final_lr=0.05, schedule="wsd", decay_share=0.2
    )
    rate = schedule(config, 100)
    points = [float(rate(step)) for step in (0, 5, 10, 79, 80, 85, 100, 200)]
    quarter = 2e-3 * (1 - 0.95 / 2)
    np.testing.assert_allclose(points, [0, 1e-3, 2e-3, 2e-3, 2e-3, quarter, 1e-4, 1e-4], rtol=1e-5)


def test_wsd_resumed_with_more_steps_has_taken_those_of_the_longer_run():
    config = dataclasses.replace(OPTIM, warmup_steps=10, schedule="wsd")
    short, long = schedule(config, 100), schedule(config, 1000)
    assert [float(short(s)) for s in range(81)] == [float(long(s)) for s in range(81)]
    assert float(short(90)) < float(long(90))


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_schedule_of_a_run_shorter_than_its_warmup_stays_finite(num_steps, name):
    config = dataclasses.replace(OPTIM, schedule=name)
    rates = [float(schedule(config, num_steps)(step)) for step in range(num_steps + 1)]
    config = dataclasses.replace(config, warmup_steps=100)
    rates += [float(schedule(config, num_steps)(step)) for step in range(num_steps + 1)]
    assert np.isfinite(rates).all() and min(rates) >= 0 and max(rates) < 0.1001


@pytest.mark.parametrize(
    "change",
    [
        {"name": "adam"},
        {"peak_lr": 0.0},
        {"accumulate": 0},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"warmup_steps": -1},
        {"grad_clip": 0.0},
        {"schedule": "linear"},
        {"decay_share": 0},
        {"decay_share": 1.5},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(change):
    name = next(iter(change))
    with pytest.raises(
        ValueError, match=rf"optim.{name} .*(must be|use adamw or muon|use cosine or wsd)"
    ):
        dataclasses.replace(OPTIM, **change)
