"""`sora-jax sample` with writers, weights and time stamps: what is sampled, shown and recorded."""

import json

import numpy as np
import pytest

from sora_jax import cli, video_io


@pytest.fixture
def sample(pipeline_folder, tmp_path, capsys):
    def call(*args, out="ball.png"):
        base = ["sample", "--checkpoint", pipeline_folder, "--out", tmp_path / out]
        status = cli.main([str(a) for a in (*base, *args)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def record(tmp_path, name="ball"):
    return json.loads((tmp_path / f"{name}.json").read_text())


def frames(path):
    return video_io.read_video(path).frames


def test_what_was_given_and_what_was_sampled_are_recorded_and_made_again(sample, tmp_path):
    status, _, err = sample("--prompt", "red ball, snow, spins", "--expand-prompt", "paperworld")
    sentence = "a red ball spins in the snow"
    assert status == 0 and f"    prompt {sentence}\n" in err and "was cut to" in err
    made = record(tmp_path)
    assert made["prompt_given"] == "red ball, snow, spins"
    assert made["prompt"] == "a red ball spins in the"  # the text encoder's 24 bytes
    assert video_io.read_metadata(tmp_path / "ball.png") == made
    assert sample("--again", tmp_path / "ball.json", out="again.png")[0] == 0
    assert record(tmp_path, "again") == made
    np.testing.assert_array_equal(frames(tmp_path / "again.png"), frames(tmp_path / "ball.png"))
    assert sample("--prompt", made["prompt"], out="plain.png")[0] == 0
    np.testing.assert_array_equal(frames(tmp_path / "plain.png"), frames(tmp_path / "ball.png"))
    assert "prompt_given" not in record(tmp_path, "plain")
    again = ("--again", tmp_path / "ball.json", "--expand-prompt", "paperworld")
    status, _, err = sample(*again, out="b.png")
    assert status == 2 and "leave out --expand-prompt" in err


def test_a_task_records_the_prompt_that_was_given_too(sample, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), np.uint8)
    clip = video_io.write_video(tmp_path / "clip.png", noise, fps=8)
    args = ("--edit", clip, "--strength", 0.5, "--expand-prompt", "paperworld")
    status, _, err = sample("--prompt", "red ball spins, snow", *args)
    assert status == 0, err
    made = record(tmp_path)
    assert made["prompt_given"] == "red ball spins, snow"
    assert made["prompt"].startswith("a red ball spins")


def test_each_prompt_of_a_file_is_expanded_and_recorded_with_its_videos(sample, tmp_path, server):
    server.answers = ["a blue box", "a red ball"]
    (tmp_path / "prompts.txt").write_text("box\nball\n")
    file = ("--prompts-file", tmp_path / "prompts.txt", "--batch", 2, "--frames", 1)
    assert sample(*file, "--expand-prompt", f"{server.url}#m", out="p.png")[0] == 0
    made = [record(tmp_path, f"p-{i}") for i in range(4)]
    assert [m["prompt_given"] for m in made] == ["box", "box", "ball", "ball"]
    assert [m["prompt"] for m in made] == ["a blue box"] * 2 + ["a red ball"] * 2
    asked = [body["messages"] for _, _, body in server.asked]
    assert [messages[1]["content"] for messages in asked] == ["box", "ball"]
    assert all("a picture" in messages[0]["content"] for messages in asked)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--expand-prompt",), "no writer is built in for checkpoint"),
        (("--expand-prompt", ""), "neither paperworld"),
        (("--expand-prompt", "http://127.0.0.1:9/v1"), "write http(s)://HOST/v1#MODEL"),
        (("--prompt", "(a:1.5) b", "--expand-prompt", "paperworld"), "has weights, and expanding"),
        (("--prompt", "(a:9)"), "weight 9 of 'a' is out of range"),
        (("--negative-prompt", "(a:b)"), "weight 'b' in (a:b) is no number"),
        (("--prompt", "[0s-1s a"), "time stamp '[0s-1s a'"),
        (("--prompt", "", "--expand-prompt", "paperworld"), "the prompt is empty"),
    ],
)
def test_mistakes_are_one_line_and_status_2(sample, tmp_path, args, words):
    prompt = () if "--prompt" in args else ("--prompt", "x")
    status, printed, err = sample(*prompt, *args)
    assert status == 2 and printed == "" and words in err
    assert err.startswith("sora-jax: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nobody_is_asked_before_all_else_is_checked(sample, server):
    args = ("--prompt", "x", "--expand-prompt", f"{server.url}#m")
    assert sample(*args, "--steps", 0)[0] == 2 and not server.asked
    server.answers = [(500, b"")]
    status, _, err = sample(*args)
    assert status == 2 and err.startswith("sora-jax: ") and "refused, status 500" in err


def test_weights_change_the_video_and_weights_of_one_do_not(sample, tmp_path):
    texts = {"plain": "a red ball", "one": "a (red:1) ball", "more": "a (red:2) ball"}
    for name, text in texts.items():
        files = ("--save-text-embeddings", tmp_path / f"{name}.npy")
        assert sample("--prompt", text, *files, out=f"{name}.png")[0] == 0
    plain, one, more = (frames(tmp_path / f"{name}.png") for name in texts)
    np.testing.assert_array_equal(plain, one)
    assert np.abs(more.astype(int) - plain).max() > 0
    assert record(tmp_path, "one")["prompt"] == "a red ball"
    assert record(tmp_path, "more")["prompt"] == "a (red:2) ball"
    plain, more = (np.load(tmp_path / f"{name}.npy")[0] for name in ("plain", "more"))
    ratio = more[:11] / plain[:11]  # ten bytes and the end
    np.testing.assert_allclose(ratio[1:5] / ratio[0, 0], 2, rtol=1e-4)  # " red"
    np.testing.assert_allclose(ratio[[0, *range(5, 11)]] / ratio[0, 0], 1, rtol=1e-4)
    np.testing.assert_allclose((more[:11] ** 2).mean(), (plain[:11] ** 2).mean(), rtol=1e-5)
    assert sample("--again", tmp_path / "more.json", out="again.png")[0] == 0
    np.testing.assert_array_equal(frames(tmp_path / "again.png"), frames(tmp_path / "more.png"))


def test_a_long_weighted_prompt_keeps_its_weights(sample, tmp_path):
    status, _, err = sample("--prompt", "a (red ball:1.5) rolls left in the meadow", "--frames", 1)
    assert status == 0 and "was cut to: 'a (red ball:1.5) rolls left'" in err
    assert record(tmp_path)["prompt"] == "a (red ball:1.5) rolls left"


def test_segments_of_a_time_stamped_prompt_are_expanded_and_cut_one_by_one(sample, tmp_path):
    prompt = "[0s-0.3s] red ball spins, sea [0.3s-0.6s] red ball falls, sea"
    status, _, err = sample("--prompt", prompt, "--expand-prompt", "paperworld")
    assert status == 0, err
    assert "[0s-0.3s] a red ball spins by the sea [0.3s-0.6s] a red ball falls by the sea" in err
    made = record(tmp_path)
    assert made["prompt"] == "[0s-0.3s] a red ball spins by the [0.3s-0.6s] a red ball falls by the"
    assert made["prompt_given"] == prompt
