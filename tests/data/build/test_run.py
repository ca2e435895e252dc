"""A build goes on from wherever it stopped, to the same bytes; every mistake is one line."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from sora_jax import cli, video_io
from sora_jax.data import records
from sora_jax.data.build import run, shards, staging
from sora_jax.data.build.inputs import find_inputs
from sora_jax.data.build.run import build, verify
from sora_jax.data.build.settings import (
    BuildSettings,
    CaptionSettings,
    LimitSettings,
    MotionSettings,
    WriteSettings,
)
from sora_jax.data.build.tasks import FileTask, process_one
from sora_jax.data.build.workers import CannotStore, Outcome
from tests.data.build.fakes import contents, make_files, process

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")


@pytest.fixture
def here(monkeypatch):
    """Tasks are done in this process, which needs no time to start; returns what was done."""
    done = []

    def run_here(function, tasks, **_):
        for index, task in enumerate(tasks):
            try:
                text = function(task)
            except OSError as error:
                raise CannotStore(str(error)) from error
            done.append(task)
            yield Outcome(index, "done", text)

    monkeypatch.setattr(run, "run_tasks", run_here)
    return done


def build_here(source, out, settings=None, **options):
    return build(str(source), str(out), settings, process=process, workers=1, **options)


def files_done(done):
    names = [task.file.key for task in done if hasattr(task, "file")]
    done.clear()
    return names


def reasons(report):
    return {f["source"]: (f["stage"], f["reason"]) for f in report["files_left_out"]["files"]}


def test_workers_give_what_one_process_gives_and_every_failure_has_its_reason(
    tmp_path, here, monkeypatch
):
    source = make_files(tmp_path / "in", 8)
    for name, text in {"1": "raise", "2": "broken"}.items():
        (source / f"00{name}.mp4").write_text(text)
    build_here(source, tmp_path / "one")
    monkeypatch.undo()
    build(str(source), str(tmp_path / "two"), workers=2, process=process)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    (source / "003.mp4").write_text("hang")
    (source / "004.mp4").write_text("segfault")
    settings = BuildSettings(limits=LimitSettings(seconds=8, mebibytes=2048))
    report = build(str(source), str(tmp_path / "three"), settings, workers=3, process=process)
    assert reasons(report) == {
        "001.mp4": (
            "crash",
            "cannot be processed (ZeroDivisionError: no frame rate, fakes.py:26)",
        ),
        "002.mp4": ("probe", "cannot be decoded"),
        "003.mp4": ("timeout", "the file took longer than 8 s"),
        "004.mp4": ("crash", "the file ended the process that read it (SIGSEGV)"),
    }
    assert verify(tmp_path / "three")["records"] == 8


def test_a_built_set_is_read_by_tfds_and_nothing_else_is_left(tmp_path, here):
    out = tmp_path / "out"
    report = build_here(make_files(tmp_path / "in", 5), out)
    assert report["totals"]["clips_kept"] == 10
    assert sorted(contents(out)) == [
        "clips-train.array_record-00000-of-00001", "dataset_info.json", "features.json",
        "index.npz", "manifest.json", "report.html", "report.json",
    ]  # fmt: skip
    source = tfds.builder_from_directory(out).as_data_source("train")
    found = [records.parse(source[i]) for i in range(len(source))]
    assert sorted(record.key for record in found) == [
        f"{i:03d}.mp4#{first:08d}" for i in range(5) for first in (0, 16)
    ]
    for record in found:
        assert record.captions == [f"caption {int(record.source[:3])}"]
        assert records.decode_clip(record.clip).shape == (1, 32, 64, 3)
    assert verify(out)["records"] == 10


def test_only_what_changed_is_done_again(tmp_path, here):
    source, out = make_files(tmp_path / "in", 4), tmp_path / "out"
    (source / "003.mp4").write_text("full")
    with pytest.raises(
        ValueError, match=r"No space left on device.*\); 3 of 4 files are finished: free some space"
    ) as error:
        build_here(source, out)
    assert "\n" not in str(error.value) and os.listdir(out) == [".build"]
    assert files_done(here) == ["000.mp4", "001.mp4", "002.mp4"]
    (source / "001.txt").write_text("another caption")
    os.utime(source / "002.mp4", ns=(1, 1))
    (source / "003.mp4").write_text("broken")
    build_here(source, out)
    assert files_done(here) == ["001.mp4", "002.mp4", "003.mp4"]
    build_here(source, tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")
    files_done(here)
    # Nothing to do: not even where the limits are others, or a file has been touched.
    os.utime(source / "002.mp4", ns=(2, 2))
    limits = BuildSettings(limits=LimitSettings(seconds=7))
    assert build_here(source, out, limits)["totals"] and not here
    assert contents(out) == contents(tmp_path / "undisturbed")
    with pytest.raises(ValueError, match="holds a set of other files or settings"):
        build_here(source, out, BuildSettings(motion=MotionSettings(min=0.5)))


def test_shards_written_before_a_change_are_written_again(tmp_path, here, monkeypatch):
    source, out = make_files(tmp_path / "in", 3), tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run._Build, "_report", stop)
        with pytest.raises(KeyboardInterrupt):
            build_here(source, out)
    assert list(out.glob("clips-*"))
    left = out / ".build" / "tmp" / "left"
    left.mkdir(parents=True)
    (source / "001.txt").write_text("caption A")  # of the same length, for the same clips
    with monkeypatch.context() as patch:
        patch.setattr(run._Build, "_complete", stop)
        with pytest.raises(KeyboardInterrupt):
            build_here(source, out)
    assert not left.exists()
    build_here(source, out)
    build_here(source, tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_settings_decide_which_rows_still_count(tmp_path, here, monkeypatch):
    source, out = make_files(tmp_path / "in", 3), tmp_path / "out"
    (source / "002.mp4").write_text("raise")
    settings = BuildSettings()

    def stop(*_):
        raise KeyboardInterrupt

    def again(**changes):
        with pytest.raises(KeyboardInterrupt, match="3 of 3 files are finished"):
            build_here(source, out, dataclasses.replace(settings, **changes))
        return files_done(here)

    monkeypatch.setattr(shards, "make_plan", stop)
    assert again() == ["000.mp4", "001.mp4", "002.mp4"]
    assert again() == []
    assert again(duplicate=None, write=WriteSettings(seed=1, shard_mebibytes=9)) == []
    assert again(limits=LimitSettings(seconds=9)) == ["002.mp4"]  # it may have been late
    assert again(limits=LimitSettings(seconds=9), motion=None) == ["000.mp4", "001.mp4", "002.mp4"]


@pytest.mark.parametrize("where", ["shard", "manifest.json", "index.npz", "report.html", "row"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    tmp_path, here, monkeypatch, where
):
    source, out = make_files(tmp_path / "in", 3), tmp_path / "out"
    build_here(source, tmp_path / "undisturbed")
    publish, write_json = staging.Staging.publish, staging.write_json

    def full(*_):
        raise FULL

    with monkeypatch.context() as patch:
        if where == "shard":
            patch.setattr(shards, "_write_records", full)
        elif where == "row":
            patch.setattr(staging, "write_json", full)
        else:
            patch.setattr(
                staging.Staging,
                "publish",
                lambda self, path, name: full() if name == where else publish(self, path, name),
            )
        with pytest.raises(ValueError, match="No space left on device") as error:
            build_here(source, out)
    assert "\n" not in str(error.value) and write_json is staging.write_json
    whole = contents(tmp_path / "undisturbed")
    left = {name: data for name, data in contents(out).items() if not name.startswith(".build")}
    assert left.items() <= whole.items() and "manifest.json" not in left
    assert not list((out / ".build").glob("tmp/*"))
    with pytest.raises(ValueError, match="the build is not finished; run the same command again"):
        verify(out)
    build_here(source, out)
    assert contents(out) == whole


def test_the_array_record_writer_s_own_words_for_a_full_disk_are_known(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    (tmp_path / "shard").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        shards._write_records(tmp_path / "shard", [b"x" * (1 << 22)])


def test_captions_are_asked_for_unless_the_policy_says_otherwise(tmp_path, here, monkeypatch):
    source = make_files(tmp_path / "in", 4)
    (source / "001.txt").unlink()
    with pytest.raises(ValueError, match="1 of 4 files have no caption"):
        build_here(source, tmp_path / "a")
    report = build_here(source, tmp_path / "b", captions="drop")
    assert [(f["source"], f["stage"]) for f in report["files_left_out"]["files"]] == [
        ("001.mp4", "caption")
    ]

    def captioned(file, settings, staging):
        row = process(file._replace(captions=()), settings, staging)
        row["clips"][0] |= {"captions": ["a dog"], "caption_kinds": ["short"]}
        return row

    (tmp_path / "model").mkdir()
    settings = BuildSettings(caption=CaptionSettings(model=str(tmp_path / "model")))
    monkeypatch.setattr(run, "check_packages", lambda _: None)
    out, options = str(tmp_path / "d"), {"captions": "drop", "process": captioned}
    assert build(str(source), out, settings, **options)["totals"]["clips_kept"] == 4
    assert build_here(source, tmp_path / "c", captions="allow")["totals"]["clips_kept"] == 8


def test_nothing_kept_is_one_line_with_a_report(tmp_path, here):
    source = make_files(tmp_path / "in", 2, "broken")
    line = r"no readable video found: none of 2 files .*000\.mp4: cannot be decoded\); see .*html"
    with pytest.raises(ValueError, match=line):
        build_here(source, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["totals"]["files_left_out"] == 2
    make_files(source, 2)
    assert build_here(source, tmp_path / "out")["totals"]["clips_kept"] == 4


def test_a_folder_with_other_things_or_another_build_is_left_alone(tmp_path, here):
    source, out = make_files(tmp_path / "in", 1), tmp_path / "out"
    out.mkdir()
    (out / "thesis.pdf").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.pdf\)"):
        build_here(source, out)
    (out / "thesis.pdf").unlink()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another build is writing there"):
        build_here(source, out)
    os.close(handle)
    assert build_here(source, out)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made"):
        build_here(source, tmp_path / "file" / "out")


@pytest.fixture
def bucket(monkeypatch):
    """gs:// in memory."""
    for name in ("gs", "gcs"):
        monkeypatch.setitem(_registry, name, MemoryFileSystem)
    MemoryFileSystem.store.clear()
    yield "gs://bucket"
    MemoryFileSystem.store.clear()


