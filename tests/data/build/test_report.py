"""The report counts every clip once, in bounded memory, and no name or caption breaks its page."""

import html.parser
import itertools
import json
import pickle
import random
import re

import numpy as np
import pytest

from sora_jax.data.build import charts, histograms, words
from sora_jax.data.build.report import Report, without_numbers, write_report
from sora_jax.data.build.settings import BuildSettings

SETTINGS = BuildSettings().to_dict()
EVIL = "<script>alert('1')</script> & \"quotes\" $headline </style>"


def clip(key, *, dropped=None, seconds=2.0, captions=("a cat sleeps",), **changes):
    stage_and_reason = None if dropped is None else dict(zip(("stage", "reason"), dropped))  # noqa: B905
    return {
        "key": key, "start": 1.0, "end": 1.0 + seconds, "dropped": stage_and_reason,
        "width": 64, "height": 36, "num_frames": 48, "fps": 24.0, "bytes": 1000,
        "caption_kinds": ["sidecar"] * len(captions), "captions": list(captions),
        "scores": {"motion": 3.0, "sharpness": 100.0}, "phash": "0" * 16,
    } | changes  # fmt: skip


def row(source, clips=(), *, seconds=10.0, **changes):
    return {
        "source": source, "error": None, "stage": None, "width": 640, "height": 360, "fps": 24.0,
        "seconds": seconds, "codec": "h264", "clips": list(clips),
    } | changes  # fmt: skip


def many_rows(number):
    choose = random.Random(0)
    stages = [("length", "too short (0.{} s of 1)"), ("motion", "too little motion (.{} of .3)"),
              ("duplicate", "duplicate of a.mp4#000000{:02d}")]  # fmt: skip
    for i in range(number):
        source = f"v/{i:05d}.mp4"
        if choose.random() < 0.1:
            yield row(source, error=f"/in/{source}: no video stream", stage="probe", seconds=None)
            continue
        clips = []
        for j in range(choose.randrange(1, 6)):
            stage, reason = choose.choice(stages)
            drop = (stage, reason.format(choose.randrange(10, 99))) if choose.random() < 0.3 else ()
            clips.append(
                clip(
                    f"{source}#{j:08d}",
                    dropped=drop or None,
                    seconds=choose.uniform(0.2, 9),
                    scores={"motion": choose.lognormvariate(0, 2), "aesthetic": choose.gauss(5, 1)},
                )
            )
        yield row(source, clips)


def written(folder, rows, *, frames=lambda key: None, settings=SETTINGS):
    folder.mkdir(exist_ok=True)
    result = write_report(folder, rows, settings=settings, frames=frames)
    page = (folder / "report.html").read_text()
    assert json.loads((folder / "report.json").read_text()) == result
    return result, page


def picture(key):
    rng = np.random.default_rng(histograms.stable_hash(key))
    return rng.integers(0, 255, (5, 36, 64, 3), np.uint8)


def test_every_clip_is_counted_once_and_stages_follow_each_other(tmp_path):
    rows = list(many_rows(300))
    result, _ = written(tmp_path, rows)
    clips = [c for r in rows for c in r["clips"]]
    totals, stages = result["totals"], result["stages"]
    assert totals["clips_cut"] == len(clips)
    assert totals["clips_kept"] == sum(c["dropped"] is None for c in clips)
    assert totals["files_left_out"] == sum(r["error"] is not None for r in rows)
    assert totals["seconds_kept"] == pytest.approx(
        sum(c["end"] - c["start"] for c in clips if c["dropped"] is None), abs=1e-3 * len(clips)
    )
    names = [s["stage"] for s in stages]
    assert names == ["cut", "length", "brightness", "freeze", "motion", "blur", "duplicate",
                     "caption"]  # fmt: skip
    assert stages[0]["clips_in"] == len(clips) and stages[-1]["kept"] == totals["clips_kept"]
    for before, after in itertools.pairwise(stages):
        assert after["clips_in"] == before["kept"] == before["clips_in"] - before["dropped"]
    length = next(s for s in stages if s["stage"] == "length")
    assert length["reasons"] == {"too short": length["dropped"]}
    motion = result["histograms"]["motion"]
    inside = sum(motion["kept"]) + motion["below"][0] + motion["above"][0]
    assert inside == totals["clips_kept"]


