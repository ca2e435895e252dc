"""The command line: what it writes, and one line with exit status 2 for every mistake."""

import argparse
import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import cli, evaluate, video_io
from sora_jax.convert import tensors
from sora_jax.evaluate import report
from sora_jax.generate import Pipeline
from sora_jax.train.interrupts import Preempted


def run(*args, capsys):
    status = cli.main([str(a) for a in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def sample(pipeline_folder, tmp_path, capsys):
    def call(*args, out="ball.png", checkpoint=pipeline_folder):
        base = ["sample", "--checkpoint", checkpoint, "--out", tmp_path / out]
        return run(*base, *args, capsys=capsys)

    return call


def test_sample_writes_video_metadata_and_sheet(sample, tmp_path):
    status, out, err = sample("--prompt", "a red ball", "--seed", 3, "--sheet")
    assert status == 0 and out.strip() == str(tmp_path / "ball.png")
    for stage in ("load", "text", "denoise", "decode", "write", "in all"):
        assert stage in err
    record = json.loads((tmp_path / "ball.json").read_text())
    assert record["prompt"] == "a red ball" and record["seed"] == 3
    assert video_io.read_video(tmp_path / "ball.png").frames.shape == (5, 16, 16, 3)
    assert (tmp_path / "ball_sheet.png").is_file()


def test_a_video_is_made_again_bit_for_bit_from_its_record(sample, tmp_path):
    assert (
        sample("--prompt", "a tree", "--seed", 9, "--batch", 2, "--steps", 2, out="t.png")[0] == 0
    )
    second = video_io.read_video(tmp_path / "t-1.png").frames
    for source in ("t-1.json", "t-1.png"):
        assert sample("--again", tmp_path / source, out="again.png")[0] == 0
        np.testing.assert_array_equal(video_io.read_video(tmp_path / "again.png").frames, second)


def test_a_record_without_guidance_blocks_is_of_a_video_without_them(
    sample, pipeline_folder, tmp_path
):
    target = shutil.copytree(pipeline_folder, tmp_path / "blocks")
    path = target / "sampling.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"guidance_blocks": [1]}))
    prompt = ("--prompt", "a tree")
    assert sample(*prompt, out="with.png", checkpoint=target)[0] == 0
    assert sample(*prompt, "--guidance-blocks", out="without.png", checkpoint=target)[0] == 0
    record = json.loads((tmp_path / "without.json").read_text())
    assert record.pop("guidance_blocks") == []
    (tmp_path / "older.json").write_text(json.dumps(record))
    again = ("--again", tmp_path / "older.json")
    assert sample(*again, out="again.png", checkpoint=target)[0] == 0
    names = ("with.png", "without.png", "again.png")
    made = [video_io.read_video(tmp_path / name).frames for name in names]
    np.testing.assert_array_equal(made[1], made[2])
    assert (made[0] != made[1]).any()


def test_again_takes_no_other_settings_and_asks_for_the_noise(sample, tmp_path):
    np.save(tmp_path / "noise.npy", np.zeros((3, 4, 4, 4), np.float32))
    noise = ("--noise", tmp_path / "noise.npy")
    assert sample("--prompt", "a tree", *noise, out="a.png")[0] == 0
    again = ("--again", tmp_path / "a.json")
    status, _, err = sample(*again, *noise, "--steps", 5, "--seed", 0, out="b.png")
    assert status == 2 and "leave out --steps, --seed" in err
    status, _, err = sample(*again, out="b.png")
    assert status == 2 and "was made from a noise file" in err
    plain = ("--again", tmp_path / "plain.json")
    assert sample("--prompt", "a tree", out="plain.png")[0] == 0
    status, _, err = sample(*plain, *noise, out="b.png")
    assert status == 2 and "was made from its seed; leave out --noise." in err
    np.save(tmp_path / "two.npy", np.zeros((2, 3, 4, 4, 4), np.float32))
    two = ("--noise", tmp_path / "two.npy")
    assert sample("--prompt", "a tree", "--batch", 2, *two, out="two.png")[0] == 0
    status, _, err = sample("--again", tmp_path / "two-1.json", *two, out="b.png")
    assert status == 2 and "is one of 2 videos made together" in err
    assert sample(*again, *noise, out="b.png")[0] == 0
    frames = [video_io.read_video(tmp_path / name).frames for name in ("a.png", "b.png")]
    np.testing.assert_array_equal(*frames)


def test_noise_and_what_came_of_it_are_files_for_other_programs(sample, tmp_path):
    noise = np.random.default_rng(0).standard_normal((3, 4, 4, 4)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    frames = []
    for seed in (1, 2):  # which the noise makes irrelevant
        files = {name: tmp_path / f"{name}{seed}.npy" for name in ("latents", "text")}
        status, _, err = sample(
            *("--prompt", "a tree", "--seed", seed, "--noise", tmp_path / "noise.npy"),
            *("--save-latents", files["latents"], "--save-text-embeddings", files["text"]),
            out=f"n{seed}.png",
        )
        assert status == 0, err
        frames.append(video_io.read_video(tmp_path / f"n{seed}.png").frames)
        latents, text_emb = np.load(files["latents"]), np.load(files["text"])
    np.testing.assert_array_equal(*frames)
    assert latents.shape == (1, 3, 4, 4, 4) and np.abs(latents - noise).max() > 0.1
    # "a tree" and the end of sequence are 7 tokens; the rest is padding.
    assert np.abs(text_emb[0, :7]).max(-1).min() > 0 and not text_emb[0, 7:].any()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((1, 2, 2, 2, 4)), "noise has shape (1, 2, 2, 2, 4); these videos need (1, 3, 4"),
        (np.full((1, 3, 4, 4, 4), np.nan), "must hold finite numbers"),
        (np.array(["a"]), "must hold finite numbers"),
        (None, "not a readable .npy file"),
    ],
)
def test_bad_noise_is_told_in_one_line(sample, tmp_path, array, words):
    path = tmp_path / "noise.npy"
    path.write_bytes(b"no array") if array is None else np.save(path, array)
    status, _, err = sample("--prompt", "x", "--noise", path)
    last = err.splitlines()[-1]  # behind the time that loading took
    assert status == 2 and last.startswith("sora-jax: ") and words in last
    assert "Traceback" not in err and not (tmp_path / "ball.png").exists()