def test_gs_takes_and_gives_the_same_bytes_by_the_same_code(tmp_path, here, bucket):
    source, local = make_files(tmp_path / "in", 3), tmp_path / "out"
    build_here(source, local)
    for path in source.iterdir():
        epath.Path(path).copy(epath.Path(bucket) / "in" / "deep" / path.name)
    out = epath.Path(bucket) / "out"
    build_here(f"{bucket}/in/deep", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == contents(local)
    assert verify(str(out))["records"] == 6
    report = build_here(f"{bucket}/in", epath.Path(bucket) / "out2")
    shown = {clip["key"].partition("#")[0] for clip in report["clips_shown"]}
    assert shown == {"deep/000.mp4", "deep/001.mp4", "deep/002.mp4"}
    with pytest.raises(ValueError, match="takes in the output folder"):
        build_here(bucket, out)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (flip, "damaged: its bytes have changed"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "damaged: 131071 bytes, not 131072",
        ),
        (lambda path: path.unlink(), "missing"),
    ],
)
def test_verify_names_the_first_damaged_file(tmp_path, here, capsys, damage, line):
    build_here(make_files(tmp_path / "in", 2), tmp_path / "out")
    assert cli.main(["data", "verify", str(tmp_path / "out")]) == 0
    assert "4 clips in 1 shards, whole." in capsys.readouterr().out
    shard = next((tmp_path / "out").glob("clips-*"))
    damage(shard)
    flip(tmp_path / "out" / "index.npz")
    assert cli.main(["data", "verify", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"sora-jax: {shard}: " in error and line in error


def test_verify_needs_a_built_set(tmp_path, capsys):
    assert cli.main(["data", "verify", str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--workers", "0"], "0 workers; give 1 or more."),
        (["--config.motion.min=1"], "--config.motion.min=1 needs --config FILE"),
        (["--runner", "DirectRunner"], "Apache Beam is not installed; pip install"),
        (["--config", "gone.py"], "--config gone.py: no such file"),
        (["--runner-options=--region=X"], "--runner-options=--region=X is for Apache Beam"),
        (["--out", "https://example.com/set"], "https://example.com/set: no files are read"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys, arguments, line):
    source = make_files(tmp_path / "in", 1)
    out = ["--input", str(source), "--out", str(tmp_path / "out")]
    assert cli.main(["data", "build", *out, *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--data", "set", "--config.data.frames=9"], "--config.data.frames=9 needs --config FILE"),
        (["--config", "configs/base.py", "--fps", "8"], "--frames and --fps are for --data"),
        (["--data", "set", "--fps", "inf"], "at inf fps"),
        (["--data", "set", "--fps", "nan"], "--fps nan is out of range; use more than 0, or"),
        (["--data", "set", "--fps", "0"], "--fps 0 is out of range"),
        (["--data", "set", "--frames", "0"], "--frames 0 is out of range; use more than 0, or"),
        (["--data", "set", "--frames", "-3"], "--frames -3 is out of range"),
        (["--data", "set", "--clips", "0"], "leave it out: then it is all."),
    ],
)
def test_options_of_the_cache_that_would_be_ignored_are_refused(tmp_path, capsys, arguments, line):
    command = ["data", "cache", "--checkpoint", "paperworld", "--out", str(tmp_path / "out")]
    assert cli.main([*command, *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("manifest", ['{"name": "my app", "icons": []}', "[1]"])
def test_a_manifest_of_another_program_is_told(tmp_path, here, capsys, manifest):
    out = tmp_path / "set"
    out.mkdir()
    (out / "manifest.json").write_text(manifest)
    for action in ("verify", "inspect"):
        assert cli.main(["data", action, str(out)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{out} holds another program's manifest.json" in error
    with pytest.raises(ValueError, match=r"another program's manifest\.json"):
        build_here(make_files(tmp_path / "in", 1), out)
    assert [path.name for path in out.iterdir()] == ["manifest.json"]


def test_a_moved_set_is_whole(tmp_path, here):
    build_here(make_files(tmp_path / "in", 2), tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere")["records"] == 4


def test_a_task_done_twice_takes_nothing_away_from_who_reads_the_first_result(tmp_path, here):
    source, out = make_files(tmp_path / "in", 1), tmp_path / "out"
    (source / "000.txt").unlink()
    (file,) = find_inputs(str(source))
    task = FileTask(str(out), file, BuildSettings(), process)
    process_one(task)
    stamp = staging.Stamps(task.settings).of(file)
    before = contents(out)
    seen = []
    replace = os.replace

    def look(*paths):
        replace(*paths)
        seen.append(contents(out / ".build" / "files"))

    staged = staging.Staging(str(out))
    with staged.folder() as folder, pytest.MonkeyPatch.context() as patch:
        row = process(file, task.settings, folder)
        patch.setattr(os, "replace", look)
        staged.commit(file.key, row, stamp, folder)
    whole = {name.removeprefix(".build/files/"): data for name, data in before.items()}
    assert len(seen) == 4 and all(whole.items() <= state.items() for state in seen)


def test_the_command_line_builds_with_any_setting_changed(tmp_path, capsys):
    source, root = tmp_path / "in", Path(__file__).parents[3]
    source.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 4, 6, 3), np.uint8)
    video_io.write_video(source / "a.mp4", noise.repeat(16, 1).repeat(16, 2), fps=8)
    (source / "a.json").write_text('{"captions": {"short": "noise", "detailed": "much noise"}}')
    command = ["data", "build", "--input", str(source), "--out", str(tmp_path / "out")]
    command += ["--config", f"{root}/configs/data.py:smoke", "--workers", "1"]
    command += ["--config.motion.enabled=False", "--config.resize.max_pixels=2048"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("1 clips of 1 files (0 left out): ")
    found = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    record = records.parse(found[0])
    assert record.captions == ["noise", "much noise"] and record.height * record.width <= 2048
    assert cli.main([*command, "--config.motoin.enabled=False"]) == 2
    assert "did you mean motion.enabled" in capsys.readouterr().err
