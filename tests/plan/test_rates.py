import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl

from sora_jax import chips, config_file, flash, sharding
from sora_jax.blocked_attention import Keys
from sora_jax.chips import GIB
from sora_jax.dit.config import REMAT, DiTConfig
from sora_jax.dit.model import DiT
from sora_jax.plan import (
    count,
    kernels,
    planning,
    policies,
    published,
    report,
    roofline,
    search,
    steps,
    topology,
)
from sora_jax.train import program


def chip(name):
    return next(c for c in chips.CHIPS if c.name == name)


def test_products_are_counted_through_loops_and_recomputation():
    def loss(w, x):
        def layer(x, w):
            return jnp.sin(x @ w), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0])

    w, x = jnp.zeros((5, 16, 16)), jnp.zeros((8, 16))
    one = 2 * 8 * 16 * 16
    assert count.of_function(loss, w, x)["matmul"] == 5 * one
    # Forward, again in the backward pass, and two products there.
    assert count.of_function(jax.grad(loss, argnums=(0, 1)), w, x)["matmul"] == 5 * 4 * one


def test_what_no_result_needs_does_not_count():
    def f(x):
        _ = x @ x
        return x @ x + 1

    assert count.of_function(f, jnp.zeros((8, 8)))["matmul"] == 2 * 8**3


def test_kept_attention_counts_once():
    def executed(remat):
        config = DiTConfig(
            **{"depth": 3, "width": 256, "num_heads": 2, "ffn_dim": 256, "freq_dim": 64},
            **{"text_dim": 64, "text_len": 64, "dtype": "bfloat16"},
            attention="flash",
            remat=remat,
        )
        graph, params = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))), nnx.Param)
        x, text = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 8, 32, 32, 16), (1, 64, 64)))
        loss = lambda p, x, text: jnp.sum(nnx.merge(graph, p)(x, jnp.ones(1), text) ** 2)  # noqa: E731
        return count.of_function(lambda *a: jax.grad(loss)(*a), params, x, text)

    full, kept = executed("full"), executed("attention_out")
    assert full["flash_attention_forward"] == 2 * kept["flash_attention_forward"] > 0
    assert full["flash_attention_backward"] == kept["flash_attention_backward"] > 0


def test_a_pass_over_memory_takes_its_bytes_or_its_instructions():
    v5p, values = chip("v5p"), 40 * 1024 * 128
    seconds = lambda moved: kernels.pass_seconds("heads_forward", v5p, values=values, moved=moved)  # noqa: E731
    assert seconds(1e9) == pytest.approx(1e9 / 2765e9)
    # 8 tiles of 128 tokens, 40 heads, shared by two cores at 1.75 GHz.
    assert seconds(0) == pytest.approx(8 * 40 * 86.5 / 2 / 1.751e9, rel=1e-3)


def test_convolutions_and_branches_are_counted():
    def f(x, k):
        y = jax.lax.conv(x, k, (1, 1), "SAME")
        return jax.lax.cond(y[0, 0, 0, 0] > 0, lambda y: y[0, 0] @ y[0, 1], lambda y: y[0, 0], y)

    found = count.of_function(f, jnp.zeros((1, 3, 8, 8)), jnp.zeros((4, 3, 3, 3)))
    assert found == {"conv": 2 * 4 * 8 * 8 * 3 * 9, "matmul": 2 * 8**3}


def test_kernels_count_by_their_grid_and_one_of_a_tiles_ways():
    def kernel(x, y, out):
        @pl.when(pl.program_id(0) == 0)
        def first():
            out[...] = x[...] @ y[...]

        @pl.when(pl.program_id(0) > 0)
        def rest():
            out[...] = x[...] @ y[...] + 1

    def f(x, y):
        whole = pl.BlockSpec((8, 8), lambda i: (0, 0))
        return pl.pallas_call(
            kernel,
            grid=(3,),
            in_specs=[whole, whole],
            out_specs=whole,
            out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32),
            name="tile_kernel",
            interpret=True,
        )(x, y)

    found = count.of_function(f, jnp.zeros((8, 8)), jnp.zeros((8, 8)))
    assert found == {"tile_kernel": 3 * 2 * 8**3} and found.kernels == 3 * 2 * 8**3


