"""Loads `configs/FILE.py[:variant]` with overrides, and explains what is wrong with them."""

import ast
import difflib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of `FILE.py` or `FILE.py:variant`, after `key.path=value` overrides.

    Raises:
      ValueError: in one line, for a missing file, an unknown variant or key (did you mean), or a
        value of another type.
    """
    name, _, variant = spec.partition(":")
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"--config {name} is a directory; give a FILE.py[:VARIANT] of it.")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise ValueError(f"--config {name}: no such file{_hint(path.name, near)}")
    get_config = getattr(_import(path), "get_config", None)
    if get_config is None:
        raise ValueError(f"--config {name}: defines no get_config; see configs/base.py.")
    takes_variant = bool(inspect.signature(get_config).parameters)
    if variant and not takes_variant:
        raise ValueError(f"--config {spec}: {path.name} has no variants; leave out ':{variant}'.")
    config = get_config(variant) if variant else get_config()
    for override in overrides:
        _override(config, override)
    return config.lock()


def topology(spec: str) -> str:
    """The slice that `FILE.py:variant` says it is for, in its table SLICES.

    Raises:
      ValueError: it names none.
    """
    name, _, variant = spec.partition(":")
    slices = getattr(_import(Path(name)), "SLICES", {})
    if (variant or "full") not in slices:
        raise ValueError(
            f"--config {spec} names no slice that it is for; give one, as in --topology v5p:4x4x8."
        )
    return slices[variant or "full"]


def _import(path: Path):
    """The module of a file of configs.

    Raises:
      ValueError: it is none of Python's, or does not run; one line.
    """
    if path.suffix != ".py":
        raise ValueError(
            f"--config {path}: give a FILE.py[:VARIANT], such as configs/paperworld.py."
        )
    # Run files say `from configs import base`, so the folder above theirs must be importable.
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        at = f"{error.filename or path}, line {error.lineno}"
        raise ValueError(f"--config {path}: {error.msg} ({at}); correct it.") from error
    except ImportError as error:
        raise ValueError(f"--config {path}: {error}; install it, or correct the name.") from error
    return module


def _override(config: ConfigDict, override: str) -> None:
    key, given, text = override.partition("=")
    if not given:
        raise ValueError(f"--config.{override}: no value; write --config.{key}=VALUE.")
    *parents, last = key.split(".")
    node = config
    for depth, part in enumerate([*parents, last]):
        if not isinstance(node, ConfigDict) or part not in node:
            known = [n for n, _ in _flat(config)]
            raise ValueError(f"--config.{key}: unknown key{_hint(key, known)}")
        if depth < len(parents):
            node = node[part]
    old = node[last]
    if isinstance(old, ConfigDict):
        raise ValueError(f"--config.{key}: a group of keys; set one of {', '.join(old.keys())}.")
    try:
        node[last] = _value(text, old)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"--config.{key}: {text!r} is not of type {type(old).__name__}, as the default "
            f"{old!r} is."
        ) from error


def _value(text: str, old):
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    value = ast.literal_eval(text)
    if isinstance(old, float) and isinstance(value, int):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if type(value) is not type(old):
        raise TypeError(text)
    return value


def _flat(config: ConfigDict, prefix: str = ""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _hint(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    # A right name in a wrong group is the commonest slip.
    near = near or [k for k in known if k.split(".")[-1] == word.split(".")[-1]]
    return f"; did you mean {near[0]}?" if near else "."
