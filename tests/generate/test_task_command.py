"""Tasks from the command line: how files are read, and what is refused before weights are."""

import json
import shutil

import jax
import numpy as np
import pytest

import sora_jax
from sora_jax import cli, video_io
from sora_jax.generate import Pipeline, Video, lengths, memory


@pytest.fixture
def sample(tasks_folder, tmp_path, capsys):
    def call(*args, out="made.png"):
        base = ["sample", "--checkpoint", tasks_folder, "--prompt", "a ball", "--steps", 1]
        status = cli.main([str(a) for a in (*base, *args, "--out", tmp_path / out)])
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def wide(tmp_path):
    """Five frames of 32x16 at 24 a second: red, green at its left and right ends."""
    frames = np.full((5, 16, 32, 3), (200, 0, 0), np.uint8)
    frames[:, :, :8] = frames[:, :, 24:] = (0, 200, 0)
    path = tmp_path / "wide.png"
    Video(frames=frames, fps=24.0, metadata={}).save(path)
    assert video_io.probe(path).fps == 24.0
    return path


def frames_of(path):
    return video_io.read_video(path).frames.astype(int)


def test_interpolating_raises_the_files_own_rate(sample, wide, tmp_path):
    assert sample("--video", wide, "--interpolate", 2)[0] == 0
    made = video_io.probe(tmp_path / "made.png")
    assert (made.fps, made.num_frames) == (48.0, 9)
    assert sample("--video", wide, "--interpolate", 2, "--fps", 8)[0] == 0
    assert video_io.probe(tmp_path / "made.png").fps == 16.0


@pytest.mark.parametrize("fit, bars", [("crop", False), ("pad", True)])
def test_pictures_are_fitted_as_asked(sample, wide, tmp_path, fit, bars):
    ways = [("--keyframe", f"0:{wide}"), ("--image", wide), ("--image", wide, "--seconds", 2)]
    for task in (*ways, ("--video", wide, "--extend", "forward", "--seconds", 0.5)):
        assert sample(*task, "--fit", fit)[0] == 0
        first = frames_of(tmp_path / "made.png")[0]
        assert (first[:3].max() == 0) == bars, task  # black above the picture
        assert (first[8, 0, 1] > 100) == bars, task  # its green ends are there


def test_a_mask_file_is_cut_as_its_video_is(sample, wide, tmp_path):
    marked = np.zeros((1, 16, 32, 3), np.uint8)
    marked[:, :, 16:] = 255  # the right half of the video, and so of the part that is cut out
    Video(frames=marked, fps=8.0, metadata={}).save(tmp_path / "mask.png")
    assert sample("--inpaint", wide, "--mask", tmp_path / "mask.png")[0] == 0
    made = frames_of(tmp_path / "made.png")
    assert made.shape[1:3] == (16, 16)
    np.testing.assert_array_equal(
        made[:, :, :8], np.broadcast_to((200, 0, 0), (len(made), 16, 8, 3))
    )
    assert np.abs(made[:, :, 8:] - (200, 0, 0)).max() > 20
    Video(frames=marked[:, :, :20], fps=8.0, metadata={}).save(tmp_path / "mask.png")
    status, err = sample("--inpaint", wide, "--mask", tmp_path / "mask.png")
    assert status == 2 and "is 20x16; give one of 32x16" in err and "or of 16x16" in err
    status, err = sample("--inpaint", wide, "--mask", tmp_path / "mask.png", "--size", "32x16")
    assert status == 2 and err.endswith(f"give one of 32x16, as {wide} is.\n")