def test_a_kernel_is_bound_by_its_words_or_by_the_matrix_unit():
    v5p, v6e, v7x = chip("v5p"), chip("v6e"), chip("v7x")
    step = kernels.GRID_STEP * v5p.clock
    # 3,539 words, but 2 products of 1024 x 1024 x 128 take 4,096 cycles of four units.
    share = kernels.share_of_peak("flash_attention_forward", v5p, head_dim=128)
    assert share == pytest.approx(4096 / (4096 + (337 + step) / 15))
    # Heads of 64 channels cost what those of 128 do.
    half = kernels.share_of_peak("flash_attention_forward", v5p, head_dim=64)
    assert half == pytest.approx(share / 2)
    # On units of 256 columns, of the forward pass' two products one leaves half of them idle, of
    # the backward pass' five two: 1,536 cycles for 1,024, and 1,792 for 1,280; or more words.
    step = kernels.GRID_STEP * v7x.clock
    share = kernels.share_of_peak("flash_attention_forward", v7x, head_dim=128)
    assert share == pytest.approx(1024 / (1536 + (301 + step) / 15))
    step = kernels.GRID_STEP * v6e.clock
    share = kernels.share_of_peak("flash_attention_backward", v6e, head_dim=128)
    assert share == pytest.approx(1280 / (2167 + (74 + step) / 10))


def test_the_table_knows_the_kernels_by_name_and_products():
    """Of the kernels as they are traced, for rows of two tiles."""
    x = jax.ShapeDtypeStruct((1, 2048, 3, 128), jnp.bfloat16)
    sums = jax.ShapeDtypeStruct((1, 3, 2048), jnp.float32)
    types = {"dtype": "bfloat16", "out_dtype": "bfloat16"}

    def forward(q, k, v):
        return flash.forward(q, None, Keys(k, v, None, None), **types)

    def backward(q, k, v, *rest):
        return flash.backward(q, None, Keys(k, v, None, None), *rest, **types)

    one = 2 * 3 * 2048**2 * 128
    found = count.of_function(forward, x, x, x)
    found.add(count.of_function(backward, x, x, x, sums, sums, x))
    assert set(found) == {"flash_attention_forward", "flash_attention_backward"}
    for name, tile in kernels.TILES.items():
        if name in found:
            assert found[name] == tile.products * one
    # Three heads; two tiles of queries with both of keys each, and two of keys with four.
    assert found.steps == {"flash_attention_forward": 3 * 2, "flash_attention_backward": 3 * 2}
    # The forward pass of every tile of queries is apart, the backward pass of every head.
    assert found.parallel == {"flash_attention_forward": 3 * 2, "flash_attention_backward": 3}
    taken = roofline._kernel_seconds(found, chip("v5p"), 1)
    found.parallel["flash_attention_backward"] = 4
    even = roofline._kernel_seconds(found, chip("v5p"), 1)
    name = "flash_attention_backward"
    backward = kernels.seconds(name, chip("v5p"), flops=found[name], steps=6)
    assert taken - even == pytest.approx(backward / 3)  # of three heads one core has two
    assert roofline._kernel_seconds(found, chip("v5p"), 2) == pytest.approx(even / 2)
    assert roofline._kernel_seconds(count.Counts({"matmul": 8.0}), chip("v5p"), 1) == 0


def test_a_kernel_takes_the_time_of_its_tiles_and_of_its_steps():
    """As `share_of_peak` has it for as many tiles a step."""
    name = "flash_attention_forward"
    for v in (chip("v5p"), chip("v7x")):
        flops = 30 * 4 * 1024**2 * 128
        share = kernels.share_of_peak(name, v, head_dim=128, per_step=10.0)
        taken = kernels.seconds(name, v, flops=flops, steps=3)
        assert taken == pytest.approx(flops / share / v.device_flops)
        assert taken < kernels.seconds(name, v, flops=flops, steps=30)
    # Of five heads one of two cores has three.
    whole, uneven = (
        kernels.seconds(name, chip("v5p"), flops=flops, steps=3, parallel=p) for p in (0, 5)
    )
    assert uneven == pytest.approx(1.2 * whole)
    assert kernels.seconds(name, chip("v7x"), flops=flops, steps=3, parallel=5) == taken


def test_search_knows_policies_of_the_model_alone():
    assert set(policies.POLICIES) <= set(REMAT)
    assert all(policies.kept(name) >= 0 for name in REMAT)


@pytest.mark.parametrize("step", published.STEPS, ids=lambda step: step.what[:5] + step.chip)
def test_published_steps_are_predicted_within_ten_percent(step):
    check = published.predict(step)
    assert abs(check.error) < 0.10
    assert sum(check.parts.values()) == pytest.approx(check.predicted)


def test_the_language_model_has_its_published_size():
    step = published.STEPS[2]
    embeddings = 2 * step.vocabulary * step.width
    parameters = step.depth * step.linear / (2 * step.tokens) + embeddings
    assert parameters == pytest.approx(68.98e9, rel=1e-3)