def test_same_bytes_whatever_the_order_of_rows(tmp_path):
    rows = list(many_rows(200))
    written(tmp_path / "a", rows, frames=picture)
    random.Random(1).shuffle(rows)
    written(tmp_path / "b", rows, frames=picture)
    for name in ("report.json", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["report.html", "report.json"]


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    monkeypatch.setattr("sora_jax.data.build.report.MOST_FILES_NAMED", 20)
    report, sizes = Report(), []
    for i, r in enumerate(many_rows(900)):
        report.add(r)
        if i in (299, 899):
            sizes.append(len(pickle.dumps(report)))
    assert sizes[1] < 1.02 * sizes[0]


def test_files_are_named_up_to_the_limit_and_counted_beyond(tmp_path, monkeypatch):
    monkeypatch.setattr("sora_jax.data.build.report.MOST_FILES_NAMED", 5)
    rows = [
        row(f"{i}.mp4", error=f"{i}.mp4: broke off at frame {i}", stage=stage)
        for i, stage in enumerate(["probe"] * 6 + ["timeout"] * 2)
    ]
    left_out = written(tmp_path, rows)[0]["files_left_out"]
    assert left_out["limit"] == len(left_out["files"]) == 5
    assert left_out["by_stage"] == {"probe": 6, "timeout": 2}
    assert left_out["by_reason"] == {"broke off at frame …": 8}


class Reader(html.parser.HTMLParser):
    """Collects tags and checks that each is closed."""

    VOID = ("meta", "img", "line", "rect", "path", "br")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_nothing_in_the_page_is_markup_of_a_name_or_caption(tmp_path):
    clips = [
        clip(f"{EVIL}#00000000", captions=[EVIL], caption_kinds=[EVIL], scores={EVIL: 1.0}),
        clip(f"{EVIL}#00000001", dropped=(EVIL, EVIL), scores={EVIL: 3.0}),
    ]
    rows = [row(EVIL, clips, codec=EVIL, warning=EVIL), row("x", error=EVIL, stage=EVIL)]
    _, page = written(tmp_path, rows, frames=picture, settings={EVIL: {EVIL: EVIL}})
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    tags = [tag for tag, _ in reader.tags]
    assert "script" not in tags and tags.count("style") == 1 and "link" not in tags
    assert "".join(reader.text).count("<script>alert") >= 8
    for tag, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/jpeg;base64,")
    assert not re.search(r"https?://", page)


def test_pictures_are_of_kept_clips_in_every_form(tmp_path):
    shapes = {"a": (7, 36, 64, 3), "b": (3, 64, 36, 3), "c": (36, 64, 3), "d": (2, 8, 8, 3)}
    asked = []

    def frames(key):
        asked.append(key)
        shape = shapes.get(key[0])
        return None if shape is None else np.zeros(shape, np.uint8)

    clips = [clip(f"{name}#00000000") for name in "abcde"]
    clips.append(clip("f#00000000", dropped=("blur", "blurred")))
    _, page = written(tmp_path, [row("s", clips)], frames=frames)
    assert sorted(asked) == [f"{name}#00000000" for name in "abcde"]
    # d has two frames: the last is also the middle.
    assert page.count("<img ") == 3 + 3 + 1 + 3 and page.count("no picture") == 1
    kinds = re.findall(r'class="frames ([a-z]*)"', page)
    assert kinds == ["", "tall", "one", "", "none"]


def test_a_build_that_kept_nothing_has_a_report(tmp_path):
    _, page = written(tmp_path / "none", [])
    assert "No clip was kept" in page
    still = clip("a.png#00000000", num_frames=1, fps=0.0, start=0.0, end=0.0, captions=[])
    result, page = written(tmp_path / "still", [row("a.png", [still], seconds=0.0, codec="png")])
    assert result["totals"]["images_kept"] == 1 and "duration" not in result["histograms"]
    assert "1 clip kept, none dropped" in page and "No caption." in page


def test_numbers_that_json_cannot_hold_are_left_out(tmp_path):
    bad = clip("a#00000000", scores={"motion": float("nan"), "luma": None, "x": float("inf")})
    result, _ = written(tmp_path, [row("a", [bad])])
    assert not {"motion", "luma", "x"} & set(result["histograms"])


def test_reasons_differ_in_words_alone():
    assert without_numbers("too short (.3 s of 1 s)") == "too short"
    assert without_numbers("no result after 60 s") == "no result after … s"
    assert without_numbers("looks like a/c.mp4#00000012") == "looks like another clip"
    assert without_numbers("H264 stream") == "H264 stream"


@pytest.mark.parametrize("log", [False, True])
def test_bars_hold_every_value_between_their_edges(log):
    histogram = histograms.Log(-10, 10) if log else histograms.Linear(0.05, 1000)
    rng = np.random.default_rng(0)
    values = rng.lognormal(1, 0.8, 5000)
    for value in values:
        histogram.add(float(value), dropped=bool(value > 4))
    data = histogram.as_dict()
    edges = np.array(data["edges"])
    assert len(data["kept"]) == len(edges) - 1 <= histograms.MOST_BARS + 1
    expected, _ = np.histogram(values, edges)
    assert np.abs(np.add(data["kept"], data["dropped"]) - expected).max() <= 2
    outside = sum(data["below"]) + sum(data["above"])
    assert sum(data["kept"]) + sum(data["dropped"]) + outside == len(values)
    assert data["median"] == pytest.approx(np.median(values[values <= 4]), rel=0.05)


def test_values_outside_of_every_bin_are_counted_outside():
    histogram = histograms.Linear(1, 10)
    for value in (-5, 3, 4, 1000):
        histogram.add(value)
    data = histogram.as_dict()
    assert (data["below"], data["above"], sum(data["kept"])) == ([1, 0], [1, 0], 2)
    assert (data["min"], data["max"]) == (-5, 1000)
    histogram = histograms.Linear(1, 10)  # bars up to the last bin
    for value in (2, 9, 9, 1000):
        histogram.add(value)
    data = histogram.as_dict()
    assert (data["above"], sum(data["kept"])) == ([1, 0], 3)


def test_a_score_shows_the_narrowest_range_that_fits():
    def edges(values):
        score = histograms.Score()
        for value in values:
            score.add(value)
        return score.as_dict()["edges"]

    assert edges([0.2, 0.6, 1.0])[-1] <= 1
    assert edges([0, 3.5])[-1] <= 10 and edges([250.0])[-1] <= 256.01
    assert edges([3.0, 3000.0])[-1] > 3000


def test_a_sample_is_of_all_and_the_same_in_any_order():
    keys = [f"k{i}" for i in range(2000)]
    first, second = histograms.Sample(100), histograms.Sample(100)
    for key in keys:
        first.add(key, key)
    for key in reversed(keys):
        second.add(key, key)
    assert list(first) == list(second) and len(list(first)) == 100
    assert histograms.stable_hash("a/b.mp4#00000012") == 7_825_408_946_183_262_127  # in any process
    assert 600 < np.mean([int(key[1:]) for key in first]) < 1400


def test_charts_label_what_they_show():
    histogram = histograms.Linear(0.05, 12_000, "seconds")
    histogram.add(2.0)
    figure = charts.histogram("Duration", "duration", histogram.as_dict())
    assert figure.count("<rect") == 1 and "2 to 2.05: 1 kept" in figure and "median 2" in figure
    wide = histograms.Log(-4, 4, centred=True)
    wide.add(1.0), wide.add(16 / 9)
    labels = re.findall(r">([\d:]+)</text>", charts.histogram("Aspect", "aspect", wide.as_dict()))
    assert {"1:1", "16:9"} <= set(labels)


def test_words():
    assert [words.span(s) for s in (0, 9.42, 59.97, 60, 200, 7500, 4334400)] == [
        "0 s", "9.42 s", "1 min", "1 min", "3 min 20 s", "2 h 5 min", "1,204 h",
    ]  # fmt: skip
    assert [words.size(n) for n in (0, 812, 3_400_000, 999_900)] == [
        "0 B", "812 B", "3.4 MB", "1 MB",
    ]  # fmt: skip
    assert words.plural(1, "file") == "1 file" and words.plural(1200, "file") == "1,200 files"
