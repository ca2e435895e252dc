"""With libtpu: `make tpu`."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import cli, compile_options, config_file, layers, sharding
from sora_jax.generate.mesh import sampling_axes
from sora_jax.plan import collectives, hlo, planning, sampling, steps, topology

SMOKE = ["dit.dtype=bfloat16", "dit.remat=full", "batch_size=4"]


@pytest.fixture(scope="module")
def plan():
    config = config_file.load("configs/wan.py:smoke", [*SMOKE, "mesh.context=2"])
    return planning.plan(config, name="smoke", topology_name="v5e:2x2", price=1.2, decode=True)


def test_the_real_train_step_fits_and_its_state_aliases(plan):
    train = plan["train"]
    assert train["fits"] and train["hbm_share"] < 0.05 and train["aliased"] >= 0.98
    memory = train["memory_gib"]
    assert memory["optimizer"] == pytest.approx(2 * memory["weights"], rel=1e-3)
    assert memory["ema"] == pytest.approx(memory["weights"])
    assert memory["peak"] > memory["temporaries"] > 0
    # With full recomputation each block keeps its input, in float32: 2 rows, half of 96 tokens.
    kept = config_file.load("configs/wan.py:smoke").dit.depth * 2 * 48 * 32 * 4 / 2**30
    assert memory["activations"] == pytest.approx(kept)
    assert 0 < memory["gradients"] < 2 * memory["weights"]
    assert train["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1, "context": 2}


def test_moments_and_activations_on_hosts_leave_the_device():
    kinds = [*SMOKE, "mesh.context=2", "optim.offload=True", "optim.ema_decay=0.0"]
    kinds += ["dit.remat=offload", "dit.depth=4"]  # two blocks XLA unrolls
    config = config_file.load("configs/wan.py:smoke", kinds)
    memory = planning.plan(config, name="smoke", topology_name="v5p:2x2x1", only="train")["train"]
    memory = memory["memory_gib"]
    assert memory["optimizer"] < 1e-3 * memory["weights"]
    # Two moments, and what padding to tiles adds to a model this small.
    assert 2 * memory["weights"] <= memory["on hosts"] < 8 * memory["weights"]
    assert memory["activations"] == 0 < memory["gradients"]
    assert memory["peak"] > memory["temporaries"] > 0


def test_times_add_up_and_cost_follows(plan):
    train = plan["train"]
    parts = train["compute_s"] + train["attention_s"] + train["waiting_s"]
    assert train["step_s"] == pytest.approx(parts)
    assert 0 < train["mfu"] < 1
    assert train["cost_1000_steps"] == pytest.approx(1000 * train["step_s"] / 3600 * 1.2 * 4)


def test_gradients_cross_fsdp_and_tokens_context(plan):
    over = {axis for row in plan["train"]["collectives"] for axis in row["axes"]}
    assert over <= {"fsdp", "context"} and "fsdp" in over and "context" in over
    assert all(row["bytes"] > 0 and row["seconds"] > 0 for row in plan["train"]["collectives"])


def test_no_rows_keys_are_gathered_over_context():
    """Of rows that are long enough for the kernels of large models."""
    long = ["dit.width=256", "dit.num_heads=2", "data.pack.tokens=4096", "mesh.context=2"]
    config = config_file.load("configs/wan.py:smoke", [*SMOKE, *long, "batch_size=4"])
    plan = planning.plan(config, name="smoke", topology_name="v5e:2x2", only="train")["train"]
    # What is gathered over `context` are weights and texts; heads change places with tokens.
    keys = 2 * 4096 * 256 * 2  # bytes of a device's rows
    over = {c["kind"]: c for c in plan["collectives"] if c["axes"] == ("context",)}
    assert 0 < over["all-gather"]["largest"] < keys / 2
    assert over["all-to-all"]["largest"] >= keys / 4


def test_a_video_is_planned_for_one_host_as_the_command_makes_it(plan):
    sample = plan["sample"]
    axes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sampling_axes(4)
    assert sample["mesh"] == axes and axes["data"] == axes["context"] == 2
    assert sample["fits"] and sample["denoise_s"] == pytest.approx(2 * sample["step_s"])
    assert sum(sample["flops"].values()) < sum(plan["train"]["flops"].values())
    decode = sample["decode"]
    assert decode["fits"] and decode["flops"]["VAE"] == sample["decode_flops"] > 0
    assert sample["video_s"] == pytest.approx(sample["denoise_s"] + decode["step_s"])
    # Beside what runs lie the other models' weights.
    for part in (sample, decode):
        memory = part["memory_gib"]
        assert memory["peak"] > memory["weights"] + memory["frozen"] > memory["weights"] > 0


def test_a_vae_is_planned_though_it_has_no_tokens(monkeypatch):
    """Up to what compiles, which takes a minute."""

    class Traced(Exception):
        """Of the arguments that were to be compiled."""

    def traced(*given, **_):
        raise Traced(dict(zip(names, given, strict=False)))

    names = list(inspect.signature(steps.compile_step).parameters)
    monkeypatch.setattr(steps, "compile_step", traced)
    config = config_file.load("configs/paperworld_vae.py:smoke", [])
    with pytest.raises(Traced) as raised:
        steps.train(config, topology.describe("v5e:2x2"))
    (given,) = raised.value.args
    assert given["tokens"] == 0 < given["state_bytes"]


SMALL = [
    *("dit.depth=2", "dit.width=256", "dit.num_heads=2", "dit.ffn_dim=256", "text.depth=1"),
    *("vae.base_dim=16", "vae.decoder_base_dim=16", "text.vocab_size=384"),
    *("data.frames=5", "data.width=64", "data.height=64"),
]


def test_models_that_take_pictures_are_planned_with_them():
    config = config_file.load("configs/wan.py:flf2v_14b", SMALL)
    step = sampling.denoise(config, topology.describe("v5e:2x2"))
    text_alone = sampling.denoise(
        config_file.load("configs/wan.py:t2v_14b", SMALL), topology.describe("v5e:2x2")
    )
    # 514 rows of CLIP's features of 1,280 channels, 20 more channels of latents.
    extra = 4 * (514 * 1280 + 2 * 8 * 8 * 20)
    assert step.memory["batch"] - text_alone.memory["batch"] == extra
    assert step.flops["cross-attention"] > text_alone.flops["cross-attention"]


def test_steps_are_planned_with_the_guidance_of_the_config():
    config = config_file.load("configs/t2v_1_3b.py", SMALL)
    host = topology.describe("v5e:2x2")

    def plan(**settings):
        changed = config.copy_and_resolve_references()
        changed.sample.update(settings)
        step = sampling.denoise(changed, host)
        opcodes = [i.opcode for i, _ in hlo.parse(step.text).scheduled()]
        return step, opcodes.count("conditional")

    (both, none), (apart, some) = plan(), plan(guidance_blocks=(1,))
    assert (none, some) == (0, 1) and apart.flops == both.flops
    for alone in ({"guidance": 1.0}, {"guidance_interval": (0.0, 0.0)}):
        one, _ = plan(**alone)
        assert both.flops == {name: 2 * value for name, value in one.flops.items()}
        assert sum(one.counts.values()) < 0.7 * sum(both.counts.values())


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compiler_takes_the_options_of_each_chip(name):
    slice_ = topology.describe(name)
    mesh = sharding.make_mesh(fsdp=len(slice_.devices), devices=slice_.devices)
    rows = sharding.named(mesh, "batch")
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=rows)
    options = compile_options.of_mesh(mesh)
    assert options
    compiled = jax.jit(lambda x: x @ x.T, compiler_options=options).lower(x).compile()
    assert "all-gather" in compiled.as_text()


def test_an_axis_may_take_a_part_of_a_torus_dimension():
    slice_ = topology.describe("v5p:4x4x8")
    mesh = sharding.make_mesh(fsdp=64, context=2, devices=slice_.devices)
    pairs = np.array([[d.coords for d in row] for row in mesh.devices.reshape(64, 2)])
    # Those that share a row of tokens are neighbours.
    assert (np.abs(pairs[:, 0] - pairs[:, 1]).sum(axis=1) == 1).all()


def test_only_data_crosses_slices():
    slice_ = topology.describe("v5e:2x2", 2)
    mesh = sharding.make_mesh(data=2, fsdp=4, devices=slice_.devices)
    numbers = [{d.slice_index for d in half.flat} for half in mesh.devices]
    assert numbers == [{0}, {1}]
    with pytest.raises(ValueError, match=r"mesh.data 1 is not divisible by the 2 slices"):
        sharding.make_mesh(fsdp=8, devices=slice_.devices)


def test_what_makes_no_videos_is_not_planned_to():
    config = config_file.load("configs/paperworld_vae.py:smoke")
    with pytest.raises(ValueError, match="--only sample is for stage 'dit', not 'vae'"):
        planning.plan(config, name="vae", topology_name="v5e:2x2", only="sample")


def test_too_little_memory_is_told_by_how_much():
    config = config_file.load(
        "configs/wan.py:smoke", [*SMOKE, "dit.width=8192", "dit.ffn_dim=32768", "dit.depth=16"]
    )
    with pytest.raises(steps.TooLarge, match=r"GiB more than the 15.8 GiB") as told:
        steps.train(config, topology.describe("v5e:2x2"))
    assert told.value.needed > told.value.limit == pytest.approx(15.75 * 2**30)


def test_the_command_writes_json(tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = ["plan", "--config", "configs/wan.py:smoke", "--topology", "v5e:2x2"]
    command += ["--only", "train", "--json", str(out), "--config.batch_size=4"]
    assert cli.main(command) == 0
    assert json.loads(out.read_text())["train"]["batch_size"] == 4
    shown = capsys.readouterr().out
    assert "predicted: nothing ran on a chip" in shown and "published measured steps" in shown


def test_search_compiles_the_best_of_what_it_ranks(tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = ["plan", "--config", "configs/wan.py:smoke", "--topology", "v5e:2x2", "--search"]
    assert cli.main([*command, "--compile", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    (best,) = found["plans"]
    first = found["ranked"][0]
    assert best["train"]["fits"] and best["train"]["mesh"] == first["mesh"]
    assert best["train"]["remat"] == first["remat"]
    rates = [row["tokens_per_s"] for row in found["ranked"]]
    assert rates == sorted(rates, reverse=True) and found["judged"] >= len(rates) > 1
    assert f"best of {found['judged']} that fit" in capsys.readouterr().out


def test_two_configs_are_put_side_by_side(tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = ["plan", "--config", "configs/wan.py:smoke", "--compare", "configs/t2v_14b.py:smoke"]
    assert cli.main([*command, "--topology", "v5e:2x2", "--only", "train", "--json", str(out)]) == 0
    one, other = json.loads(out.read_text())["plans"]
    assert (one["config"], other["config"]) == ("configs/wan.py:smoke", "configs/t2v_14b.py:smoke")
    assert (one["train"]["remat"], other["train"]["remat"]) == ("full", "attention_out")
    # Of the same two blocks more is kept.
    kept = [plan["train"]["memory_gib"]["activations"] for plan in (one, other)]
    assert kept[1] > kept[0] > 0
    shown = capsys.readouterr().out
    assert "full" in shown and "attention_out" in shown


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--topology", "v5e:2x3"], "did you mean v5e:"),
        (["--topology", "v5e:2x2", "--slices", "0"], "--slices 0 must be 1 or more"),
        (["--topology", "v5e:2x2", "--config.batch_size=6"], "batch_size 6 is not divisible"),
        (["--topology", "v5e:2x2", "--price", "-1"], "--price -1 must be 0 or more"),
        ([], "names no slice that it is for"),
    ],
)
def test_bad_input_is_one_line(given, says, capsys):
    assert cli.main(["plan", "--config", "configs/wan.py:smoke", *given]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_weights_cut_over_two_axes_are_gathered_and_their_gradients_scattered():
    """Along both axes at once the compiler makes all-reduces of twice the bytes."""
    slice_ = topology.describe("v5p:4x4x8")
    mesh = sharding.make_mesh(fsdp=64, context=2, devices=slice_.devices)
    axes = ("embed", "mlp")
    w = jax.ShapeDtypeStruct((3072, 2048), jnp.float32, sharding=sharding.named(mesh, *axes))
    rows = sharding.named(mesh, "batch", "tokens", None)
    x = jax.ShapeDtypeStruct((64, 1024, 3072), jnp.float32, sharding=rows)
    loss = lambda w, x: jnp.sum(layers.dot(x, w, "bfloat16", axes) ** 2)  # noqa: E731
    with sharding.use_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=w.sharding)
        text = step.lower(w, x).compile().as_text()
    found = collectives.find(hlo.parse(text), 128)
    # A shard's sums over the context axis are the largest that an all-reduce may carry.
    shard = 4 * 3072 * 2048 / 64
    assert all(c.sent <= shard for c in found if c.kind == "all-reduce")
    assert {"all-gather", "reduce-scatter"} <= {c.kind for c in found}
