"""Official files, which lie loose, are a pipeline as they are, and make a diffusers folder."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file

import sora_jax
from sora_jax.convert import folder, loose, official
from sora_jax.convert.sampling import read_sampling
from sora_jax.convert.weights import open_weights
from sora_jax.image.clip import CLIPVisionConfig
from sora_jax.train.export import export, write_index
from tests.conftest import random_like

BLUE = np.full((16, 16, 3), (10, 10, 250), np.uint8)
# Of a pipeline: (its second transformer, its pictures).
KINDS = {"t2v": (False, False), "i2v": (False, True), "t2v_a14b": (True, False)}
# Steps, shift, guidance of both transformers, and frames that Wan's code uses.
PUBLISHED = {
    "t2v": (50, 5.0, 5.0, None, 81),
    "i2v": (40, 3.0, 5.0, None, 81),
    "t2v_a14b": (40, 12.0, 4.0, 3.0, 81),
}


@pytest.fixture(scope="module")
def model() -> bytes:
    """A SentencePiece model of T5's kind."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red ball rolls left"] * 20),
        model_writer=model,
        **{"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2},
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=KINDS)
def pair(request, pipeline_folder, model, tmp_path_factory):
    """(kind, diffusers folder, official files) of one model; a tokenizer is in the first alone."""
    experts, pictures = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    source = root / "source"
    shutil.copytree(pipeline_folder, source)
    shutil.rmtree(source / "tokenizer")
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "spiece.model").write_bytes(model)
    folder.write_json(
        source / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}
    )
    dit = folder.read_config(source, "dit")
    if pictures:
        dit = dataclasses.replace(dit, in_channels=4 + 2 + 4, image_dim=8)
        tower = {"width": 8, "mlp_dim": 12, "depth": 2, "num_heads": 2}
        save(source, "image", CLIPVisionConfig(**tower, image_size=8, patch_size=4), seed=1)
    save(source, "dit", dit, seed=2)
    if experts:
        save(source, "dit_2", dit, seed=3)
    boundary = official.T2V_A14B.boundary_ratio if experts else None
    write_index(source, shift=1.0, pictures=pictures, boundary_ratio=boundary)
    files = root / "files"
    export(source, files, to="wan")
    return request.param, source, files


def save(where, name: str, config, *, seed: int) -> None:
    params = random_like(folder.abstract_params(name, config)[1], seed=seed)
    folder.save_component(where, name, config, params)


def with_tokenizer(files, target, model: bytes):
    """A copy of official files whose text encoder holds its tokenizer, as ComfyUI's does."""
    published(files, target)
    [text] = (target / "text_encoders").glob("*.safetensors")
    config = open_weights(text).config
    tensors = load_file(text) | {"spiece_model": np.frombuffer(model, np.uint8)}
    save_file(tensors, text, {"sora_jax.config": json.dumps(config)})
    return target


def published(files, target):
    """A copy of exported files without what `export` puts beside them."""
    ours = shutil.ignore_patterns("tokenizer", "sampling.json")
    return shutil.copytree(files, target, ignore=ours)


def frames(checkpoint, kind: str) -> np.ndarray:
    pipe = sora_jax.load(checkpoint)
    image = {"image": BLUE} if KINDS[kind][1] else {}
    settings = {"size": (16, 16), "frames": 5, "steps": 4, "guidance": 2.0, "shift": 1.0}
    return pipe("a red ball", **settings, seed=3, **image).frames


def test_they_make_the_videos_of_the_folder_that_they_came_from(pair, model, tmp_path):
    kind, source, files = pair
    files = with_tokenizer(files, tmp_path / "files", model)
    expected = frames(source, kind)
    np.testing.assert_array_equal(frames(files, kind), expected)
    made = export(files, tmp_path / "made")
    np.testing.assert_array_equal(frames(made, kind), expected)
    assert (made / "tokenizer" / "spiece.model").read_bytes() == model
    names = ("_class_name", "boundary_ratio", "transformer_2")
    there, expected = (folder.read_json(path / "model_index.json") for path in (made, source))
    assert [there[name] for name in names] == [expected[name] for name in names]
    for path in (made, files):
        told = read_sampling(path)
        got = (told.steps, told.shift.shift_hi, told.guidance, told.guidance_2, told.frames)
        assert got == PUBLISHED[kind]


