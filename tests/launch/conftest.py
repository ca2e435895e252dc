"""Programs in the place of gcloud, kubectl and Slurm, and a host with them on its PATH."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
# Notes its arguments and input, and gives the answers of answers.json in order: the first whose
# words are all among the arguments, [words, text, status]; one that is not the last of its words
# is used once.
FAKE = """#!{python} -SE
import json, os, sys
here = os.path.dirname(os.path.abspath(__file__))
name = os.path.basename(sys.argv[0])
call = [name, *sys.argv[1:]]
text = "" if sys.stdin.isatty() or name not in ("kubectl",) else sys.stdin.read()
with open(here + "/calls", "a") as f:
    f.write(json.dumps(call) + "\\n")
if text:
    open(here + "/stdin", "w").write(text)
path = here + "/answers.json"
answers = json.load(open(path)) if os.path.exists(path) else []
for i, (words, answer, status) in enumerate(answers):
    if all(any(word in part for part in call) for word in words):
        if any(later[0] == words for later in answers[i + 1:]):
            json.dump(answers[:i] + answers[i + 1:], open(path, "w"))
        print(answer)
        sys.exit(status)
"""


class Fakes:
    """Programs on the PATH in the place of real ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self.add("gcloud", "kubectl", "sbatch", "srun", "squeue", "scontrol", "scancel")
        self.env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}

    def add(self, *names: str) -> None:
        for name in names:
            path = self.folder / name
            path.write_text(FAKE.format(python=sys.executable))
            path.chmod(0o755)

    def answer(self, *answers):
        (self.folder / "answers.json").write_text(json.dumps(answers))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(
        self, script: str, *args: str, cwd: Path = LAUNCH.parent, **env
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [LAUNCH / script, *args],
            env=self.env | env,
            cwd=cwd,
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )


@pytest.fixture
def fakes(tmp_path) -> Fakes:
    return Fakes(tmp_path / "bin")


@pytest.fixture
def host(fakes, tmp_path):
    """A TPU VM's home: worker(action, ...) calls its worker.sh."""
    home = tmp_path / "sora_jax"
    (home / "src").mkdir(parents=True)
    (home / "src" / "launch").symlink_to(LAUNCH)

    def worker(*args: str) -> str:
        done = subprocess.run(
            [LAUNCH / "worker.sh", *args],
            env=fakes.env | {"SORA_JAX_HOME": str(home)},
            text=True, capture_output=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return worker