@pytest.mark.parametrize(
    "args, message",
    [
        (("--seconds", 0), "seconds 0 is out of range"),
        (("--seconds", "inf"), "seconds inf is out of range; use more than 0, at most 3600"),
        (("--video", "VIDEO", "--interpolate", 2, "--strength", -1), "strength -1 is out of"),
        (("--edit", "VIDEO", "--frames", 5), "--frames 5: --edit makes a video as long"),
        (("--video", "VIDEO", "--refine", 2, "--size", "8x8"), "--size 8x8: --refine makes"),
        (("--seconds", 1, "--save-latents", "x.npy"), "--save-latents x.npy: --seconds makes"),
        (("--video", "VIDEO", "--interpolate", 0), "interpolate 0 is out of range"),
        (("--video", "VIDEO", "--outpaint", "64x64", "--fit", "pad"), "--outpaint takes the video"),
        (
            ("--video", "VIDEO", "--refine", 2, "--fit", "crop"),
            "--refine takes the video",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(sample, wide, tmp_path, args, message):
    status, err = sample(*(wide if a == "VIDEO" else a for a in args))
    assert status == 2 and message in err
    assert not (tmp_path / "made.png").exists()


@pytest.mark.parametrize(
    "args",
    [
        ("--video", "MISSING", "--extend", "forward", "--seconds", 1),
        ("--edit", "MISSING"),
        ("--keyframe", "0:MISSING"),
        ("--inpaint", "WIDE", "--mask", "MISSING"),
        ("--join", "WIDE", "MISSING"),
    ],
)
def test_files_are_read_before_weights(sample, wide, tmp_path, monkeypatch, args):
    monkeypatch.setattr(Pipeline, "load_weights", None)
    names = {"WIDE": str(wide), "MISSING": str(tmp_path / "missing.mp4")}
    status, err = sample(*("".join(names.get(p, p) for p in split(str(a))) for a in args))
    assert status == 2 and "missing.mp4" in err


SECOND = ("--seconds", 1)
EXTEND = ("--video", "WIDE", *SECOND, "--extend")
INPAINT = ("--inpaint", "WIDE", "--mask", "0,0,8,8")


@pytest.mark.parametrize(
    "args, message",
    [
        (("--keyframe", "99:WIDE"), "keyframe 99 is outside the video; use 0 to 8"),
        (("--keyframe", "last:WIDE", "--keyframe", "8:WIDE"), "keyframe 8 is given twice"),
        ((*SECOND, "--joint", "--rolling"), "exclude each other"),
        (("--seconds", 4, "--window", 4), "window 4 is not 1 + a multiple of 2; use 3 or 5"),
        (("--seconds", 4, "--window", 0), "window 0 is not 1 + a multiple of 2; use 1"),
        (("--seconds", 4, "--window", 1), "window 1 is too short to move forward; use at least 3"),
        ((*INPAINT, "--window", 4), "window 4 is not 1 + a multiple of 2"),
        ((*INPAINT, "--window", 0), "window 0 is not 1 + a multiple of 2"),
        ((*EXTEND, "both", "--window", 3), "window 3 is too short to extend backward; use at"),
        ((*EXTEND, "backward", "--window", 1), "to extend backward; use at least 5"),
        ((*EXTEND, "forward", "--window", 1), "to extend forward; use at least 3"),
        ((*EXTEND, "forward", "--window", 0), "window 0 is not 1 + a multiple of 2"),
        (
            ("--inpaint", "WIDE", "--mask", "NOTHING"),
            "nothing.png marks nothing of the video; white",
        ),
        (("--inpaint", "WIDE", "--mask", "0,0,16,16"), "--mask 0,0,16,16 marks all of the video"),
        (
            ("--inpaint", "WIDE", "--mask=-8,0,16,16"),
            "--mask -8,0,16,16: no file, and no box; write",
        ),
        (("--inpaint", "WIDE", "--mask", "a,b,c,d"), "--mask a,b,c,d: no file, and no box"),
        (("--inpaint", "WIDE", "--mask", "1,2,3"), "x,y,w,h as four whole numbers"),
        (
            ("--inpaint", "WIDE", "--mask", "THREE"),
            "the mask is 16x16 of 3 frames, the video 16x16 of 2",
        ),
        (("--video", "WIDE", "--outpaint", "32x16"), "must be larger"),
        (("--video", "WIDE", "--outpaint", "50x30"), "size 50x30: width 50 is not a multiple"),
        (("--video", "WIDE", "--refine", 1), "scale 1 is out of range"),
        (("--join", "WIDE", "WIDE", "--seconds", 9), "seconds 9 is 72 frames; one window of 9"),
        (("--loop", "--seconds", 9), "seconds 9 is 72 frames; one window of 9"),
        ((*SECOND, "--joint", "--prompt", "[0-0.5] a ball [0.5-1.125] a tree"), "not --joint"),
    ],
)
def test_what_a_task_refuses_is_told_before_weights(
    sample, wide, tmp_path, monkeypatch, args, message
):
    for name, frames in (("nothing", 1), ("three", 3)):
        dark = np.zeros((frames, 16, 32, 3), np.uint8)
        dark[1:] = 255
        Video(frames=dark, fps=8.0, metadata={}).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(Pipeline, "load_weights", None)
    files = {"WIDE": wide, "NOTHING": tmp_path / "nothing.png", "THREE": tmp_path / "three.png"}
    status, err = sample(*("".join(str(files.get(p, p)) for p in split(str(a))) for a in args))
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "made.png").exists()


@pytest.mark.parametrize(
    "tasks, args, message",
    [
        ([], ("--video", "WIDE", "--extend", "forward", *SECOND), "extend forward"),
        (["prefix"], ("--video", "WIDE", "--extend", "both", *SECOND), "extend backward"),
        ([], ("--seconds", 9), "extend forward (--extend forward), and films"),
        (["prefix"], ("--seconds", 9, "--image", "WIDE"), "animate a picture"),
        (["prefix"], ("--seconds", 9, "--rolling"), "films whose noise rises"),
    ],
)
def test_an_untrained_task_is_told_before_weights(
    sample, tasks_folder, wide, tmp_path, monkeypatch, tasks, args, message
):
    copy = shutil.copytree(tasks_folder, tmp_path / "copy")
    values = json.loads((copy / "sampling.json").read_text()) | {"tasks": ["none", *tasks]}
    (copy / "sampling.json").write_text(json.dumps(values))
    monkeypatch.setattr(Pipeline, "load_weights", None)
    files = [wide if a == "WIDE" else a for a in args]
    status, err = sample("--checkpoint", copy, *files)
    assert status == 2 and err.count("\n") == 1
    assert f"this checkpoint was not trained for: {message}" in err


def test_weights_are_told_once_and_counted_before_they_are_read(sample, tasks_folder):
    assert sample("--loop")[1].count(" load ") == 1
    pipe = sora_jax.load(tasks_folder, weights=False)
    parts = (pipe.dit, pipe.vae, pipe.text)
    sizes = sum(leaf.size for part in parts for leaf in jax.tree.leaves(part.abstract))
    assert pipe.unread_bytes() == 4 * sizes
    half = sora_jax.load(tasks_folder, weights=False, dtype="bfloat16")
    assert 2 * sizes < half.unread_bytes() < 4 * sizes  # the VAE stays float32
    wide = sora_jax.load(tasks_folder, weights=False, mesh="tensor=2")
    assert 2 * sizes < wide.unread_bytes() < 4 * sizes  # norms are whole everywhere
    pipe.load_weights()
    assert pipe.unread_bytes() == 0


def test_a_window_leaves_room_for_weights_that_are_not_read(tasks_folder, monkeypatch):
    pipe = sora_jax.load(tasks_folder, weights=False)
    free = pipe.unread_bytes() * 1.001
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    assert lengths.window_of(pipe) == 3
    monkeypatch.setattr(Pipeline, "unread_bytes", lambda pipe: 0)
    assert lengths.window_of(pipe) > 3


@pytest.mark.parametrize("text", ['{"name": "my package"}', "one prompt a line", "[1]"])
def test_a_file_of_another_program_is_not_replaced_by_settings(
    sample, tasks_folder, tmp_path, monkeypatch, text
):
    other = tmp_path / "made.json"
    other.write_text(text)
    video = sora_jax.load(tasks_folder)("a ball", steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "load_weights", None)
        for task in ((), ("--seconds", 1)):
            status, err = sample(*task)
            assert status == 2 and "made.json, and what is there is none of a video" in err
    with pytest.raises(ValueError, match="none of a video"):
        video.save(tmp_path / "made.mp4")
    assert other.read_text() == text and not (tmp_path / "made.mp4").exists()
    other.unlink()
    for _ in range(2):  # its own are replaced
        video.save(tmp_path / "made.mp4")


@pytest.mark.parametrize("name", ["made.json", "made_sheet.png"])
def test_a_folder_that_has_a_name_beside_the_video_is_told_before_weights(
    sample, tmp_path, monkeypatch, name
):
    (tmp_path / name).mkdir()
    monkeypatch.setattr(Pipeline, "load_weights", None)
    for task in ((), ("--seconds", 1)):
        status, err = sample(*task, "--sheet")
        assert status == 2 and f"{name} is written beside it, and is a folder; use" in err


def test_a_folder_that_has_the_name_of_one_of_several_videos_is_told_before_weights(
    sample, tmp_path, monkeypatch
):
    (tmp_path / "made-1.png").mkdir()
    monkeypatch.setattr(Pipeline, "load_weights", None)
    status, err = sample("--batch", 2)
    assert status == 2 and "made-1.png is a directory" in err


@pytest.mark.parametrize(
    "args, out",
    [
        (("--fps", 60), "made.gif"),
        (("--fps", 60, "--seconds", 1), "made.gif"),
        (("--video", "WIDE", "--interpolate", 4), "made.gif"),
    ],
)
def test_a_rate_that_the_file_cannot_have_is_told_before_weights(
    sample, wide, monkeypatch, args, out
):
    monkeypatch.setattr(Pipeline, "load_weights", None)
    status, err = sample(*(wide if a == "WIDE" else a for a in args), out=out)
    assert status == 2 and "for .gif; use more than 0 and at most 50" in err


def split(text: str) -> list[str]:
    head, colon, tail = text.partition(":")
    return [head, colon, tail]
