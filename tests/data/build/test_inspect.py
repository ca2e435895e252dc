"""`data inspect` tells of a built set what its report does, and of raw videos what they are."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from sora_jax import cli, video_io
from sora_jax.data.build import terminal
from sora_jax.data.build.inspect import inspect
from sora_jax.data.build.report import write_report
from sora_jax.data.build.settings import BuildSettings
from tests.data.build.test_report import EVIL, clip, many_rows, row


def built(folder, rows):
    """The files of a built set that `inspect` reads."""
    folder.mkdir()
    report = write_report(folder, rows, settings=BuildSettings().to_dict(), frames=lambda key: None)
    kept = [c for r in rows for c in r["clips"] if c["dropped"] is None]
    arrays = {n: np.array([c[n] for c in kept]) for n in ("num_frames", "height", "width", "fps")}
    np.savez(folder / "index.npz", **arrays)
    manifest = {
        "format": 1, "settings": {}, "version": "1.2.3", "records": len(kept),
        "shards": [{"file": "a", "bytes": 7_000_000, "records": len(kept)}],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return report


def printed(path, *, width=100, color=False):
    output = io.StringIO()
    color_system = "truecolor" if color else None
    inspect(
        path, Console(file=output, width=width, force_terminal=color, color_system=color_system)
    )
    return output.getvalue()


def test_a_built_set_shows_what_its_report_holds(tmp_path):
    report = built(tmp_path / "set", list(many_rows(120)))
    text = printed(tmp_path / "set")
    totals = report["totals"]
    assert f"{totals['clips_kept']} of {totals['clips_cut']} clips kept" in text
    assert "7 MB in 1 shard" in text and "sora_jax 1.2.3" in text
    for stage in report["stages"][1:]:
        line = re.search(rf"^ *{stage['stage']} .*$", text, re.M).group()
        assert re.findall(r"\b\d+\b", line)[: 1 + (stage["dropped"] > 0)] == [
            str(stage["kept"]), *([str(stage["dropped"])] if stage["dropped"] else []),
        ]  # fmt: skip
    for title in ("Duration", "Aspect", "Motion", "Caption length", "Size", "Aesthetic"):
        assert title in text
    assert f"Files left out: {totals['files_left_out']}" in text
    assert "and " + str(totals["files_left_out"] - 8) + " more" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path, width):
    built(tmp_path / "set", list(many_rows(60)))
    assert max(map(len, printed(tmp_path / "set", width=width).splitlines())) <= width


def test_names_and_captions_cannot_steer_the_terminal(tmp_path):
    evil = "[bold red]x[/] \x1b[2J\x07" + EVIL
    rows = [
        row(evil, [clip(f"{evil}#00000000", captions=[evil], caption_kinds=[evil])], warning=evil),
        row("b", error=f"{evil}", stage=evil),
        row("c", [clip("c#00000001", dropped=(evil, evil))]),
    ]
    built(tmp_path / "set", rows)
    for color in (False, True):
        text = printed(tmp_path / "set", color=color)
        assert "\x1b[2J" not in text and "\x07" not in text
    plain = printed(tmp_path / "set", width=300)
    assert plain.count("[bold red]x[/]") >= 4


def test_an_unfinished_or_damaged_set_is_named_in_one_line(tmp_path):
    unfinished = tmp_path / "unfinished"
    (unfinished / ".build").mkdir(parents=True)
    with pytest.raises(ValueError, match="not finished; run the same command again"):
        inspect(unfinished)
    for name in ("report.json", "index.npz"):
        folder = tmp_path / name
        built(folder, [row("a", [clip("a#00000000")])])
        (folder / name).write_bytes(b"{")
        with pytest.raises(ValueError, match=f"{name} cannot be read") as error:
            inspect(folder)
        assert "\n" not in str(error.value)
    folder = tmp_path / "short"
    built(folder, [row("a", [clip("a#00000000")])])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"records": 2}))
    with pytest.raises(ValueError, match=r"lists 1 clips, manifest.json 2"):
        inspect(folder)


def test_a_raw_folder_shows_counts_sizes_and_captions(tmp_path, capsys):
    frames = np.zeros((12, 32, 48, 3), np.uint8)
    for name in ("a", "b"):
        video_io.write_video(tmp_path / f"{name}.mp4", frames, fps=8)
    video_io.save_image(tmp_path / "c.png", frames[0])
    (tmp_path / "a.txt").write_text("a grey square rests")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert cli.main(["data", "inspect", str(tmp_path)]) in (None, 0)
    text = capsys.readouterr().out
    assert "4 files, nothing built from them yet" in text
    assert re.search(r"videos +2\b", text) and re.search(r"images +1\b", text)
    assert re.search(r"captions +1 of 4 files", text) and "3 s, as declared" in text
    assert re.search(r"48×32 +█+ +3", text) and "Unreadable: 1" in text and "broken.mp4" in text


def test_only_some_files_of_many_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("sora_jax.data.build.inspect.PROBED", 3)
    for i in range(5):
        video_io.save_image(tmp_path / f"{i}.png", np.zeros((8, 8, 3), np.uint8))
    assert re.search(r"images +3 \(of 3 looked at\)", printed(tmp_path))


def test_no_such_folder_is_one_line(tmp_path, capsys):
    with pytest.raises(ValueError, match="no such file or folder"):
        inspect(tmp_path / "absent")


def test_bars_end_where_their_share_does():
    assert terminal.bar(1, 0).plain == "█" * terminal.BAR
    half = terminal.bar(0.5, 0.25).plain
    assert half.count("█") == terminal.BAR // 2 and half.count("░") == terminal.BAR // 4
    assert "░" in terminal.bar(0.9, 0.001).plain and terminal.bar(0, 0).plain == ""
