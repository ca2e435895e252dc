"""Conversions and their way back: every tensor bit for bit, in both namings and all types."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from sora_jax import cli
from sora_jax.convert import folder, replace, rewrite
from sora_jax.convert.weights import open_weights
from sora_jax.text.tokenizer import ByteTokenizer
from sora_jax.train.export import export, parse_bytes, write_index, write_pipeline
from sora_jax.train.loop import train
from sora_jax.train.program import STAGES
from sora_jax.train.verify import verify
from tests.conftest import stopped_at_every_second

WORDS = {"dit": "transformer's config", "vae": "VAE's config"}


def tensors(path):
    """Every tensor of every file below `path`, by component and diffusers name."""
    return {
        f"{name}/{key}": part.read(key)
        for name, part in rewrite.parts_of(path).items()
        for key in part.shapes
    }


def assert_same_bytes(a, b):
    assert set(a) == set(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype and value.tobytes() == b[key].tobytes(), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_to_official_names_and_back_is_byte_identical(pipeline_folder, tmp_path, dtype):
    export(pipeline_folder, tmp_path / "a", dtype=dtype, max_shard_size=3000)
    assert list((tmp_path / "a" / "transformer").glob("*.index.json"))
    export(tmp_path / "a", tmp_path / "wan", to="wan", dtype=dtype)
    export(tmp_path / "wan", tmp_path / "b", dtype=dtype)
    first = tensors(tmp_path / "a")
    assert str(first["dit/proj_out.weight"].dtype) == dtype
    assert_same_bytes(first, tensors(tmp_path / "wan"))
    assert_same_bytes(first, tensors(tmp_path / "b"))
    for name in folder.REQUIRED:  # settings that names and shapes do not tell
        assert folder.read_config(tmp_path / "b", name) == folder.read_config(pipeline_folder, name)
    official = open_weights(tmp_path / "wan" / "diffusion_models").shapes
    assert "blocks.0.self_attn.q.weight" in official and "head.modulation" in official


def test_the_converted_folder_makes_the_same_video(pipeline_folder, tmp_path):
    import sora_jax

    export(pipeline_folder, tmp_path / "again", max_shard_size=3000)
    videos = [sora_jax.load(p)("a ball").frames for p in (pipeline_folder, tmp_path / "again")]
    np.testing.assert_array_equal(*videos)
    for name in ("model_index.json", "sampling.json", "scheduler", "tokenizer"):
        assert (tmp_path / "again" / name).exists()


def test_a_shorter_export_removes_the_shards_of_a_longer_one(pipeline_folder, tmp_path):
    for size in (3000, None, 3000):
        export(pipeline_folder, tmp_path, max_shard_size=size)
        count, differences = verify(pipeline_folder, tmp_path)
        assert count > 50 and not differences


def expert_folder(pipeline_folder, target):
    """The same pipeline as one of two experts."""
    shutil.copytree(pipeline_folder, target)
    shutil.copytree(target / "transformer", target / "transformer_2")
    write_index(target, shift=1.0, boundary_ratio=0.5)
    return target


def test_an_export_that_is_stopped_leaves_the_earlier_one(pipeline_folder, tmp_path, monkeypatch):
    out, again = tmp_path / "out", tmp_path / "again"
    export(pipeline_folder, out)
    monkeypatch.setattr(rewrite, "write_shards", stopped_at_every_second(rewrite.write_shards))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    for target in (out, again):
        with pytest.raises(KeyboardInterrupt):
            export(pipeline_folder, target, dtype="bfloat16")
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert not again.exists()


def test_an_export_takes_the_place_of_an_earlier_one_whole(pipeline_folder, tmp_path):
    experts = expert_folder(pipeline_folder, tmp_path / "experts")
    for to, where in (("diffusers", "transformer"), ("wan", "diffusion_models")):
        out = export(pipeline_folder, tmp_path / to, to=to)
        (out / "tokenizer" / "spiece.model").write_bytes(b"of another model")
        (out / where / "mine.txt").write_text("mine")
        for source in (experts, pipeline_folder) if to == "wan" else (pipeline_folder,):
            export(source, out, to=to)
            assert not verify(source, out)[1]
            assert folder.open_tokenizer(out).vocab_size == 384
            assert (out / where / "mine.txt").read_text() == "mine"


def test_parts_that_an_export_does_not_write_are_not_mixed_with_it(pipeline_folder, tmp_path):
    experts = expert_folder(pipeline_folder, tmp_path / "experts")
    before = sorted(experts.rglob("*"))
    for to, words in (("diffusers", "with transformer_2/,"), ("wan", "with transformer/, tr")):
        with pytest.raises(ValueError, match=f"holds a pipeline {words}.* would be mixed"):
            export(pipeline_folder, experts, to=to)
    for part in (experts / "vae", experts / "vae" / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(ValueError, match=r"holds .*safetensors, which is read here"):
            export(part, experts)
    assert sorted(experts.rglob("*")) == before


def test_files_that_no_export_wrote_are_kept(pipeline_folder, tmp_path, capsys):
    out = tmp_path / "out"
    source = shutil.copytree(pipeline_folder, tmp_path / "source")
    (source / "README.md").write_text(f"of the source\n{replace.UNFILLED}\n")
    out.mkdir()
    (out / "README.md").write_text("mine")
    (out / "sampling.json").write_text('{"steps": 7}')
    export(source, out)
    assert (out / "README.md").read_text() == "mine"
    assert folder.read_json(out / "sampling.json") == {"steps": 7}
    assert capsys.readouterr().err.count("kept as it was") == 2
    (out / "README.md").write_text(f"of an earlier export\n{replace.UNFILLED}\n")
    export(source, out)  # now the settings are those of an earlier export
    assert (out / "README.md").read_text().startswith("of the source")
    assert folder.read_json(out / "sampling.json") == folder.read_json(source / "sampling.json")


def test_differences_are_named(pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "other")
    config, _, params = folder.load_component(pipeline_folder, "dit")
    params["proj_out"]["bias"][...] += 0.5
    folder.save_component(tmp_path / "other", "dit", config, params)
    shutil.rmtree(tmp_path / "other" / "vae")
    count, differences = verify(pipeline_folder, tmp_path / "other")
    assert [d.key for d in differences] == ["transformer proj_out.bias", "VAE"]
    assert "differs by up to 0.5" in differences[0].what
    assert differences[1].what == "only in the first"
    assert count > 50


@pytest.mark.parametrize(
    ("name", "change", "key", "what"),
    [
        ("dit", {"num_attention_heads": 1, "attention_head_dim": 24}, "num_heads", "2 and 1"),
        ("vae", {"latents_std": [9.0] * 4}, "latents_std", r"\(1.0, .* and \(9.0, .*"),
        ("vae", {"decoder_base_dim": 4}, None, None),  # what leaving it out means
        ("dit", {"rope_max_seq_len": 7}, None, None),
    ],
)
def test_settings_that_change_what_tensors_compute_differ(
    pipeline_folder, tmp_path, name, change, key, what
):
    shutil.copytree(pipeline_folder, tmp_path / "other")
    path = tmp_path / "other" / folder.COMPONENTS[name].folder / "config.json"
    folder.write_json(path, folder.read_json(path) | change)
    _, differences = verify(pipeline_folder, tmp_path / "other")
    assert [d.key for d in differences] == ([] if key is None else [f"{WORDS[name]} {key}"])
    assert key is None or re.fullmatch(what, differences[0].what)


def test_the_command_tells_equal_from_different(pipeline_folder, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["convert", "export", "--checkpoint", str(pipeline_folder), "--out", str(out)]
    assert cli.main([*args, "--to", "wan", "--dtype", "bfloat16"]) == 0
    assert cli.main(["convert", "verify", str(pipeline_folder), str(out)]) == 2
    assert "differs by up to" in capsys.readouterr().err
    assert cli.main([*args, "--to", "wan"]) == 0
    assert cli.main(["convert", "verify", str(pipeline_folder), str(out)]) == 0
    assert "tensors are equal" in capsys.readouterr().out


def test_a_run_is_exported_to_both_and_verified_against_them(dit_config, tmp_path):
    dit_config.num_steps = dit_config.checkpoint_every = 1
    run = tmp_path / "run"
    train(dit_config, run, devices=jax.devices()[:1])
    for to in rewrite.TARGETS:
        export(run, tmp_path / to, to=to, weights="raw")
        assert not verify(run, tmp_path / to, weights="raw")[1]
    assert verify(run, tmp_path / "wan", weights="ema")[1]
    for name in ("sampling.json", "tokenizer/tokenizer_config.json"):
        there, expected = ((tmp_path / to / name).read_bytes() for to in ("wan", "diffusers"))
        assert there == expected
    index = json.loads((tmp_path / "diffusers" / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert "sora-jax sample" in (tmp_path / "diffusers" / "README.md").read_text()


@pytest.mark.parametrize(
    ("patch_size", "weights", "expands"),
    [((1, 2, 2), {"first": 0.5}, True), ((1, 2, 2), {}, False), ((1, 1, 1), {"first": 0.5}, False)],
)
def test_a_run_that_learns_clean_first_frames_is_diffusers_ti2v(
    dit_config, tmp_path, patch_size, weights, expands
):
    dit_config.dit.patch_size = patch_size
    dit_config.tasks.weights.update(none=0.5, **weights)
    stage = STAGES["dit"](dit_config)
    stage.text.tokenizer.save(tmp_path / "tokenizer")
    write_pipeline(tmp_path, dit_config, stage)
    assert folder.read_index(tmp_path).expand_timesteps == expands


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "onxx"}, "to 'onxx' is unknown; use diffusers or wan or stablehlo or onnx"),
        ({"weights": "emma"}, "weights 'emma' is unknown"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"to": "onnx"}, "run `make onnx` once"),
        ({"frames": 9}, "size and frames are for --to stablehlo or onnx"),
        ({"to": "stablehlo", "dtype": "float16"}, "weights of programs are float32 or bfloat16"),
        (
            {"to": "stablehlo", "size": (20, 16)},
            "size 20x16: width 20 is not a multiple of 8; use 16 or 24",
        ),
        ({"to": "wan", "max_shard_size": 9}, "others come as one file"),
    ],
)
def test_unknown_choices_are_refused_and_write_nothing(pipeline_folder, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        export(pipeline_folder, tmp_path / "out", **options)
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(ValueError, match="neither a folder nor shipped weights"):
        export(tmp_path / "none", tmp_path / "out")


def test_what_cannot_be_converted_whole_is_refused(pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "two")
    (tmp_path / "two" / "transformer_2").mkdir()
    with pytest.raises(ValueError, match=r"transformer_2/config\.json"):
        export(tmp_path / "two", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for out in (tmp_path / "two", tmp_path / "two" / "model_index.json"):
        with pytest.raises(ValueError, match="is the source, or a file"):
            export(tmp_path / "two", out)


def test_values_that_float16_cannot_hold_are_refused(pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "large")
    config, _, params = folder.load_component(pipeline_folder, "dit")
    params["proj_out"]["bias"][...] += 1e5
    folder.save_component(tmp_path / "large", "dit", config, params)
    with pytest.raises(ValueError, match=r"'proj_out.bias' holds values beyond float16's 65504"):
        export(tmp_path / "large", tmp_path / "out", dtype="float16")


def test_one_shard_of_several_is_told(pipeline_folder, tmp_path):
    export(pipeline_folder, tmp_path / "shards", max_shard_size=3000)
    first, *_ = sorted((tmp_path / "shards" / "transformer").glob("*-00001-of-*.safetensors"))
    shutil.copy(first, tmp_path / first.name)
    with pytest.raises(
        ValueError, match=r"not a Wan transformer|lacks tensor .* one shard of several"
    ):
        folder.load_component(tmp_path / first.name, "dit")


def test_sizes_in_words():
    assert parse_bytes(None) is None
    assert [parse_bytes(t) for t in ("5GB", "500 MB", "3k", "12")] == [
        5 * 10**9,
        5 * 10**8,
        3000,
        12,
    ]
    for text in ("big", "0", "-3MB", "1.5GB"):
        with pytest.raises(ValueError, match="--max-shard-size"):
            parse_bytes(text)


def test_official_files_with_a_tokenizer_become_a_whole_pipeline(pipeline_folder, tmp_path, capsys):
    import io

    import sentencepiece
    from safetensors.numpy import load_file, save_file

    import sora_jax

    official = tmp_path / "wan"
    export(pipeline_folder, official, to="wan")
    shutil.rmtree(official / "tokenizer")
    export(official, tmp_path / "without")
    assert "needs model_index.json" in capsys.readouterr().err
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red ball rolls left"] * 20),
        model_writer=model,
        **{"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2},
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    [text] = (official / "text_encoders").glob("*.safetensors")
    config = open_weights(text).config
    tensors_ = load_file(text) | {"spiece_model": np.frombuffer(model.getvalue(), np.uint8)}
    save_file(tensors_, text, {"sora_jax.config": json.dumps(config)})
    export(official, tmp_path / "whole")
    assert "needs model_index.json" not in capsys.readouterr().err
    saved = (tmp_path / "whole" / "tokenizer" / "spiece.model").read_bytes()
    assert saved == model.getvalue()
    video = sora_jax.load(tmp_path / "whole")("a red ball", size=(16, 16), frames=5, steps=2)
    assert video.frames.shape == (5, 16, 16, 3)


def test_shipped_weights_go_before_a_folder_of_their_name(tmp_path, monkeypatch):
    import sora_jax

    monkeypatch.chdir(tmp_path)
    shipped = sora_jax.weights_folder("paperworld")
    Path("paperworld").mkdir()
    for find in (sora_jax.weights_folder, sora_jax.checkpoint_path):
        assert find("paperworld") == shipped
        assert find("./paperworld") == Path("paperworld")


def test_the_card_tells_the_step_whose_weights_were_sound(dit_config, tmp_path):
    dit_config.num_steps, dit_config.checkpoint_every = 2, 1
    run = tmp_path / "run"
    train(dit_config, run, devices=jax.devices()[:1])
    files = [path for path in (run / "checkpoints" / "2" / "state").rglob("*") if path.is_file()]
    damaged = max(files, key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert "| 1 of 8 clips |" in (export(run, tmp_path / "out") / "README.md").read_text()


def test_programs_of_a_run_are_checked_before_it_is_read(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    full = tmp_path / "run"
    for out, dtype, words in (
        (full, "float32", "is the source"),
        (tmp_path, "float32", "not empt"),
        (tmp_path / "out", "float16", "float32 or bfloat16"),
    ):
        with pytest.raises(ValueError, match=words):
            export(tmp_path / "run", out, to="stablehlo", dtype=dtype)


def test_a_tokenizer_that_does_not_name_its_class_is_of_t5s_kind(tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer")
    folder.write_json(tmp_path / "tokenizer" / "tokenizer_config.json", {})
    write_index(tmp_path, shift=1.0)
    assert folder.read_json(tmp_path / "model_index.json")["tokenizer"][1] == "T5Tokenizer"


def test_a_run_that_names_shipped_weights_is_exported_from_any_folder(tmp_path, monkeypatch):
    from ml_collections import ConfigDict

    from sora_jax.train import frozen

    monkeypatch.chdir(tmp_path)
    config = ConfigDict({"vae_checkpoint": "paperworld", "tokenizer": "paperworld"})
    assert (frozen.path_of(config, "vae_checkpoint") / "vae" / "config.json").is_file()
    assert frozen.tokenizer_of(config).encode("a red ball", max_length=8)
    config.vae_checkpoint = "./no/such/folder"
    with pytest.raises(ValueError, match=r"config\.vae_checkpoint \./no/such/folder is not found"):
        frozen.path_of(config, "vae_checkpoint")
    shipped = frozen.path_of(ConfigDict({"a": "paperworld"}), "a") / "tokenizer"
    config.tokenizer = str(shipped)
    assert frozen.tokenizer_of(config).encode("a red ball", max_length=8)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((shipped / "tokenizer.json").read_bytes())
    config.tokenizer = "bare"
    assert frozen.tokenizer_of(config).encode("a red ball", max_length=8)
