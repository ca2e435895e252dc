"""Storyboards on the tiny model: lengths, what is carried over, and the plan."""

import json

import numpy as np
import pytest

import sora_jax
from sora_jax import agreement, cli, video_io
from sora_jax.generate import Pipeline, board, memory, storyboard

SETTINGS = {"steps": 2}


def board_of(*shots):
    values = {"shots": [{"prompt": "a red ball", "seconds": 1, **shot} for shot in shots]}
    return board.parse(values)


def made(pipe, *shots, **options):
    film = storyboard.render(pipe, board_of(*shots), **SETTINGS, **options)
    return film, np.concatenate(list(film.parts))


def test_every_shot_has_its_length_and_the_plan_says_so(pipe):
    shots = ({"seconds": 0.5}, {"seconds": 2}, {"begins": "continue"}, {"carry": 0})
    steps = []
    film, frames = made(pipe, *shots, on_step=lambda i, n, x: steps.append((i, n)))
    assert len(frames) == 36
    plan = storyboard.plan(pipe, board_of(*shots), **SETTINGS)
    assert [part.frames for part in plan] == [4, 16, 8, 8]
    assert steps[-1] == (len(steps), 2 * sum(part.windows for part in plan))
    assert film.metadata["frames"] == 36 and film.metadata["task"]["name"] == "storyboard"


def test_frames_of_a_shot_leave_before_the_shot_is_whole(pipe):
    steps, left = [], []
    shots = board.parse({"shots": [{"prompt": "a red ball", "seconds": 3}]})
    film = storyboard.render(pipe, shots, **SETTINGS, on_step=lambda i, n, x: steps.append((i, n)))
    for part in film.parts:
        left.append((len(part), *steps[-1]))
    assert sum(count for count, _, _ in left) == 24
    assert left[0][1] == SETTINGS["steps"] < left[0][2]  # after the first window's last step


def test_a_shot_begins_with_its_picture(pipe, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = video_io.save_image(tmp_path / "a.png", picture)
    _, frames = made(pipe, {}, {"keyframe": str(path)})
    np.testing.assert_array_equal(frames[8], picture)


def test_memory_that_the_system_would_give_back_counts_as_free(monkeypatch):
    class Device:
        def memory_stats(self):
            return None  # as a CPU

    monkeypatch.setattr(memory.jax, "local_devices", lambda: [Device()])
    told = "MemTotal: 9 kB\nMemFree: 1000 kB\nMemAvailable:    7000 kB\nCached: 6000 kB\n"
    monkeypatch.setattr(memory.Path, "read_text", lambda path: told)
    assert memory.free_bytes() == 7000 * 1024

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(memory.Path, "read_text", missing)  # as on other systems
    assert memory.free_bytes() > 0


@pytest.mark.parametrize("what", ["--plan", "--out=film.mp4"])
def test_a_keyframe_that_is_no_picture_is_told_with_its_shot(
    tasks_folder, tmp_path, monkeypatch, capsys, what
):
    (tmp_path / "notes.png").write_text("no picture")
    shots = "shots:\n - {prompt: a, seconds: 1}\n - {prompt: b, seconds: 1, keyframe: notes.png}"
    (tmp_path / "film.yaml").write_text(shots)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "load_weights", None)
    assert cli.main(["storyboard", "film.yaml", "--checkpoint", str(tasks_folder), what]) == 2
    told = capsys.readouterr().err
    assert told.startswith("sora-jax: shot 2: keyframe") and "notes.png" in told
    assert told.count("\n") == 1


def prompts_seen(pipe, monkeypatch, *shots):
    seen = []
    original = type(pipe).encode_text

    def spy(self, prompts, negative=()):
        seen.append(list(prompts))
        return original(self, prompts, negative)

    monkeypatch.setattr(type(pipe), "encode_text", spy)
    made(pipe, *shots)
    return seen


def test_a_cut_shows_the_model_both_sides_of_it(pipe, monkeypatch):
    seen = prompts_seen(pipe, monkeypatch, {}, {"prompt": "a red ball at night", "seconds": 0.5})
    assert seen[0] == ["a red ball"]
    assert seen[1] == ["a red ball. Cut to: the red ball at night"]


def test_prompts_change_within_a_shot(pipe, monkeypatch):
    spans = [{"at": 0, "text": "it stays"}, {"at": 1, "text": "it rolls"}]
    seen = prompts_seen(pipe, monkeypatch, {"prompt": spans, "seconds": 2})
    assert seen[0][:2] == ["it stays", "it rolls"]
    short = [{"at": 0, "text": "a"}, {"at": 0.1, "text": "b"}]
    with pytest.raises(ValueError, match=r"shot 1: the prompt at 0 s is for 0.1 s"):
        made(pipe, {"prompt": short})


