"""Imports run one way down the floors of the package, read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sora_jax"

# From the top; a module imports from its own floor and from those below.
FLOORS = [
    {"cli"},
    {
        "plan",
        "plan_command",
        "info",
        "sample_command",
        "storyboard_command",
        "mistakes",
        "model_arguments",
        "task_arguments",
        "task_command",
        "import_command",
        "data_command",
        "config_file",
    },
    {"train", "evaluate"},
    {"generate", "convert"},
    {"prompts"},
    {"text", "vae", "dit", "image"},
    {"attention", "layers", "checkpoint", "data"},
    {"ring_attention", "flash", "diffusion", "sharding", "video_io", "types"}
    | {"progress", "manifest", "agreement", "background", "locked"},
    {"allocator", "blocked_attention", "chips", "compile_options", "cudnn_attention", "quantized"},
]
# On one floor, but strangers to each other; so are all that stand in two of them.
APART = {"data", "text", "vae", "dit", "image", "diffusion"}
FORBIDDEN = {"torch", "tensorflow", "diffusers", "transformers", "sora_jax.cli"}
# Captioners and writers of prompts are somebody else's models, run by the library that knows them;
# see the extras `caption` and `prompts`.
ALLOWED = {
    "data/build/captioner.py": {"torch", "transformers"},
    "prompts/causal.py": {"torch", "transformers"},
}

FLOOR_OF = {name: i for i, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(source: str, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in `source`, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def violations(
    unit: str | None, imported: list[tuple[int, str]], allowed: frozenset[str] = frozenset()
) -> list[str]:
    problems = []
    for line, module in imported:
        if any(module == name or module.startswith(f"{name}.") for name in FORBIDDEN - allowed):
            problems.append(f"{line}: imports {module}")
        if not module.startswith("sora_jax.") or unit is None:
            continue
        other = module.split(".")[1]
        if other in FLOOR_OF and FLOOR_OF[other] < FLOOR_OF[unit]:
            problems.append(f"{line}: {unit} imports {other}, which stands above it")
        if {unit, other} <= APART and unit != other:
            problems.append(f"{line}: {unit} and {other} never import each other")
    return problems


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_down_the_floors(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    unit = None if parts[0] == "__init__" else parts[0]
    assert unit is None or unit in FLOOR_OF, f"{unit} stands on no floor; put it in FLOORS"
    package = ("sora_jax", *parts[:-1])
    allowed = frozenset(ALLOWED.get(file.relative_to(PACKAGE).as_posix(), ()))
    problems = violations(unit, imports(file.read_text(), package), allowed)
    assert not problems, "\n".join(problems)


def test_the_rules_catch_what_they_forbid():
    def found(unit, source, package=("sora_jax",)):
        return violations(unit, imports(source, package))

    assert found("layers", "from sora_jax.dit import model") == [
        "1: layers imports dit, which stands above it"
    ]
    assert found("dit", "def f():\n    import sora_jax.vae.model") == [
        "2: dit and vae never import each other"
    ]
    assert found("diffusion", "from sora_jax import train") == [
        "1: diffusion imports train, which stands above it"
    ]
    relative = found("data", "from ..text import t5", ("sora_jax", "data"))
    assert relative == [
        "1: data imports text, which stands above it",
        "1: data and text never import each other",
    ]
    assert found("vae", "import torch.nn as nn") == ["1: imports torch.nn"]
    torch = imports("import torch\nimport tensorflow", ("sora_jax", "data"))
    assert violations("data", torch, frozenset({"torch"})) == ["2: imports tensorflow"]
    assert not found("train", "from sora_jax.dit.model import DiT\nimport jax")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_sharding_writes_partition_specs(file):
    if file == PACKAGE / "sharding.py":
        return
    names = {
        getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        for node in ast.walk(ast.parse(file.read_text()))
    }
    assert "PartitionSpec" not in names, "use sharding.spec, named or constrain"


def test_files_stay_short_enough_to_read():
    long = {str(f.relative_to(PACKAGE)): n for f in FILES if (n := len(f.open().readlines())) > 500}
    assert not long
