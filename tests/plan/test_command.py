import subprocess
import sys

import pytest

from sora_jax import cli, plan_command
from sora_jax.plan import topology


def test_help_needs_neither_jax_nor_libtpu():
    program = (
        "import sys; from sora_jax import cli\n"
        "try: cli.main(['plan', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules, 'jax was imported'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--topology" in done.stdout and "v5p:4x4x8" in done.stdout


def test_without_libtpu_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    command = ["plan", "--config", "configs/t2v_5b.py", "--topology", "v5p:4x4x8"]
    assert cli.main(command) == 2
    assert "pip install 'sora_jax[tpu]'" in capsys.readouterr().err


def test_a_wrong_topology_is_told_before_anything_is_loaded(capsys):
    command = ["plan", "--config", "configs/t2v_5b.py", "--topology", "v5p:4x4"]
    assert cli.main(command) == 2
    assert "did you mean v5p:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--price", "-1"], "--price -1 must be 0 or more"),
        (["--compile", "0"], "--compile 0 must be 1 or more"),
        (["--json", "/nowhere/there/plan.json"], "no such folder"),
        (["--search", "--compare", "configs/t2v_14b.py"], "leave out one"),
        (["--config.batch_sizes=3"], "did you mean batch_size"),
    ],
)
def test_bad_arguments_are_one_line(given, says, monkeypatch, capsys):
    monkeypatch.setattr(plan_command, "prepare", lambda args: None)
    command = ["plan", "--config", "configs/t2v_5b.py", "--topology", "v5p:4x4x8", *given]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
