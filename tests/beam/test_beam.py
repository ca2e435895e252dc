"""A set built on Apache Beam is that of local workers, byte for byte (`make beam` runs this)."""

import socket
import subprocess
import sys
import time

import pytest

from sora_jax import cli
from sora_jax.data.build import beam_runner
from sora_jax.data.build.run import build
from sora_jax.data.build.settings import BuildSettings, LimitSettings
from tests.data.build.fakes import contents, make_files, process

pytest.importorskip("apache_beam")
SETTINGS = BuildSettings(limits=LimitSettings(seconds=20, mebibytes=2048))


@pytest.fixture
def source(tmp_path):
    source = make_files(tmp_path / "in", 12)
    for name, text in {"1": "hang", "2": "segfault", "3": "raise", "4": "broken"}.items():
        (source / f"00{name}.mp4").write_text(text)
    return source


def build_by(source, out, **options):
    return build(str(source), str(out), SETTINGS, process=process, **options)


def test_beam_and_local_workers_write_the_same_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(beam_runner, "CHUNK", 5)
    report = build_by(source, tmp_path / "local", workers=2)
    assert report["totals"]["files_left_out"] == 4
    options = ["--direct_num_workers=2 --direct_running_mode=multi_threading"]
    build_by(source, tmp_path / "beam", runner="DirectRunner", runner_options=options)
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")


@pytest.fixture
def job_service(tmp_path):
    """Beam's own server of its portable protocol, which Flink, Spark and Dataflow speak too."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main"]
    with (tmp_path / "service.log").open("w") as log:
        process_ = subprocess.Popen([*command, "-p", str(port)], stdout=log, stderr=log)
    while "Listening for beam jobs" not in (tmp_path / "service.log").read_text():
        assert process_.poll() is None, (tmp_path / "service.log").read_text()
        time.sleep(0.1)
    yield f"localhost:{port}"
    process_.terminate()
    process_.wait()


def test_workers_that_a_service_elsewhere_starts_write_the_same_bytes(
    source, tmp_path, job_service
):
    """They get the pipeline as bytes, as on a cluster, not as objects of this process."""
    build_by(source, tmp_path / "local", workers=2)
    options = [
        f"--job_endpoint={job_service}",
        "--environment_type=beam:env:harness_subprocess_python:v1",
        f"--environment_config='{sys.executable} -m apache_beam.runners.worker.sdk_worker_main'",
    ]
    build_by(source, tmp_path / "service", runner="PortableRunner", runner_options=options)
    assert contents(tmp_path / "service") == contents(tmp_path / "local")


def test_a_build_goes_on_from_one_runner_to_the_other(source, tmp_path):
    (source / "011.mp4").write_text("full")
    with pytest.raises(ValueError, match="No space left on device") as error:
        build_by(source, tmp_path / "out", runner="DirectRunner")
    assert "\n" not in str(error.value)
    (source / "011.mp4").write_text(" 11")
    build_by(source, tmp_path / "out", workers=2)
    build_by(source, tmp_path / "whole", workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_real_files_come_through_the_command_line(tmp_path):
    import numpy as np

    from sora_jax import video_io

    (tmp_path / "in").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (12, 4, 6, 3), np.uint8)
        frames = noise.repeat(16, 1).repeat(16, 2)
        video_io.write_video(tmp_path / "in" / f"{i}.mp4", frames, fps=8)
    sets = []
    for name, runner in (("local", []), ("beam", ["--runner", "DirectRunner"])):
        arguments = ["--input", str(tmp_path / "in"), "--out", str(tmp_path / name), *runner]
        assert cli.main(["data", "build", *arguments, "--captions", "allow"]) == 0
        sets.append(contents(tmp_path / name))
    assert sets[0] == sets[1]


@pytest.mark.parametrize(
    ("runner", "line"),
    [
        ("NoRunner", "--runner NoRunner: "),
        ("DataflowRunner", r"--runner DataflowRunner needs an --out on gs://"),
    ],
)
def test_runners_that_cannot_work_are_named_before_any_work(source, tmp_path, runner, line):
    with pytest.raises(ValueError, match=line) as error:
        build_by(source, tmp_path / "out", runner=runner)
    assert "\n" not in str(error.value)
