"""Config files: variants, overrides, and one-line errors that say what was meant."""

import importlib
import math
import sys
from pathlib import Path

import jax
import pytest

from sora_jax import config_file
from sora_jax.train.dit_stage import DiTStage
from sora_jax.train.program import abstract_batch

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = str(CONFIGS / "paperworld.py")


@pytest.mark.parametrize("path", sorted(p.name for p in CONFIGS.glob("*.py") if p.stem != "base"))
def test_every_config_has_a_full_and_a_smoke_variant(path):
    full, smoke = (config_file.load(f"{CONFIGS / path}{v}") for v in ("", ":smoke"))
    assert full.is_locked and smoke.is_locked
    if path != "data.py":  # which trains nothing
        assert smoke.num_steps < full.num_steps


sys.path.insert(0, str(CONFIGS.parent))  # for `configs`, which is not installed
PODS = [
    (name, variant)
    for name in ("wan", "t2v_1_3b", "t2v_5b", "t2v_14b", "staged", "sora_minute")
    for variant in importlib.import_module(f"configs.{name}").SLICES
    if variant != "full" or name.startswith("t2v")  # elsewhere a variant of another name
    if not variant.startswith(("i2v", "flf2v"))  # which read pixels, a clip a row
]
PARAMETERS = {1536: 1_418_996_800, 3072: 4_999_787_712, 5120: 14_288_491_584}  # of Wan, by width
DEVICES_A_CHIP = {"tpu7x": 2}


@pytest.fixture(scope="module", params=PODS, ids=[":".join(pod) for pod in PODS])
def pod(request):
    """(module, config, stage, devices) of a shipped config at full size; nothing is allocated."""
    name, variant = request.param
    module = importlib.import_module(f"configs.{name}")
    config = config_file.load(f"{CONFIGS / name}.py:{variant}")
    chip, _, topology = module.SLICES[variant].partition(":")
    devices = math.prod(map(int, topology.split("x"))) * DEVICES_A_CHIP.get(chip, 1)
    return module, config, DiTStage(config, abstract=True), devices


def test_a_mesh_fills_its_slice_and_a_batch_its_mesh(pod):
    _, config, _, devices = pod
    mesh = config.mesh
    assert mesh.fsdp == -1 and devices % (mesh.data * mesh.tensor * mesh.context) == 0
    shards = devices // (mesh.tensor * mesh.context)
    assert config.batch_size % (shards * config.optim.accumulate) == 0


@pytest.mark.parametrize("variant", ["i2v_14b", "flf2v_14b", "i2v_a14b"])
def test_models_that_take_pictures_fill_their_slice_too(variant):
    path = f"{CONFIGS / 'wan'}.py:{variant}"
    chip, _, shape = config_file.topology(path).partition(":")
    config, devices = config_file.load(path), math.prod(map(int, shape.split("x")))
    assert chip == "v5p" and config.batch_size % (devices // config.mesh.context) == 0


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in PODS if name != "wan"))
def test_one_bad_step_ends_no_run_from_scratch(name):
    skip = config_file.load(f"{CONFIGS / name}.py").skip
    assert skip.in_row == 3 and skip.grad_norm == 10


def test_a_row_takes_its_clips_and_wastes_little(pod):
    module, config, stage, _ = pod
    vae, data = stage.vae_config, config.data
    parts = list(data.parts.values()) or [data]
    tokens = []
    for part in parts:
        assert part.frames % vae.scale_factor_temporal == 1
        f, h, w, _ = stage.latent_shape(part.frames, part.height, part.width)
        assert (h * vae.scale_factor_spatial, w * vae.scale_factor_spatial) == (
            (part.height, part.width)
        )
        assert h % 2 == w % 2 == 0  # patches of two
        tokens.append(stage.tokens_of((f, h, w)))
        assert f"{tokens[-1]:,}" in module.__doc__
    assert max(tokens) <= data.pack.tokens
    # Filled up by the longest clip, or by whole numbers of the parts.
    fill = max(n * (data.pack.tokens // n) for n in tokens)
    assert fill / data.pack.tokens > 0.95
    assert data.pack.tokens % 1024 == data.pack.tokens % config.mesh.context == 0
    assert data.pack.text_tokens >= config.text_tokens


def test_the_state_has_the_parameters_of_the_published_models(pod):
    _, config, stage, _ = pod
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    assert set(shapes) == {"dit"}  # the text is read from the cache
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS[config.dit.width]
    rows = abstract_batch(config, stage)["tokens"].shape[:2]
    assert rows == (config.batch_size, config.data.pack.tokens)


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in PODS))
def test_the_twin_trains_as_the_model_does(name):
    full, smoke = (config_file.load(f"{CONFIGS / name}.py{v}") for v in ("", ":smoke"))
    stage = DiTStage(smoke, abstract=True)
    assert smoke.data.batching == full.data.batching
    assert smoke.dit.remat == full.dit.remat and smoke.optim.name == full.optim.name
    clip = stage.tokens_of(stage.latent_shape(5, 64, 64)[:3])
    assert 2 * clip == smoke.data.pack.tokens
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 1e6


def test_overrides_take_the_type_of_the_default():
    config = config_file.load(
        f"{BASE}:smoke",
        ["optim.peak_lr=1", "dit.patch_size=[1,1,1]", "data.flip=true", "vae_checkpoint=a b"],
    )
    assert config.optim.peak_lr == 1.0 and isinstance(config.optim.peak_lr, float)
    assert config.dit.patch_size == (1, 1, 1)
    assert config.data.flip is True
    assert config.vae_checkpoint == "a b"


@pytest.mark.parametrize(
    ("spec", "overrides", "words"),
    [
        (str(CONFIGS / "paperwrld.py"), [], ("no such file", "did you mean paperworld.py?")),
        (str(CONFIGS), [], ("is a directory; give a FILE.py[:VARIANT]",)),
        (f"{BASE}:huge", [], ("unknown variant 'huge'", "smoke")),
        (BASE, ["optim.peek_lr=1e-3"], ("unknown key", "did you mean optim.peak_lr?")),
        (BASE, ["peak_lr=1e-3"], ("unknown key", "did you mean optim.peak_lr?")),
        (BASE, ["num_steps=many"], ("'many' is not of type int", "12000")),
        (BASE, ["num_steps=1.5"], ("'1.5' is not of type int",)),
        (BASE, ["optim=3"], ("a group of keys", "peak_lr")),
        (BASE, ["num_steps"], ("no value",)),
    ],
)
def test_mistakes_are_one_line_that_names_the_mend(spec, overrides, words):
    with pytest.raises(ValueError) as caught:
        config_file.load(spec, overrides)
    message = str(caught.value)
    assert "\n" not in message and "?." not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "defines no get_config; see configs/base.py."),
        ("def get_config(", r"'\(' was never closed \(.*bad.py, line 1\); correct it."),
        ("import nope", "No module named 'nope'; install it, or correct the name."),
    ],
)
def test_a_file_that_is_no_config_is_told_in_one_line(tmp_path, text, says):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ValueError, match=f"--config .*bad.py: {says}"):
        config_file.load(str(tmp_path / "bad.py"))


def test_a_config_is_a_file_of_python():
    with pytest.raises(ValueError, match=r"--config README.md: give a FILE.py\[:VARIANT\]"):
        config_file.load("README.md")
