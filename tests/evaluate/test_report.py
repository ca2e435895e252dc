"""An evaluation leaves a JSON file and contact sheets, all or nothing."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from sora_jax.evaluate import SUITES, report, run_suite
from sora_jax.video_io import read_video

FRAMES = np.zeros((17, 64, 64, 3), np.uint8)
ASKED = {"colour": "red", "shape": "ball", "place": "sea", "verb": "rolls left"}
RIGHT = {
    "prompt": "a red ball rolls left by the sea",
    "seed": 0,
    "asked": ASKED,
    "read": ASKED,
    "right": dict.fromkeys(ASKED, True),
}
WRONG = RIGHT | {
    "read": ASKED | {"verb": "flies right"},
    "right": RIGHT["right"] | {"verb": False},
}


def test_suite_writes_report_and_sheet_and_prints_a_table(tmp_path, fake_pipeline):
    out = tmp_path / "report.json"
    result = run_suite("paperworld", fake_pipeline(), out, prompts=2, batch_size=2, vae_clips=1)
    assert json.loads(out.read_text()) == result
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.png"}
    console = Console(file=io.StringIO(), width=80)
    report.print_table(result, console)
    printed = console.file.getvalue()
    for words in ("heldout", "colour", "95 % interval", "0.342 to 1.000", ">= 0.95", "126.02 dB"):
        assert words in printed


def test_failures_get_a_sheet_and_a_stale_one_goes(tmp_path):
    out = tmp_path / "report.json"
    gallery = report.Gallery()
    gallery.add("heldout", WRONG, FRAMES)
    assert report.write({}, out, gallery=gallery) == [
        tmp_path / "report.png",
        tmp_path / "report_failures.png",
        out,
    ]
    sheet = read_video(tmp_path / "report_failures.png").frames[0]
    assert sheet.shape[1] > report.COLUMNS * 128
    gallery = report.Gallery()
    gallery.add("heldout", RIGHT, FRAMES)
    report.write({}, out, gallery=gallery)
    assert not (tmp_path / "report_failures.png").exists()


def test_gallery_labels_failures_with_asked_and_read_and_keeps_few():
    gallery = report.Gallery()
    for _ in range(40):
        gallery.add("heldout", WRONG, FRAMES)
        gallery.add("seen", RIGHT, FRAMES)
    assert len(gallery.first) == report.FIRST
    assert len(gallery.failures["heldout"]) == report.MOST_FAILURES
    assert gallery.failures["seen"] == []
    label = gallery.failures["heldout"][0][0]
    assert label == "heldout: a red ball rolls left by the sea (rolls left -> flies right)"


def test_a_result_that_is_not_json_leaves_the_old_report(tmp_path):
    out = tmp_path / "report.json"
    out.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write({"rate": float("nan")}, out, gallery=report.Gallery())
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_unknown_suite_names_the_nearest_and_bad_output_is_refused_before_work(
    tmp_path, fake_pipeline
):
    pipeline = fake_pipeline()
    with pytest.raises(ValueError, match=r"unknown suite 'paperwrold'; did you mean 'paperworld'"):
        run_suite("paperwrold", pipeline, tmp_path / "x.json")
    with pytest.raises(ValueError, match="use one of: paperworld"):
        run_suite("zzz", pipeline, tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"extension '.txt'; use one of .json"):
        run_suite("paperworld", pipeline, tmp_path / "x.txt")
    with pytest.raises(ValueError, match="does not exist"):
        run_suite("paperworld", pipeline, tmp_path / "missing" / "x.json")
    assert pipeline.batches == [] and set(SUITES) == {"paperworld", "tasks"}
