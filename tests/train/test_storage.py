"""State in fewer bits or in the host's memory trains as state in float32 on the device."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import sharding
from sora_jax.train.loop import train
from sora_jax.train.metrics import read_metrics
from sora_jax.train.optimizer import OptimConfig
from sora_jax.train.program import build
from sora_jax.train.storage import round_at_random


def test_rounding_at_random_is_right_on_average_and_exact_where_it_can_be():
    x = jnp.full(40_000, 1 + 2**-7 * 0.3)  # bfloat16's neighbours are 1 and 1 + 2^-7
    rounded = np.asarray(round_at_random(x, jax.random.key(0)), np.float32)
    assert set(np.unique(rounded)) == {1.0, 1.0078125}
    assert abs((rounded > 1).mean() - 0.3) < 0.01
    exact = jnp.array([0.0, -0.0, 1.5, -3.0, 2.0**-120])
    np.testing.assert_array_equal(round_at_random(exact, jax.random.key(1)), exact)
    odd = round_at_random(jnp.array([jnp.inf, -jnp.inf, jnp.nan]), jax.random.key(2))
    assert np.isinf(odd[:2]).all() and np.isnan(odd[2])


def steps(config, count=4):
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
    program = build(config, mesh)
    state = jax.jit(program.init, out_shardings=program.placement)(jax.random.key(0))
    frozen = program.stage.place_frozen(mesh)
    rng = np.random.default_rng(0)
    latents = (config.batch_size, 2, 2, 2, program.stage.vae_config.z_dim)
    batch = {
        "latents": jnp.asarray(rng.standard_normal(latents, np.float32)),
        "ids": jnp.ones((config.batch_size, config.text_tokens), jnp.int32),
        "mask": jnp.ones((config.batch_size, config.text_tokens), bool),
    }
    losses = []
    for _ in range(count):
        state, metrics = program.step(state, frozen, batch, jax.random.key(1))
        losses.append(float(metrics["train/loss"]))
    return losses, state


def kernel(tree):
    return tree["dit"]["blocks"]["mlp"]["up"]["kernel"].get_raw_value()


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_offloaded_moments_train_alike(dit_config, name):
    dit_config.optim.update(name=name, grad_clip=0.01)
    losses, state = steps(dit_config)
    dit_config.optim.offload = True
    offloaded, offloaded_state = steps(dit_config)
    # AdamW goes through parameters in turn, is fused in other ways, and rounds in others.
    rtol, atol = {"muon": (0, 0), "adamw": (1e-5, 1e-8)}[name]
    np.testing.assert_allclose(offloaded, losses, rtol=rtol)
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, offloaded_state.params, state.params)
    jax.tree.map(close, offloaded_state.opt_state, state.opt_state)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(offloaded_state.opt_state) if x.ndim}
    assert kinds == {"pinned_host"}
    assert kernel(offloaded_state.params).sharding.memory_kind == "device"


def test_bfloat16_state_takes_half_and_follows_float32(dit_config):
    losses, state = steps(dit_config, count=20)
    dit_config.optim.update(param_dtype="bfloat16", moment_dtype="bfloat16", ema_decay=0.0)
    halved, halved_state = steps(dit_config, count=20)
    assert halved_state.ema == () and halved_state.averaged is halved_state.params
    assert kernel(halved_state.params).dtype == jnp.bfloat16
    norm = halved_state.params["dit"]["blocks"]["self_attention"]["norm_q"]["scale"]
    assert norm.get_raw_value().dtype == jnp.float32
    size = lambda state: sum(x.nbytes for x in jax.tree.leaves(state))  # noqa: E731
    assert size(halved_state) < 0.45 * size(state)  # no average either
    assert losses[0] - losses[-1] > 0.05
    np.testing.assert_allclose(halved, losses, atol=0.05 * losses[0])


def test_offloaded_state_resumes_bit_for_bit(dit_config, tmp_path):
    dit_config.optim.update(offload=True, ema_decay=0.0)
    dit_config.num_steps, dit_config.checkpoint_every, dit_config.sample_every = 4, 2, 0
    train(dit_config, tmp_path, devices=jax.devices()[:1])
    straight = read_metrics(tmp_path / "metrics.jsonl")["train/param_norm"]
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    train(dit_config, tmp_path, devices=jax.devices()[:1])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 4], "3 and 4 were done again"
    assert json.loads(lines[-1])["train/param_norm"] == straight[-1, 1]


def test_unknown_dtypes_are_refused(dit_config):
    fields = dit_config.optim.to_dict()
    with pytest.raises(
        ValueError, match=r"optim\.moment_dtype 'float16' is unknown; use float32 or"
    ):
        OptimConfig(**fields | {"moment_dtype": "float16"})
    assert dataclasses.replace(OptimConfig(**fields), param_dtype="bfloat16")
