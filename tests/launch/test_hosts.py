"""What runs on hosts: worker.sh of a TPU VM, and a job under Slurm."""

import json
import time

import pytest

TRAIN = ("sora-jax", "train", "--config", "configs/t2v_5b.py", "--workdir", "/mnt/sora/my run")


def until(condition, what: str):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in 30 s"
        time.sleep(0.05)


def test_a_worker_runs_tells_and_ends(host, tmp_path):
    go, logs = tmp_path / "go", tmp_path / "logs"
    script = f"until [ -e {go} ]; do sleep .05; done; echo it is $1"
    assert "absent" in host("state", "a")
    host("start", "a", "--logs", str(logs), "--", "bash", "-c", script, "bash", "done")
    assert "running" in host("state", "a")
    assert "runs already" in host("start", "a", "--", "false")
    go.touch()
    until(lambda: "ended 0" in host("state", "a"), "end")
    assert "it is done" in host("state", "a")
    until(lambda: any(logs.glob("*.log")), "copy of the log")
    host("start", "a", "--restarts", "0", "--", "bash", "-c", "exit 3")
    until(lambda: "ended 3" in host("state", "a"), "status")


def test_a_worker_that_is_stopped_saves_and_stays_so(host):
    save = "trap 'echo saved; exit 75' TERM; echo ready; while true; do sleep .05; done"
    host("start", "a", "--", "bash", "-c", save)
    until(lambda: "ready" in host("state", "a"), "start")
    host("stop", "a")
    until(lambda: "stopped" in host("state", "a"), "stop")
    assert "saved" in host("state", "a")


def test_secrets_are_read_on_the_host_and_written_nowhere(host, fakes, tmp_path):
    fakes.answer([["secrets", "access", "--secret=wandb"], "hunter2", 0])
    seen = tmp_path / "seen"
    check = f'[ "$KEY" = hunter2 ] && tr "\\0" " " </proc/$PPID/cmdline >{seen}'
    host("start", "a", "--secret", "KEY=wandb", "--restarts", "0", "--", "bash", "-c", check)
    until(lambda: "ended" in host("state", "a"), "end")
    assert "ended 0" in host("state", "a")
    for path in (tmp_path / "sora_jax" / "run").rglob("*"):
        assert path.is_dir() or "hunter2" not in path.read_text()
    assert "restart.sh" in seen.read_text()
    assert "hunter2" not in json.dumps(fakes.calls)


@pytest.mark.parametrize(
    ("status", "count", "job", "again"),
    [
        (0, 0, "RUNNING", False),
        (75, 99, "RUNNING", True),
        (75, 0, "CANCELLED", False),
        (1, 2, "RUNNING", True),
        (137, 3, "RUNNING", False),
        (2, 0, "RUNNING", False),
        (130, 0, "RUNNING", False),
    ],
)
def test_a_slurm_job_queues_again_after_75_and_after_crashes(
    status, count, job, again, fakes, tmp_path
):
    fakes.answer([["srun"], "", status], [["squeue"], job, 0])
    crashes = tmp_path / ".sora-jax-17.crashes"
    if count:
        crashes.write_text(str(count))
    # Slurm's own count has the preemptions too.
    numbers = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "99"}
    done = fakes.run("slurm.sh", "job", "3", *TRAIN, cwd=tmp_path, **numbers)
    assert done.returncode == status
    assert fakes.calls[0] == ["srun", "--kill-on-bad-exit=1", "--label", *TRAIN]
    assert (["scontrol", "requeue", "17"] in fakes.calls) == again
    if status != 75:  # one that ends for good leaves nothing behind
        assert crashes.exists() == again
        assert not again or int(crashes.read_text()) == count + 1


def test_a_worker_installs_the_lock_with_a_python_of_its_own(host, fakes, tmp_path):
    fakes.add("uv", "gcsfuse", "sudo", "mountpoint")
    fakes.answer([["mountpoint"], "", 1])
    venv = tmp_path / "sora_jax" / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "sora-jax").symlink_to("/bin/true")
    assert "ready" in host("setup", "--extras", "wandb", "--bucket", "data")
    calls = {call[0]: call for call in fakes.calls if call[:2] != ["uv", "venv"]}
    assert calls["gcsfuse"][1:] == [
        *("--implicit-dirs", "--rename-dir-limit=200000", "data", "/mnt/sora"),
    ]
    assert ["uv", "venv", "--quiet", "--python", "3.12", str(venv)] in fakes.calls
    assert calls["uv"][-3:] == ["-c", "requirements.lock", ".[tpu,wandb]"]


def test_slurm_hands_in_a_name_once(fakes):
    args = ("run", "--nodes", "2", "--gpus", "4", "--", *TRAIN)
    assert fakes.run("slurm.sh", *args).returncode == 0
    assert [call[0] for call in fakes.calls] == ["squeue", "sbatch"]
    fakes.answer([["squeue"], "17", 0])
    assert fakes.run("slurm.sh", *args).returncode == 0
    assert [call[0] for call in fakes.calls] == ["squeue", "sbatch", "squeue"]