def test_clocks_are_those_that_the_data_sheets_imply():
    clocks = {c.name: round(c.clock / 1e9, 2) for c in chips.CHIPS if c.flops_per_cycle}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "v7x": 2.2}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5q:4x4x8", "no chip 'v5q'; did you mean v5"),
        ("v7x:2x2x1", "did you mean tpu7x"),
        ("v5p", "write a shape in chips, as in v5p:4x4x4"),
        ("v5p:4by4", "write a shape in chips"),
        ("v5p:4x4", "did you mean v5p:"),
        ("v6e:3x3", "multiples of 2x2 .a host.; did you mean v6e:2x4"),
        ("v6e:0x4", "write a shape"),
    ],
)
def test_a_topology_that_does_not_exist_is_explained(name, says):
    with pytest.raises(ValueError, match=says):
        topology.parse(name)


def test_the_suggested_topology_exists():
    for sizes in ((3, 3), (5, 7), (1, 1), (300, 2)):
        name = topology.nearest(chip("v6e"), sizes)
        assert topology.parse(name)[0].name == "v6e"


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: CompileTimeHbmOom: Used 108.33G of 95.74G hbm.", 108.33),
        ("RESOURCE_EXHAUSTED: required for HLO temporaries (2.00T) exceeds (95.74G)", 2048),
        ("RESOURCE_EXHAUSTED: ... 16.19G exceeds 15.75G", 16.19),
        ("INTERNAL: 3G of 4G", None),
    ],
)
def test_what_a_refused_program_needs_is_read(message, gib):
    needed = steps.memory_needed(message)
    assert needed == (None if gib is None else pytest.approx(gib * 2**30))


def test_what_a_program_reserves_on_a_device_is_read():
    report = (
        "Memory Space: default (color=0)\nTotal bytes: 27568442176 (25.67GiB)\n  ----\n"
        "Memory Space: vmem (color=1)\nTotal bytes: 67043328 (63.94MiB)\n"
        "Memory Space: cmem (color=5)\nTotal bytes: 29793342464 (27.75GiB)\n"
    )
    assert steps.device_bytes_of(report) == 27568442176
    assert steps.device_bytes_of("Memory Space: host (color=4)\nTotal bytes: 7\n") == 0


def test_heads_that_do_not_divide_are_told_with_the_nearest_that_do():
    config = config_file.load("configs/wan.py:smoke")
    mesh = sharding.make_mesh(tensor=4)
    with pytest.raises(ValueError, match=r"num_heads 2 .* mesh.tensor 4; .* to 1 or 2"):
        program.build(config, mesh, abstract=True)  # of `train` and of `plan`


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def devices(count):
    return tuple(map(Device, range(count)))


@pytest.fixture(scope="module")
def slice_():
    one = chip("v5p")
    return topology.Slice("v5p:2x2x4", one, 1, devices(16), (2, 2, 4))


def test_too_little_memory_names_the_knob_that_gives_most(slice_):
    config = config_file.load("configs/wan.py:t2v_14b", ["dit.remat=none", "batch_size=16"])
    gib = 2.0**30
    memory = {"weights": 3 * gib, "ema": 3 * gib, "optimizer": 6 * gib}
    error = steps.TooLarge(120 * gib, 95 * gib, memory)
    mesh = {"data": 1, "fsdp": 16, "tensor": 1, "context": 1}
    told = planning.too_large(error, config, mesh)
    assert told["short_gib"] == pytest.approx(25) and told["knob"] == "config.dit.remat=full"
    # Where the state is most of it, copies of it are what to get rid of.
    memory = {"weights": 28 * gib, "ema": 28 * gib, "optimizer": 56 * gib}
    told = planning.too_large(
        steps.TooLarge(120 * gib, 95 * gib, memory), config, mesh | {"data": 4}
    )
    assert told["knob"] == "config.mesh.data=1 with a larger fsdp"