def test_whatever_goes_on_from_what_was_made_is_guided_as_such(pipe, tmp_path, guided_at):
    picture = video_io.save_image(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    shots = ({}, {"begins": "continue"}, {}, {"keyframe": str(picture)})
    whole, late = (0.0, 1.0), (0.9, 1.0)
    made(pipe, *shots, past_guidance_interval=late)
    # Shots of 8 frames by windows of 9, of which 5 are taken over; a cut's makes 5 of its shot.
    assert guided_at == [whole, late, late, whole, late, whole]
    plan = storyboard.plan(pipe, board_of(*shots), **SETTINGS, past_guidance_interval=late)
    cost = [part.tflops / plan[0].tflops for part in plan]
    # A guided window is of two steps and four passes; one that goes on guides the first alone.
    np.testing.assert_allclose(cost, [4 / 4, (3 + 3) / 4, (4 + 3) / 4, 4 / 4])


@pytest.mark.parametrize("fps, frames", [(24, 37), (30, 77)])
def test_prompts_change_at_any_rate(pipe, fps, frames):
    """37 frames of 24 a second are 1.5416666666666667 s, which six digits round up."""
    spans = [{"at": 0, "text": "it stays"}, {"at": 0.5, "text": "it rolls"}]
    values = {"fps": fps, "shots": [{"prompt": spans, "seconds": frames / fps}]}
    film = storyboard.render(pipe, board.parse(values), **SETTINGS)
    assert sum(len(part) for part in film.parts) == frames


@pytest.mark.parametrize(
    "text, message",
    [
        ("a (box:9)", "shot 2: weight 9 of 'box' is out of range"),
        ("[0s-1s] a box", "shot 2: .* has a time stamp; write a list of at and text"),
    ],
)
def test_every_prompt_is_read_before_the_first_shot_is_made(pipe, text, message):
    later = [{"at": 0, "text": "it stays"}, {"at": 1, "text": text}]
    shots = [{"prompt": "a red ball", "seconds": 1}, {"prompt": later, "seconds": 2}]
    with pytest.raises(ValueError, match=message):
        storyboard.plan(pipe, board.parse({"shots": shots}), **SETTINGS)


def test_a_window_fits_the_memory_of_the_process_that_has_least(pipe, monkeypatch):
    shots = board.parse({"shots": [{"prompt": "a", "seconds": 1}]})
    whole = storyboard.window_of(pipe, shots)
    cells = pipe.num_tokens(pipe.request("a", frames=1))
    frame = memory.window_bytes(pipe.dit.config, cells) / memory.SHARE
    monkeypatch.setattr(agreement, "gather", lambda mine: [mine, 3.5 * frame])
    assert storyboard.window_of(pipe, shots) == 5 < whole
    with pytest.raises(ValueError, match="frames follow from the seconds"):
        storyboard.plan(pipe, shots, frames=9)


def test_another_seed_makes_another_film(pipe):
    (_, first), (_, second) = (made(pipe, {"seed": seed}) for seed in (1, 2))
    assert (first != second).any()


def test_what_a_checkpoint_cannot_do_is_refused_before_work(pipeline_folder):
    plain = sora_jax.load(pipeline_folder)
    with pytest.raises(ValueError, match="not trained for"):
        made(plain, {}, {})


def test_the_command_plans_and_renders(tasks_folder, tmp_path, capsys):
    file = tmp_path / "film.yaml"
    file.write_text("shots: [{prompt: a red ball, seconds: 1}, {prompt: it stays, seconds: 1}]")
    base = ["storyboard", str(file), "--checkpoint", str(tasks_folder), "--steps", "1"]
    assert cli.main([*base, "--plan"]) == 0
    told = capsys.readouterr().out
    assert "2 shots, 2 s, 16 frames" in told and "caches" not in told
    assert cli.main([*base, "--plan", "--kv-cache", "2"]) == 0
    assert "less what the caches save" in " ".join(capsys.readouterr().out.split())
    out = tmp_path / "film.mp4"
    assert cli.main([*base, "--out", str(out)]) == 0
    assert len(video_io.read_video(out).frames) == 16
    assert cli.main(base) == 2
    seen = tmp_path / "seen.png"
    options = ["--seed", "7", "--window", "5", "--mesh", "context=2", "--preview", str(seen)]
    assert cli.main([*base, "--out", str(out), *options]) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    assert (record["seed"], record["mesh"]) == (7, "context=2")
    assert len(video_io.read_video(out).frames) == 16 and seen.exists()
    capsys.readouterr()
    assert cli.main([*base, "--plan", "--window", "5"]) == 0
    narrow = capsys.readouterr().out
    assert cli.main([*base, "--plan"]) == 0
    assert narrow != capsys.readouterr().out  # more windows
    assert record["task"]["window"] == 5
    for window, says in (("6", "window 6 is not 1 +"), ("1", "at least 5"), ("0", "window 0 is")):
        assert cli.main([*base, "--plan", "--window", window]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    file.write_text("shots: [{prompt: a red ball, seconds: 0}]")
    assert cli.main([*base, "--out", str(out)]) == 2
    assert "shot 1: seconds is 0" in capsys.readouterr().err


def test_a_storyboard_is_not_replaced_by_the_settings_of_its_film(tasks_folder, tmp_path, capsys):
    film = tmp_path / "film.json"
    film.write_text(json.dumps({"shots": [{"prompt": "a ball", "seconds": 1}]}))
    before = film.read_text()
    arguments = ["storyboard", str(film), "--checkpoint", str(tasks_folder)]
    assert cli.main([*arguments, "--out", str(tmp_path / "film.png")]) == 2
    assert "what is there is none of a video; use another name" in capsys.readouterr().err
    assert film.read_text() == before and not (tmp_path / "film.png").exists()