def test_a_tokenizer_may_lie_in_a_folder_beside_them(pair, model, tmp_path):
    kind, source, files = pair
    copy = published(files, tmp_path / "files")
    with pytest.raises(ValueError, match="no tokenizer; put the tokenizer"):
        sora_jax.load(copy)
    where = copy / "google" / "umt5-xxl"  # as in the official repositories
    where.mkdir(parents=True)
    (where / "spiece.model").write_bytes(model)
    np.testing.assert_array_equal(frames(copy, kind), frames(source, kind))


def test_exported_files_are_a_pipeline_as_they_lie(pair):
    kind, source, files = pair
    np.testing.assert_array_equal(frames(files, kind), frames(source, kind))


def test_official_files_written_anew_keep_their_tokenizer(pipeline_folder, model, tmp_path, capsys):
    export(pipeline_folder, tmp_path / "files", to="wan")
    files = with_tokenizer(tmp_path / "files", tmp_path / "own", model)
    again = export(files, tmp_path / "again", to="wan", dtype="bfloat16")
    assert (again / "tokenizer" / "spiece.model").read_bytes() == model
    assert not capsys.readouterr().err
    none = published(tmp_path / "files", tmp_path / "none")
    export(none, tmp_path / "bare", to="wan")
    assert "a pipeline needs a tokenizer too" in capsys.readouterr().err


def test_settings_of_a_checkpoint_go_with_its_files(pipeline_folder, tmp_path):
    files = export(pipeline_folder, tmp_path / "files", to="wan")
    assert read_sampling(files) == read_sampling(pipeline_folder)


@pytest.mark.parametrize("kind", ["shift", "experts", "clean"])
def test_what_only_diffusers_files_tell_goes_with_official_ones(pipeline_folder, tmp_path, kind):
    source = shutil.copytree(pipeline_folder, tmp_path / "source")
    (source / "sampling.json").unlink()
    if kind == "experts":
        shutil.copytree(source / "transformer", source / "transformer_2")
    boundary = 0.6 if kind == "experts" else None
    write_index(source, shift=7.0, boundary_ratio=boundary, expand_timesteps=kind == "clean")
    files = export(source, tmp_path / "files", to="wan")
    back = export(files, tmp_path / "back")
    for path in (files, back):
        there, expected = (json.dumps(dataclasses.asdict(read_sampling(p))) for p in (path, source))
        assert there == expected
        assert folder.read_index(path) == folder.read_index(source)
    scheduler = folder.read_json(back / "scheduler" / "scheduler_config.json")
    assert scheduler["flow_shift"] == 7.0
    [*transformers] = (files / "diffusion_models").iterdir()
    again = export(transformers[0], tmp_path / "again", to="wan")  # alone, without what tells
    assert folder.find_component(again, "dit")[2].pipeline == folder.read_index(source)._asdict()


def test_weights_are_written_where_the_scheduler_is_unknown(pipeline_folder, tmp_path, capsys):
    source = shutil.copytree(pipeline_folder, tmp_path / "source")
    (source / "sampling.json").unlink()
    folder.write_json(source / "scheduler" / "scheduler_config.json", {"_class_name": "DDIM"})
    files = export(source, tmp_path / "files", to="wan")
    assert "files: has no sampling.json: " in capsys.readouterr().err
    assert folder.find_component(files, "vae") and not (files / "sampling.json").exists()


@pytest.mark.parametrize(
    ("names", "low"),
    [
        (("wan2.2_t2v_high_noise_14B", "wan2.2_t2v_low_noise_14B"), 1),
        (("low_noise_model/diffusion", "high_noise_model/diffusion"), 0),
        (("a14b-low", "a14b-high"), 0),
        (("follow_a", "slow_b"), None),
        (("low_noise_1", "low_noise_2"), None),
    ],
)
def test_experts_are_told_apart_by_name(pipeline_folder, tmp_path, names, low):
    export(pipeline_folder, tmp_path / "one", to="wan")
    [file] = (tmp_path / "one" / "diffusion_models").glob("*.safetensors")
    where = tmp_path / "lower"  # the folder's own name says nothing
    for name in names:
        target = where / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    if low is None:
        with pytest.raises(ValueError, match="put low_noise into the name"):
            folder.find_component(where, "dit")
        return
    for component, index in (("dit", 1 - low), ("dit_2", low)):
        source = folder.find_component(where, component)[2].source
        assert source == str(where / f"{names[index]}.safetensors")
    assert set(loose.components(where)) == {"dit", "dit_2"}