def test_a_file_of_prompts_gives_numbered_videos(sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("a ball\n\na tree\n")
    status, out, _ = sample("--prompts-file", tmp_path / "prompts.txt", "--frames", 1, out="p.png")
    assert status == 0 and [line[-7:] for line in out.split()] == ["p-0.png", "p-1.png"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("a ball\na tree\n", "utf-8-sig")
    prompts = ("--prompts-file", tmp_path / "prompts.txt")
    assert sample(*prompts, "--frames", 1, out="p.png")[0] == 0
    assert json.loads((tmp_path / "p-0.json").read_text())["prompt"] == "a ball"


def test_prompts_that_cannot_be_read_are_named(sample, tmp_path):
    (tmp_path / "latin.txt").write_bytes("ein B\xe4r".encode("latin-1"))
    for path, words in ((tmp_path / "latin.txt", "not UTF-8"), (tmp_path, "is a directory")):
        status, _, err = sample("--prompts-file", path)
        assert status == 2 and err.startswith(f"sora-jax: --prompts-file {path}") and words in err


def test_a_long_prompt_is_cut_and_told_in_a_line(sample, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    status, _, err = sample("--prompt", "a ball " * 20)
    assert status == 0
    told = "prompt is longer than 24 tokens and was cut to: 'a ball a ball a ball a'"
    assert told in err.splitlines()


@pytest.mark.parametrize(
    ("args", "out", "words"),
    [
        (("--prompt", ""), "a.mp4", "prompt is empty"),
        (("--prompt", "x", "--size", "17x16"), "a.mp4", "use 16 or 24"),
        (("--prompt", "x", "--size", "big"), "a.mp4", "--size big: write width x height"),
        (("--prompt", "x", "--frames", 2), "a.mp4", "use 1 or 3"),
        (("--prompt", "x", "--steps", 0), "a.mp4", "steps 0"),
        (("--prompt", "x", "--seed", -1), "a.mp4", "seed -1"),
        (("--prompt", "x", "--batch", 0), "a.mp4", "--batch 0"),
        (("--prompt", "x"), "a.avi", ".mp4"),
        (("--prompt", "x"), "no/such/folder/a.mp4", "no/such/folder"),
        (("--prompts-file", "none.txt"), "a.mp4", "none.txt: no such file"),
        (("--again", "none.json"), "a.mp4", "none.json"),
    ],
)
def test_mistakes_are_one_line_and_status_2(sample, tmp_path, args, out, words):
    status, printed, err = sample(*args, out=out)
    assert status == 2 and printed == ""
    assert err.startswith("sora-jax: ") and err.count("\n") == 1 and words in err
    assert list(tmp_path.iterdir()) == []


def refusing(kind, *names):
    """A method of Path that fails as the system does, for files of which `names` says a part."""
    method = getattr(Path, kind)

    def refused(self, *args, **kwargs):
        if any(name in self.name for name in names):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return method(self, *args, **kwargs)

    return refused


@pytest.mark.parametrize("name", ["prompts.txt", "model_index.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_named(sample, pipeline_folder, tmp_path, monkeypatch, name):
    def lost(*args, **kwargs):  # as the library says of every file that it cannot open
        raise FileNotFoundError("No such file or directory")

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ball")
    monkeypatch.setattr(Path, "read_text", refusing("read_text", name))
    if name.endswith("safetensors"):
        monkeypatch.setattr(Path, "open", refusing("open", name))
        monkeypatch.setattr(tensors, "safe_open", lost)
    status, _, err = sample("--prompts-file", prompts)
    assert status == 2 and err.count("\n") == 1
    assert f"{name}: Permission denied; change its permissions, or give another." in err


def test_a_name_that_is_too_long_is_told_before_the_work(sample, tmp_path, monkeypatch):
    assert sample("--prompt", "x", "--sheet", "--frames", 1, out="a" * 245 + ".png")[0] == 0
    monkeypatch.setattr(Pipeline, "load_weights", None)
    for name, more in (("a" * 300, ()), ("a" * 251, ()), ("a" * 248, ("--sheet",))):
        for task in ((), ("--loop",)):
            status, _, err = sample("--prompt", "x", *more, *task, out=f"{name}.png")
            assert status == 2 and err.count("\n") == 1
            assert err.endswith(": File name too long; use a shorter one.\n")
    status, _, err = sample("--prompt", "x", checkpoint="a" * 500)
    assert status == 2 and err.endswith("a: File name too long; use a shorter one.\n")


def test_no_room_while_writing_is_one_line_and_leaves_nothing(sample, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(self, data):
        write(self, data[:10])
        if ".part" in self.name:
            raise OSError(
                errno.ENOSPC, "No space left on device"
            )  # without a name, as write has it

    monkeypatch.setattr(Path, "write_bytes", full)
    status, _, err = sample("--prompt", "x", "--frames", 1)
    told = f"sora-jax: {tmp_path / 'ball.png'}: No space left on device; make room, or use another "
    assert status == 2 and err.splitlines()[-1].startswith(told) and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_missing_weights_are_named(sample, pipeline_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(pipeline_folder, broken)
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    status, _, err = sample("--prompt", "x", checkpoint=broken)
    assert status == 2 and str(weights) in err and "is damaged" in err and "tensor '" in err
    weights.write_bytes(data[:-3])
    assert "damaged safetensors file" in sample("--prompt", "x", checkpoint=broken)[2]
    weights.unlink()
    status, _, err = sample("--prompt", "x", checkpoint=broken)
    assert status == 2 and f"{weights}: no such file" in err


def test_train_refuses_an_unknown_key(capsys, tmp_path):
    status, _, err = run(
        *("train", "--config", "configs/paperworld.py:smoke", "--workdir", tmp_path / "run"),
        "--config.optim.peek_lr=1",
        capsys=capsys,
    )
    assert status == 2 and "did you mean optim.peak_lr" in err
    assert not (tmp_path / "run").exists()


def test_info_shows_parts_and_costs(pipeline_folder, capsys):
    status, out, _ = run("info", "--checkpoint", pipeline_folder, "--frames", 9, capsys=capsys)
    assert status == 0
    for word in ("devices", "jax", "dit.blocks", "video tokens", "GFLOP", "5 x 4 x 4 x 4"):
        assert word in out


def test_info_counts_the_forward_passes_of_the_solver(pipeline_folder, capsys, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "heun")
    path = tmp_path / "heun" / "sampling.json"
    told = {"steps": 7, "guidance": 3.0, "guidance_interval": [0.0, 1.0], "solver": "heun"}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    _, out, _ = run("info", "--checkpoint", tmp_path / "heun", capsys=capsys)
    assert "denoising, 28 forwards" in out


def test_info_shows_nothing_before_a_mistake(pipeline_folder, tmp_path, capsys):
    for wrong in (("--checkpoint", tmp_path), ("--checkpoint", pipeline_folder, "--frames", 2)):
        status, out, err = run("info", *wrong, capsys=capsys)
        assert status == 2 and out == "" and err.count("\n") == 1


def test_an_unknown_suite_is_refused_before_anything_is_loaded(capsys, tmp_path):
    args = ("eval", "--suite", "paperwrld", "--checkpoint", "none", "--out", tmp_path / "a.json")
    status, _, err = run(*args, capsys=capsys)
    assert status == 2 and "did you mean 'paperworld'" in err


def test_a_suite_shows_how_far_it_is(pipeline_folder, monkeypatch, capsys, tmp_path):
    asked = {}

    def suite(name, pipeline, out, *, on_progress, **options):
        asked.update(options, dtype=pipeline.dit.config.dtype)
        on_progress("animate", 3, 3)
        on_progress("loop", 2, 2)

    monkeypatch.setattr(evaluate, "run_suite", suite)
    monkeypatch.setattr(report, "print_table", lambda result: None)
    args = ("eval", "--checkpoint", pipeline_folder, "--out", tmp_path / "a.json")
    status, _, err = run(*args, "--batch", 5, "--dtype", "bfloat16", capsys=capsys)
    assert status == 0
    assert asked == {"prompts": 256, "seed": 0, "batch_size": 5, "dtype": "bfloat16"}
    assert "animate 3/3 videos" in err and "loop 2/2 videos" in err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from sora_jax import cli\n"
        "try: cli.main(['sample', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'numpy', 'av', 'cv2', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begun < 10  # a second on a quiet machine


def test_import_writes_a_run_from_the_command_line(pipeline_folder, tmp_path, capsys):
    base = ["convert", "import", "--checkpoint", pipeline_folder, "--out", tmp_path / "run"]
    status, _, err = run(*base, "--to", "run", capsys=capsys)
    assert status == 2 and "--to run needs --config FILE" in err
    status, _, err = run(*base, "--config", "configs/paperworld.py", capsys=capsys)
    assert status == 2 and "--config is for --to run" in err
    config = ["--to", "run", "--config", "configs/paperworld.py:smoke"]
    status, _, err = run(*base, *config, "--config.batch_size=7", capsys=capsys)
    assert status == 2 and "batch_size 7 is not divisible" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "status"), [(Preempted, 75), (KeyboardInterrupt, 130)])
def test_a_run_that_was_ended_says_by_its_status_whether_to_start_it_again(
    kind, status, monkeypatch, tmp_path, capsys
):
    def ended(args):
        raise kind("stopped at step 9; the checkpoint is saved.")

    monkeypatch.setattr(cli, "_train", ended)
    args = ("train", "--config", "configs/base.py", "--workdir", tmp_path)
    assert run(*args, capsys=capsys) == (
        status,
        "",
        "sora-jax: stopped at step 9; the checkpoint is saved.\n",
    )


def test_an_interrupt_that_python_drops_comes_again():
    """In a process of its own, for it is sent to the main thread."""
    program = (
        "import gc, signal, sys, time; from sora_jax import cli\n"
        # Jobs in the background of a shell begin with it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def hook(phase, info):\n"
        "    gc.callbacks.remove(hook)\n"
        "    raise KeyboardInterrupt\n"
        "def work(args):\n"
        "    gc.callbacks.append(hook)\n"
        "    gc.collect()\n"
        "    time.sleep(20)\n"
        "cli._info, cli.setup_jax = work, lambda: None\n"
        "sys.exit(cli.main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "sora-jax: stopped; no partial file is left.\n"


def test_an_interrupt_without_words_says_what_is_left(monkeypatch, tmp_path, capsys):
    def ended(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_train", ended)
    args = ("train", "--config", "configs/base.py", "--workdir", tmp_path)
    told = "sora-jax: stopped; no partial file is left.\n"
    assert run(*args, capsys=capsys) == (130, "", told)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("sample", "--prompt", "x"), "sora-jax sample: the following arguments are required"),
        (("sample", "--out", "a.mp4"), "one of the arguments --prompt --prompts-file --again is"),
        (("sample", "--seed", "x"), "sora-jax sample: argument --seed: invalid int value: 'x'"),
        (("sample", "--frames", 17.5), "argument --frames: invalid int value: '17.5'"),
        (("sample", "--size", "-64x64"), "argument --size: expected one argument (one that begins"),
        (("sample", "--keyframe", "-1:a.png"), "with - is written --keyframe=VALUE)"),
        (
            ("sample", "--prompt", "x", "--out", "a.mp4", "--sed", 3),
            "unrecognized arguments: --sed 3",
        ),
        (("train", "--config", "a", "--workdir", "b", "--foo=3"), "arguments: --foo=3"),
        (("convert", "verify"), "sora-jax convert verify: the following arguments"),
        (("smaple",), "invalid choice: 'smaple'"),
    ],
)
def test_what_the_parser_refuses_is_one_line(args, words, capsys):
    with pytest.raises(SystemExit) as end:
        run(*args, capsys=capsys)
    line = capsys.readouterr().err
    assert end.value.code == 2 and words in line
    assert line.endswith("; see --help\n") and line.count("\n") == 1


@pytest.mark.parametrize(
    "command, advice",
    [("train", "tells what fits and which knob"), ("sample", "Ask for fewer frames")],
)
def test_too_little_memory_is_one_line_that_says_what_to_change(
    monkeypatch, capsys, command, advice
):
    def run(args):
        jax.jit(lambda: jnp.zeros(1 << 48))().block_until_ready()

    class Parser:
        def parse_args(self, arguments):
            return argparse.Namespace(command=command, run=run)

    monkeypatch.setattr(cli, "parser", Parser)
    assert cli.main([]) == 2
    line = capsys.readouterr().err
    assert line.startswith("sora-jax: no memory: Out of memory") and line.count("\n") == 1
    assert advice in line
