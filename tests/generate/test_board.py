"""Storyboard files: what they may hold, and one line for what they may not."""

import json

import numpy as np
import pytest

from sora_jax import video_io
from sora_jax.generate import board

SHOT = {"prompt": "a red ball rolls left", "seconds": 2}


def shots(*changes):
    return {"shots": [{**SHOT, **change} for change in changes]}


def test_a_storyboard_is_read_with_its_defaults(tmp_path):
    path = tmp_path / "film.yaml"
    path.write_text(
        "fps: 12\nsize: 32x16\nstyle: paper cut-outs\nshots:\n"
        "  - {prompt: a ball, seconds: 2}\n"
        "  - prompt: [{at: 0, text: it stays}, {at: 1, text: it rolls}]\n"
        "    seconds: 3\n    camera: pan left\n"
        "  - {prompt: on it goes, seconds: 1, begins: continue, seed: 7}\n"
    )
    read = board.read(path)
    assert (read.fps, read.size, read.seconds) == (12.0, (32, 16), 6.0)
    first, second, third = read.shots
    assert first.spans == ((0.0, "a ball"),) and second.carry == 1 and third.carry == 2
    assert second.prompts(read.style) == [
        (0.0, "it stays, the camera pans left, paper cut-outs"),
        (1.0, "it rolls, the camera pans left, paper cut-outs"),
    ]
    assert third.begins == "continue" and third.seed == 7
    as_json = tmp_path / "film.json"
    for encoding in ("utf-8", "utf-8-sig"):  # Windows puts a byte order mark first
        as_json.write_text(json.dumps(shots({})), encoding)
        assert board.read(as_json).shots[0].seconds == 2


def test_a_picture_is_looked_for_beside_the_file(tmp_path):
    video_io.save_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    made = board.parse(shots({"keyframe": "a.png"}), folder=tmp_path)
    assert made.shots[0].keyframe == str(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "is \\[\\]; write fields: shots"),
        ({"shots": []}, "list at least one shot"),
        ({"shoots": []}, "unknown field 'shoots'; did you mean 'shots'"),
        (shots({"secnds": 1}), "shot 1: unknown field 'secnds'; did you mean 'seconds'"),
        (shots({}, {"seconds": 0}), "shot 2: seconds is 0; use a number above 0"),
        (shots({"seconds": True}), "seconds is True"),
        ({"shots": [{"seconds": 1}]}, "has no prompt"),
        ({"shots": [{"prompt": "a"}]}, "has no seconds"),
        (shots({"prompt": " "}), "the prompt is empty"),
        (shots({"prompt": [{"at": 1, "text": "a"}]}), "the first is at 0"),
        (shots({"prompt": [{"at": 0, "txt": "a"}]}), "write {at: SECONDS, text: TEXT}"),
        (shots({"begins": "continue"}), "nothing comes before it"),
        (shots({}, {"begins": "fade"}), "begins 'fade' is unknown; use cut or continue"),
        (shots({}, {"carry": 2}), "carry 2 is no earlier shot; use 1 to 1, or 0"),
        (shots({"carry": 5}), "shot 1: carry 5 is no earlier shot; use 0, or leave it out"),
        (shots({"keyframe": "none.png"}), "no such file"),
        ({**shots({}), "size": "64"}, "write width x height"),
        ({**shots({}), "size": 0x40}, r"size is 64 \(YAML reads 0x... as one number\); write"),
        ({**shots({}), "fps": "fast"}, "fps is 'fast'"),
        ({**shots({}), "seed": -1}, "seed is -1; use a whole number"),
    ],
)
def test_bad_storyboards_are_refused_in_one_line(values, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        board.parse(values, folder=tmp_path)
    assert "\n" not in str(error.value)


def test_bad_files_are_refused(tmp_path):
    for name, text, message in (
        ("a.txt", "", "a .yaml or .json file"),
        ("a.yaml", None, "no such file"),
        ("b.yaml", "shots: [", "not readable"),
        ("c.yaml", "style: B\xe4r", r"c\.yaml: not readable: 'utf-8' codec"),
        (".", None, "a .yaml or .json file"),
        ("b.json", "{", "not readable"),
    ):
        path = tmp_path / name
        if text is not None:
            path.write_text(text, "latin-1")
        with pytest.raises(ValueError, match=message):
            board.read(path)
