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
        (["--price", "nan"], "--price nan must be 0 or more"),
        (["--price", "inf"], "--price inf must be 0 or more"),
        (["--only", "sample", "--price", "4"], "which --only sample leaves out; leave out one"),
        (["--search", "--compile", "0"], "--compile 0 must be 1 or more"),
        (["--compile", "3"], "how many of a --search are compiled; leave out one"),
        (["--json", "/nowhere/there/plan.json"], "/nowhere/there does not exist"),
        (["--json", "plan.txt"], "extension '.txt'; use one of .json"),
        (["--only", "train", "--decode"], "which --only train leaves out; leave out one"),
        (["--only", "sample", "--slices", "2"], "is of one slice; leave out --slices"),
        (["--search", "--config.batch_size=64"], "leave out --config.batch_size"),
        (["--search", "--config.mesh.fsdp=4"], "leave out --config.mesh.fsdp"),
        (["--search", "--config.dit.remat=full"], "leave out --config.dit.remat"),
        (["--search", "--compare", "configs/t2v_14b.py"], "leave out one"),
        (["--search", "--only", "sample"], "of which --only sample is none; leave out one"),
        (["--search", "--decode"], "of which --decode is none; leave out one"),
        (["--config.batch_sizes=3"], "did you mean batch_size"),
    ],
)
def test_bad_arguments_are_one_line(given, says, monkeypatch, capsys):
    monkeypatch.setattr(plan_command, "prepare", lambda args: None)
    command = ["plan", "--config", "configs/t2v_5b.py", "--topology", "v5p:4x4x8", *given]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_folder_in_place_of_the_json_is_told_before_anything_is_compiled(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(plan_command, "prepare", lambda args: None)
    folder = tmp_path / "a.json"
    folder.mkdir()
    command = ["plan", "--config", "configs/t2v_5b.py", "--topology", "v5p:4x4x8"]
    assert cli.main([*command, "--json", str(folder)]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_overrides_are_of_both_that_are_compared(monkeypatch):
    from sora_jax.plan import planning, report

    seen = []
    plan = {"train": {"fits": True}}
    monkeypatch.setattr(plan_command, "prepare", lambda args: None)
    monkeypatch.setattr(planning, "plan", lambda config, **_: seen.append(config) or plan)
    monkeypatch.setattr(report, "compare", lambda plans: None)
    command = ["plan", "--config", "configs/t2v_5b.py", "--compare", "configs/t2v_1_3b.py"]
    assert cli.main([*command, "--topology", "v5p:4x4x8", "--config.batch_size=64"]) == 0
    assert [config.batch_size for config in seen] == [64, 64]


def test_a_search_tells_the_price_of_what_it_compiles(monkeypatch):
    from sora_jax.plan import planning, report, search, topology

    one = search.Candidate(
        {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}, "full", 4, 1.0, 1.0, 8
    )
    given = []
    plan = {"train": {"fits": True, "tokens_per_s_per_chip": 1.0}, "method": planning.method()}
    monkeypatch.setattr(plan_command, "prepare", lambda args: None)
    monkeypatch.setattr(topology, "describe", lambda *_: None)
    monkeypatch.setattr(search, "candidates", lambda *_: [one])
    monkeypatch.setattr(planning, "plan", lambda *_, **options: given.append(options) or plan)
    monkeypatch.setattr(report, "compare", lambda *_: None)
    command = ["plan", "--config", "configs/t2v_5b.py", "--topology", "v5p:2x2x1", "--search"]
    assert cli.main([*command, "--price", "4.2"]) == 0
    assert [options["price"] for options in given] == [4.2]


def test_a_plan_that_does_not_fit_is_one_line_with_the_best_knob(monkeypatch, capsys, tmp_path):
    from sora_jax.plan import planning, report

    short = {"fits": False, "needed_gib": 120.0, "short_gib": 24.3, "knob": "x=1", "knob_gib": 9.0}
    plan = {"config": "a.py", "topology": "v5p:4x4x8", "slices": 1, "hbm_gib": 95.7}
    shown = []
    monkeypatch.setattr(plan_command, "prepare", lambda args: None)
    monkeypatch.setattr(planning, "plan", lambda *args, **kwargs: plan | {"train": short})
    monkeypatch.setattr(report, "show", shown.append)
    out = tmp_path / "plan.json"
    command = ["plan", "--config", "configs/t2v_5b.py", "--topology", "v5p:4x4x8"]
    assert cli.main([*command, "--json", str(out)]) == 2
    assert len(shown) == 1 and out.exists()
    error = capsys.readouterr().err
    assert "needs 120.0 GiB a device, 24.3 more than the 95.7" in error
    assert "what helps most is x=1, by about 9.0 GiB" in error and error.count("\n") == 1