def test_knobs_of_the_state_come_before_more_chips(slice_):
    gib = 2.0**30
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, "context": 4}

    def told(weights, ema, optimizer, rest, *overrides):
        config = config_file.load("configs/wan.py:t2v_14b", ["batch_size=1", *overrides])
        memory = {"weights": weights * gib, "ema": ema * gib, "optimizer": optimizer * gib}
        needed = weights + ema + optimizer + rest
        found = planning.too_large(steps.TooLarge(needed * gib, 95 * gib, memory), config, mesh)
        return found["knob"], pytest.approx(found["knob_gib"], abs=1e-3)

    # As much as twice the chips would, and nothing is bought.
    assert told(14, 14, 28, 44) == ("config.optim.offload=True", 28)
    # With moments on hosts, without an average, in bfloat16: one thing after the other.
    offload = "optim.offload=True"
    assert told(40, 40, 0, 20, offload) == ("config.optim.ema_decay=0.0", 40)
    assert told(40, 0, 0, 60, offload) == ("config.optim.param_dtype=bfloat16", 40)
    halves = (offload, "optim.param_dtype=bfloat16")
    # Of 95 GiB that are no gradients the working set is left, and of the blocks' input nothing.
    freed = 95 * 40 * 4 / (40 * 4 + policies.WORKING_SET)
    assert told(5, 0, 0, 100, *halves) == ("config.dit.remat=offload", freed)
    sent = (*halves, "dit.remat=offload")
    assert told(90, 0, 0, 40, *sent) == ("a slice of twice as many chips", 45)
    muon = told(14, 14, 28, 44, "optim.name=muon", "dit.remat=offload")
    assert muon == ("a slice of twice as many chips", 28)


def test_a_video_that_has_no_room_is_told_with_a_knob():
    gib = 2.0**30

    def told(weights, rest, *overrides):
        config = config_file.load("configs/wan.py:t2v_14b", overrides)
        memory = {"weights": weights * gib, "frozen": gib, "batch": 0.0}
        error = steps.TooLarge((weights + 1 + rest) * gib, 20 * gib, memory)
        return planning.no_video(error, config)

    found = told(1, 30)
    assert (found["fits"], found["short_gib"]) == (False, pytest.approx(12))
    assert found["knob"] == "a slice of twice as many chips"
    assert found["knob_gib"] == pytest.approx(15.5)
    assert told(0, 30)["knob"] == "config.data.frames half as many"
    assert told(30, 0, "dit.dtype=float32")["knob"] == "config.dit.dtype=bfloat16"


def test_what_the_compiler_takes_and_the_chip_does_not_is_told_with_a_knob(slice_, monkeypatch):
    """A device has less than programs may use, where other models' weights lie beside."""
    config = config_file.load("configs/wan.py:t2v_14b")
    gib = 2.0**30
    memory = {"weights": 9 * gib, "ema": 9 * gib, "optimizer": 30 * gib, "frozen": 1 * gib}
    memory |= {"batch": 0.0, "activations": 20 * gib, "gradients": 9 * gib, "program": gib}
    memory |= {"temporaries": 30 * gib, "on hosts": 0.0, "peak": 109 * gib}
    mesh = sharding.make_mesh(fsdp=2, context=4)
    step = steps.Step("train", mesh, "", memory, 1.0, count.Counts(), {}, 8, {})
    monkeypatch.setattr(steps, "train", lambda *_: step)
    monkeypatch.setattr(steps, "mesh_of", lambda *_: mesh)
    monkeypatch.setattr(roofline, "predict", lambda *_: roofline.Prediction(*[1.0] * 6, [], 0.0))
    told = planning._train(config, slice_, None)
    assert told["fits"] is False and told["short_gib"] == pytest.approx(109 - 95.74)
    assert told["knob"] == "config.optim.accumulate=2" and told["memory_gib"]["gradients"] == 9


def test_the_largest_batch_takes_nine_tenths_of_the_memory():
    config = config_file.load("configs/wan.py:t2v_14b", ["batch_size=16", "optim.accumulate=2"])
    mesh = {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}
    # 12 of state, 2 of gradients; of two rows a device and micro-batch, 10 each.
    memory = {"weights": 3.0, "ema": 3.0, "optimizer": 5.0, "frozen": 1.0, "gradients": 2.0}

    def largest(memory, **kwargs):
        return planning.largest_batch(config, mesh, memory, **kwargs)["batch_size"]

    assert largest(memory, peak=34.0, limit=100.0) == int((90 - 14) / 10) * 8
    # Of one that does not fit gradients are not known: they are as the weights.
    short = {k: v for k, v in memory.items() if k != "gradients"}
    assert largest(short, peak=35.0, limit=30.0) == int((27 - 15) / 10) * 8
    assert largest(short, peak=35.0, limit=20.0) == 0


