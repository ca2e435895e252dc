"""The launchers of clouds: what they would run, what they do run, and what follows from it.

gcloud, kubectl and Slurm are conftest.py's: they note their arguments and answer as they are told.
Goldens: SORA_JAX_UPDATE_GOLDENS=1 writes them anew; look at the difference before it is committed.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
GOLDENS = Path(__file__).parents[1] / "goldens" / "launch"
SCHEMA = json.loads((GOLDENS / "jobset.schema.json").read_text())
TPU = ("--name", "wan", "--zone", "us-east5-a", "--type", "v5p:4x4x8")
GKE = ("--name", "wan", "--type", "v5p:4x4x8", "--image", "registry/sora:1")
TRAIN = ("sora-jax", "train", "--config", "configs/t2v_5b.py", "--workdir", "/mnt/sora/my run")
DRY = {
    "tpu": ("tpu.py", "watch", *TPU, "--slices", "2", "--spot", "--bucket", "data", "--secret",
            "WANDB_API_KEY=wandb", "--dry-run", "--", *TRAIN),
    "tpu_delete": ("tpu.py", "delete", *TPU, "--project", "p", "--dry-run"),
    "gke_create": ("gke.py", "create", *GKE, "--slices", "2", "--location", "us-east5", "--zone",
                   "us-east5-a", "--project", "p", "--spot", "--dry-run"),
    "gke_run": ("gke.py", "run", *GKE, "--slices", "2", "--bucket", "data", "--secret",
                "WANDB_API_KEY=wandb/key", "--dry-run", "--", *TRAIN),
    "gke_gpu": ("gke.py", "run", "--name", "wan", "--gpu", "h100", "--hosts", "4", "--image",
                "registry/sora:1", "--nfs", "10.0.0.2:/share", "--dry-run", "--", *TRAIN),
    "slurm": ("slurm.sh", "run", "--nodes", "4", "--gpus", "8", "--time", "24:00:00", "--dry-run",
              "--", *TRAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_prints_what_it_did_and_runs_nothing(name, fakes, tmp_path):
    done = fakes.run(*DRY[name], TMPDIR="/tmp")
    assert done.returncode == 0, done.stderr
    assert fakes.calls == []
    text = re.sub(r"\b[0-9a-f]{12}\b", "COMMIT", done.stdout.replace(str(ROOT), "ROOT"))
    text = re.sub(r"# warning: uncommitted.*\n", "", text)
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("SORA_JAX_UPDATE_GOLDENS"):
        path.write_text(text)
    assert text == path.read_text()
    # It is a script: bash reads it, and a real run makes the same calls.
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def manifest(*args: str) -> dict:
    done = subprocess.run(
        [LAUNCH / "gke.py", "run", *args, "--dry-run", "--", *TRAIN],
        text=True, capture_output=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.partition("\n")[2].rpartition("END_OF_INPUT")[0])


MANIFESTS = [
    (*GKE, "--slices", "2", "--bucket", "data", "--secret", "WANDB_API_KEY=wandb/key"),
    ("--name", "w", "--type", "v6e:2x4", "--image", "i", "--nfs", "10.0.0.2:/share"),
    ("--name", "w", "--gpu", "h200", "--hosts", "8", "--image", "i"),
]


@pytest.mark.parametrize("args", MANIFESTS)
def test_manifests_are_of_the_schema_of_a_jobset(args):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(manifest(*args), SCHEMA)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec["failurePolicy"].update(maxRestart=3),
        lambda spec: spec["failurePolicy"]["rules"][0].update(action="Fail"),
        lambda spec: spec["replicatedJobs"][0]["template"]["spec"].update(backofLimit=0),
        lambda spec: spec["replicatedJobs"][0].update(replicas="2"),
    ],
)
def test_the_schema_knows_mistakes(spoil):
    spoiled = manifest(*MANIFESTS[0])
    spoil(spoiled["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoiled, SCHEMA)


def test_a_slice_is_a_job_of_all_its_hosts_and_restarts_are_those_of_the_statuses():
    spec = manifest(*MANIFESTS[0])["spec"]
    group = spec["replicatedJobs"][0]
    job = group["template"]["spec"]
    assert (group["replicas"], job["completions"], job["parallelism"]) == (2, 32, 32)
    pod = job["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    rules = job["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [2, 130]
    assert rules[1]["onExitCodes"]["values"] == [75]
    mistake, preempted = spec["failurePolicy"]["rules"]
    assert mistake["action"] == "FailJobSet"
    # Kubernetes' own words, of rule 0 and of another.
    said = "Container train for pod a/b failed with exit code 2 matching FailJob rule at index"
    (pattern,) = mistake["onJobFailureMessagePatterns"]
    assert re.fullmatch(pattern, f"{said} 0") and not re.fullmatch(pattern, f"{said} 1")
    assert preempted["action"] == "RestartJobSetAndIgnoreMaxRestarts"


def test_kubectl_gets_the_manifest_that_the_dry_run_shows(fakes):
    done = fakes.run("gke.py", "run", *MANIFESTS[0], "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert fakes.calls == [["kubectl", "apply", "--filename", "-"]]
    assert json.loads((fakes.folder / "stdin").read_text()) == manifest(*MANIFESTS[0])


def test_gke_follows_the_log_of_the_first_host(fakes):
    fakes.answer([["logs"], "step 1", 3])
    done = fakes.run("gke.py", "watch", "--name", "wan")
    assert done.returncode == 3 and "step 1" in done.stdout
    logs = fakes.calls[-1]
    assert "--follow" in logs
    assert any("job-completion-index=0" in word for word in logs)


def test_what_is_there_is_not_made_again_and_what_is_not_is_not_deleted(fakes):
    there = (*GKE, "--location", "us-east5", "--project", "p")
    assert fakes.run("gke.py", "create", *there).returncode == 0
    assert not any("create" in call for call in fakes.calls)
    fakes.answer([["describe"], "", 1])
    assert fakes.run("gke.py", "create", *there).returncode == 0
    assert [call[1:4] for call in fakes.calls if "create" in call] == [
        ["container", "clusters", "create"],
        ["container", "node-pools", "create"],
    ]
    before = len(fakes.calls)
    assert fakes.run("gke.py", "delete", *there, "--with-cluster").returncode == 0
    deleted = [call for call in fakes.calls[before:] if "delete" in call]
    assert deleted == [
        ["kubectl", "delete", "jobset", "wan", "--namespace=default", "--ignore-not-found"]
    ]


PROMPTS = ['it\'s "red"', "a  b\t$HOME `id` !x", "line\nline", "--distributed", "é*?[x]", ""]


@pytest.mark.parametrize("way", ["tpu", "slurm"])
def test_every_word_of_the_command_arrives(way, fakes, tmp_path):
    overrides = [f"--config.sample.prompts=({prompt!r},)" for prompt in PROMPTS]
    command = ["sora-jax", "train", *overrides, *PROMPTS]
    if way == "tpu":
        done = fakes.run("tpu.py", "run", *TPU, "--dry-run", "--", *command)
    else:
        options = ("run", "--nodes", "1", "--gpus", "1", "--dry-run")
        done = fakes.run("slurm.sh", *options, "--", *command)
    assert done.returncode == 0, done.stderr
    # Run what was printed.
    subprocess.run(["bash"], input=done.stdout, text=True, env=fakes.env, check=True)
    (call,) = fakes.calls
    if way == "slurm":
        assert call[call.index("job") + 2 :] == command
        return
    # And, as ssh does, let bash read the command once more, at home on the worker.
    remote = call[-1].removeprefix("--command=")
    script = tmp_path / "home" / "sora_jax/src/launch/worker.sh"
    script.parent.mkdir(parents=True)
    script.write_text(f'#!/bin/bash\nexec {shlex.quote(str(fakes.folder / "srun"))} "$@"\n')
    script.chmod(0o755)
    subprocess.run(["bash", "-c", remote], cwd=tmp_path / "home", env=fakes.env, check=True)
    words = fakes.calls[-1]
    assert words[words.index("--") + 1 :] == command


@pytest.mark.parametrize("command", [TRAIN, ["sora-jax", "sample", "--prompt", "a ball"]])
def test_a_command_is_told_that_it_is_one_of_several(fakes, command):
    for script, *args in (
        ("tpu.py", "run", *TPU),
        ("gke.py", "run", *GKE),
        ("slurm.sh", "run", "--nodes", "1", "--gpus", "1"),
    ):
        done = fakes.run(script, *args, "--dry-run", "--", *command)
        assert "--distributed" in done.stdout
        done = fakes.run(script, *args, "--dry-run", "--", "sora-jax", "info")
        assert done.returncode == 0 and "--distributed" not in done.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("tpu.py", "create", "--name", "w", "--zone", "z"), "--type is missing"),
        (("tpu.py", "create", *TPU[:4], "--type", "v5p-256"), "such as v5p:4x4x8"),
        (("tpu.py", "create", *TPU[:4], "--type", "v5q:4x4x8"), "did you mean v5p:4x4x8"),
        (("tpu.py", "create", *TPU[:4], "--type", "v5p:8x4x4"), "did you mean 4x4x8"),
        (("tpu.py", "create", *TPU[:4], "--type", "v6e:3x3"), "did you mean"),
        (("tpu.py", "create", *TPU, "--slices", "0"), "--slices takes 1 or more"),
        (("tpu.py", "create", "--name", "My_Run", "--zone", "z"), "use up to 40 of a-z"),
        (("tpu.py", "run", *TPU), "no command"),
        (("tpu.py", "run", *TPU, "--secret", "abc", "--", "true"), "VARIABLE=NAME"),
        (("tpu.py", "delete", *TPU, "--", "true"), "`delete` takes no command"),
        (("tpu.py", "crate", *TPU), "invalid choice: 'crate'"),
        (("gke.py", "run", "--name", "w", "--", "true"), "--image is missing"),
        (("gke.py", "run", "--name", "w", "--image", "i", "--", "true"), "--type or --gpu is"),
        (("gke.py", "create", *GKE[:2], "--gpu", "h10", "--location", "l"), "did you mean h100"),
        (("gke.py", "create", *GKE), "--location is missing"),
        (("gke.py", "run", *GKE, "--secret", "A=b", "--", "true"), "VARIABLE=SECRET/KEY"),
        (("gke.py", "run", *GKE, "--nfs", "server", "--", "true"), "SERVER:/SHARE"),
        (("slurm.sh", "run", "--nodes", "many", "--gpus", "8", "--", "true"), "--nodes 'many'"),
        (("slurm.sh", "run", "--nodes", "2", "--gpus", "8"), "no command"),
        (("slurm.sh", "runn"), "unknown action 'runn'"),
        (("slurm.sh", "create"), "there is nothing to create"),
        (("slurm.sh", "run", "--node", "2"), "unknown option --node"),
        (("restart.sh", "--restarts", "x", "--", "true"), "--restarts x"),
        (("restart.sh",), "no command"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(args, words, fakes):
    done = fakes.run(*args)
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not any("create" in call for call in fakes.calls)


@pytest.mark.parametrize("script", ["tpu.py", "gke.py", "slurm.sh", "restart.sh", "local.sh"])
def test_help_needs_nothing(script):
    done = subprocess.run(
        [LAUNCH / script, "--help"], text=True, capture_output=True, env={"PATH": os.defpath}
    )
    assert done.returncode == 0 and done.stdout.startswith(f"usage: launch/{script}")


def state(*words: str) -> str:
    return "\n".join(f"worker host-{i} {word}\nlog" for i, word in enumerate(words))


def test_watch_makes_what_is_missing_and_ends_with_the_run(fakes):
    args = ("--name", "wan", "--zone", "z", "--type", "v5p:2x2x2", "--poll", "0.01")
    fakes.answer(
        [["describe"], "", 1],  # nothing there yet
        [["describe"], "WAITING_FOR_RESOURCES", 0],
        [["describe"], "ACTIVE", 0],
        [["describe"], "ACTIVE", 0],
        [["describe"], "SUSPENDED", 0],  # taken away
        [["describe"], "ACTIVE", 0],
        [["--command=bash", "state"], state("bare", "bare"), 0],
        [["--command=bash", "state"], state("running", "running"), 0],
        [["--command=bash", "state"], state("ended 0", "ended 0"), 0],
    )
    done = fakes.run("tpu.py", "watch", *args, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    did = [
        "start" if " start " in call[-1] else call[4]
        for call in fakes.calls
        if call[4] != "describe" and "state" not in call[-1]
    ]
    assert did == ["create", "scp", "ssh", "ssh", "start", "delete", "create"]


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (("ended 2", "ended 1"), 2),
        (("ended 1", "ended 137"), 1),
        (("stopped", "stopped"), 75),
    ],
)
def test_watch_ends_where_a_restart_does_not_help(said, status, fakes):
    fakes.answer([["describe"], "ACTIVE", 0], [["state"], state(*said), 0])
    args = ("--name", "wan", "--zone", "z", "--type", "v5p:2x2x2", "--poll", "0.01")
    done = fakes.run("tpu.py", "watch", *args, "--", *TRAIN)
    assert done.returncode == status
    assert not any(" start " in call[-1] for call in fakes.calls)


def test_watch_starts_again_what_was_preempted_on_the_host(fakes):
    fakes.answer(
        [["describe"], "ACTIVE", 0],
        [["state"], state("ended 75", "lost"), 0],
        [["state"], state("ended 0", "ended 0"), 0],
    )
    args = ("--name", "wan", "--zone", "z", "--type", "v5p:2x2x2", "--poll", "0.01")
    assert fakes.run("tpu.py", "watch", *args, "--", *TRAIN).returncode == 0
    assert sum(" start " in call[-1] for call in fakes.calls) == 1


def test_delete_of_nothing_is_done(fakes):
    fakes.answer([["describe"], "", 1])
    assert fakes.run("tpu.py", "delete", *TPU).returncode == 0
    assert [call[4] for call in fakes.calls] == ["describe"]


@pytest.mark.parametrize(
    ("name", "cloud", "hosts", "a_host", "machine"),
    [  # from Google's tables of slices
        ("v5p:2x2x1", "v5p-8", 1, 4, "ct5p-hightpu-4t"),
        ("v5p:4x4x8", "v5p-256", 32, 4, "ct5p-hightpu-4t"),
        ("v5p:8x8x16", "v5p-2048", 256, 4, "ct5p-hightpu-4t"),
        ("v4:4x4x4", "v4-128", 16, 4, "ct4p-hightpu-4t"),
        ("v5e:2x4", "v5litepod-8", 1, 8, "ct5lp-hightpu-8t"),
        ("v5e:16x16", "v5litepod-256", 64, 4, "ct5lp-hightpu-4t"),
        ("v6e:1x1", "v6e-1", 1, 1, "ct6e-standard-1t"),
        ("v7x:4x4x4", "tpu7x-128", 16, 4, "tpu7x-standard-4t"),
    ],
)
def test_slices_have_the_names_and_hosts_of_the_cloud(name, cloud, hosts, a_host, machine):
    code = (
        "import sys, slices; s = slices.parse(sys.argv[1]); "
        "print(s.accelerator_type, s.hosts, s.chips_a_host, s.machine)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], cwd=LAUNCH, text=True, capture_output=True, check=True
    )
    assert done.stdout.split() == [cloud, str(hosts), str(a_host), machine]