def test_what_a_pipeline_lacks_is_said(pipeline_folder, model, tmp_path, capsys):
    export(pipeline_folder, tmp_path / "files", to="wan")
    damaged = with_tokenizer(tmp_path / "files", tmp_path / "damaged", b"no model")
    export(damaged, tmp_path / "made")
    assert "text_encoder.safetensors: not a SentencePiece model" in capsys.readouterr().err
    shutil.rmtree(damaged / "vae")
    export(damaged, tmp_path / "less")
    assert "the source has no VAE." in capsys.readouterr().err


def test_settings_beside_them_are_kept(pipeline_folder, model, tmp_path):
    export(pipeline_folder, tmp_path / "files", to="wan")
    files = with_tokenizer(tmp_path / "files", tmp_path / "own", model)
    shutil.copyfile(pipeline_folder / "sampling.json", files / "sampling.json")
    made = export(files, tmp_path / "made")
    assert read_sampling(made) == read_sampling(files) == read_sampling(pipeline_folder)


def test_a_training_run_is_to_be_exported_first(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="run: a training run, whose weights are exported first"):
        sora_jax.load(tmp_path / "run")


def test_a_pickle_in_the_place_of_a_model_is_named(pipeline_folder, tmp_path):
    export(pipeline_folder, tmp_path / "files", to="wan")
    shutil.rmtree(tmp_path / "files" / "vae")
    (tmp_path / "files" / "Wan2.1_VAE.pth").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"needs one VAE.*Wan2.1_VAE.pth was not read"):
        sora_jax.load(tmp_path / "files")


@pytest.mark.parametrize("name", folder.REQUIRED)
def test_a_config_beside_the_weights_is_read(pipeline_folder, tmp_path, name):
    stored = pipeline_folder / folder.COMPONENTS[name].folder
    file = stored / f"{folder.COMPONENTS[name].stem}.safetensors"
    for source in (stored, file):  # as save_pretrained leaves a model of its own
        config, _, weights = folder.find_component(source, name)
        assert config == folder.read_config(pipeline_folder, name)
        assert weights.source == str(file)


def test_a_config_beside_that_is_of_another_model_is_passed_over(pipeline_folder, tmp_path):
    export(pipeline_folder, tmp_path / "files", to="wan")
    [file] = (tmp_path / "files" / "text_encoders").glob("*.safetensors")
    save_file(load_file(file), tmp_path / "text.safetensors")  # without our header
    wanted = folder.read_config(pipeline_folder, "text")
    for values in ({"_class_name": "WanModel", "dim": 24}, wanted.to_dict() | {"num_heads": 4}):
        folder.write_json(tmp_path / "config.json", values)
        got = folder.find_component(tmp_path / "text.safetensors", "text")[0]
        assert got.num_heads == values.get("num_heads", wanted.num_heads)


def test_a_diffusers_vae_beside_official_files_needs_its_config_there(pipeline_folder, tmp_path):
    files = export(pipeline_folder, tmp_path / "files", to="wan")
    shutil.rmtree(files / "vae")
    stored = pipeline_folder / "vae"
    (files / "vae").mkdir()
    shutil.copy(stored / "diffusion_pytorch_model.safetensors", files / "vae" / "a.safetensors")
    with pytest.raises(ValueError, match=r"vae/a.safetensors: .* config.json beside it; put it t"):
        sora_jax.load(files, weights=False)
    shutil.copy(stored / "config.json", files / "vae")
    for source in (files, export(files, tmp_path / "made")):
        np.testing.assert_array_equal(frames(source, "t2v"), frames(pipeline_folder, "t2v"))