def test_search_ranks_what_divides_and_fits(slice_):
    config = config_file.load("configs/wan.py:t2v_14b", ["dit.remat=full"])
    ranked = search.candidates(config, slice_)
    rates = [c.rate for c in ranked]
    assert ranked and rates == sorted(rates, reverse=True)
    for candidate in ranked:
        assert np.prod(list(candidate.mesh.values())) == 16
        assert 40 % candidate.mesh["tensor"] == 0
        assert candidate.memory <= planning.SHARE_OF_HBM * slice_.chip.device_hbm
    # Keeping everything takes tokens cut up: a whole row of 32k on one chip does not fit.
    whole = [c for c in ranked if c.mesh["context"] * c.mesh["tensor"] == 1]
    assert {c.remat for c in whole} and "none" not in {c.remat for c in whole}
    best = search.configured(config, ranked[0])
    assert best.mesh.fsdp == ranked[0].mesh["fsdp"] and best.dit.remat == ranked[0].remat
    assert best.batch_size % (best.mesh.data * best.mesh.fsdp) == 0


ROW = ["data.batching=fixed", "data.frames=81", "data.width=1280", "data.height=720"]
HALVES = ["optim.param_dtype=bfloat16", "optim.moment_dtype=bfloat16", "optim.ema_decay=0.0"]


def test_search_counts_the_state_that_the_config_keeps():
    """Of a row of 75,600 tokens on four chips, where docs/plans.md has what the compiler finds."""
    four = topology.Slice("v5p:2x2x1", chip("v5p"), 1, devices(4), (2, 2, 1))
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, "context": 4}

    def found(*overrides):
        config = config_file.load("configs/wan.py:t2v_14b", [*ROW, *overrides])
        ranked = search.candidates(config, four)
        fitting = {c.remat: c.memory for c in ranked if c.mesh == mesh and c.batch_size == 1}
        return fitting, search.held(search.workload(config), mesh, four)

    _, whole = found()
    halves, state = found(*HALVES)
    # Weights, gradients and two moments of two bytes, where there was an average too and all were
    # of four; and the VAE, which stays as it is.
    vae = 0.4727 * GIB
    assert (state - vae) / (whole - vae) == pytest.approx(8 / 20, rel=1e-3)
    assert state == pytest.approx((6.67 + 6.56 + 13.32 + 0.47) * GIB, rel=5e-3)
    assert halves["attention_out"] == pytest.approx(64.3 * GIB, rel=0.05)
    assert halves["full"] == pytest.approx(51.5 * GIB, rel=0.05)
    _, away = found(*HALVES, "optim.offload=True")
    assert state - away == pytest.approx(13.32 * GIB, rel=1e-3)


def test_meshes_cut_heads_evenly_and_use_every_device():
    found = list(search.meshes(32, 2, 12))
    assert {m["tensor"] for m in found} == {1, 2, 4}
    assert all(np.prod(list(m.values())) == 32 and m["data"] == 2 for m in found)


def test_what_waits_on_the_host_cannot_outrun_its_link(slice_):
    config = config_file.load("configs/wan.py:t2v_1.3b", ["data.pack.tokens=1024"])
    work = search.workload(config)
    mesh = {"data": 1, "fsdp": 16, "tensor": 1, "context": 1}
    kept, sent = (
        search.judge(work, mesh, name, 8, slice_, held=0.0) for name in ("full", "offload")
    )
    assert sent.memory < kept.memory
    assert sent.seconds >= 2 * 4 * 8 * 1024 * 1536 * 30 / search._HOST_LINK


def test_flops_by_part_add_up_to_what_training_counts():
    config = config_file.load("configs/wan.py:t2v_1.3b")
    stage = program.STAGES["dit"](config, abstract=True)
    batch = program.abstract_batch(config, stage)
    parts = steps.flops_by_part(config, stage, batch)
    assert "VAE" not in parts and "text" not in parts  # both come from the cache
    assert sum(parts.values()) == pytest.approx(stage.flops(batch))


def test_the_errors_of_the_method_stand_below_every_table_of_times():
    method = planning.method()
    plan = {"config": "a.py", "topology": "v5p:2x2x1", "slices": 1, "hbm_gib": 95.0}
    short = {"fits": False, "needed_gib": 2.0, "short_gib": 1.0, "knob": "x", "knob_gib": 1.0}
    table = report.summary([plan | {"train": short, "method": method}], "train")
    assert table.caption == "of times, MFU and cost checks: -5% to +8%"


def test_the_table_shows_what_does_not_fit_and_what_does():
    plan = {
        "config": "a.py",
        "topology": "v5p:2x2x1",
        "slices": 1,
        "hbm_gib": 95.0,
        "train": {
            "fits": False,
            "needed_gib": 120.0,
            "short_gib": 25.0,
            "knob": "x",
            "knob_gib": 9.0,
        },
    }
    rows = report.rows(plan, "train")
    assert (
        rows["fits"] == "NO: needs 120.0 of 95.0 GiB" and "x (about 9.0" in rows["what helps most"]
    )
