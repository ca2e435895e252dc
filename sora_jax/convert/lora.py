"""LoRA files merged into a transformer's weights as they are loaded.

Hu et al. 2021, arXiv:2106.09685, Eq. 3: W + scale * (alpha / rank) * B A, in float32, tensor by
tensor. Read are the names of PEFT and diffusers (lora_A, lora_B) and of ComfyUI and kohya
(lora_down, lora_up, alpha; dots or underscores), under official or diffusers module names, and
plain differences (diff, diff_b). PEFT's alpha is not a tensor: it is read from the file's header or
from adapter_config.json; without any, alpha is the rank.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sora_jax.convert import original
from sora_jax.convert.dit import dit_entries
from sora_jax.convert.names import Entry
from sora_jax.convert.weights import Weights, open_weights
from sora_jax.dit.config import DiTConfig

_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.diffusion_model.")
_KOHYA = ("lora_unet_", "lora_transformer_")
_PART = re.compile(
    r"^(.+?)\.(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight$|^(.+)\.(alpha|diff|diff_b)$"
)
_DOWN, _UP = ("lora_A", "lora_down"), ("lora_B", "lora_up")
SHOWN = 10  # unknown modules that an error names


class LoRA(NamedTuple):
    """One file, or a folder of PEFT's that holds it, and how strongly it acts."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "LoRA":
        """FILE or FILE:SCALE, as on the command line.

        Raises:
          ValueError: a scale that is no finite number.
        """
        path, colon, scale = text.rpartition(":")
        if not colon or "/" in scale or scale.endswith(".safetensors"):
            return cls(Path(text))
        try:
            number = float(scale)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"--lora {text}: {scale!r} is no number; write FILE or FILE:SCALE.")
        return cls(Path(path), number)

    @property
    def files(self) -> list[Path]:
        """The files of weights."""
        return open_weights(self.path).paths


Place = tuple[tuple[str, ...], int | None]  # path and layer of a tensor in our tree


def merged(
    weights: Weights,
    entries: Sequence[Entry],
    config: DiTConfig,
    loras: Sequence[LoRA],
) -> Callable[[str], np.ndarray]:
    """`weights.read` with the differences of `loras` added to what they change.

    Args:
      weights: of the transformer.
      entries: their name table.
      config: of the transformer.

    Raises:
      ValueError: a file without LoRA tensors, half a pair, a module that the model does not have,
        or one of another width.
    """
    changes: dict[Place, list[Callable[[], np.ndarray]]] = {}
    modules = _modules(config)
    places = {entry.key: (entry.path, entry.index) for entry in entries}
    shapes = {place: weights.shapes[key] for key, place in places.items()}
    for lora in loras:
        for place, change in _read_file(lora, modules, shapes):
            changes.setdefault(place, []).append(change)

    def merged_read(key: str) -> np.ndarray:
        value = weights.read(key)
        for change in changes.get(places[key], ()):
            value = value.astype(np.float32) + change().reshape(value.shape)
        return value

    return merged_read


def _modules(config: DiTConfig) -> dict[str, Place]:
    """Every spelling of a linear layer's name, to its place; biases under `NAME|bias`."""
    table = {}
    for entry in dit_entries(config):
        module, _, leaf = entry.key.rpartition(".")
        if leaf not in ("weight", "bias"):
            continue
        official = original.dit_key(entry.key).rpartition(".")[0]
        suffix = "" if leaf == "weight" else "|bias"
        for name in (module, official):
            table[name + suffix] = table[name.replace(".", "_") + suffix] = (
                entry.path,
                entry.index,
            )
    return table


def _module_name(name: str) -> str:
    """A module's name without the prefixes that trainers put in front."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for prefix in _KOHYA:
        name = name.removeprefix(prefix)
    return name


def _read_file(lora: LoRA, modules: dict[str, Place], shapes: dict[Place, tuple[int, ...]]):
    """[(place, function that makes its difference)] of one file."""
    weights = open_weights(lora.path)
    parts: dict[str, dict[str, str]] = {}
    spelled: dict[str, str] = {}  # of each module, its name in the file
    strange = []
    for key in weights.shapes:
        match = _PART.match(key)
        if match is None:
            strange.append(key)
            continue
        module, part = (match[1], match[2]) if match[1] else (match[3], match[4])
        part = "down" if part in _DOWN else "up" if part in _UP else part
        found = parts.setdefault(_module_name(module), {})
        spelled.setdefault(_module_name(module), module)
        if part in found:
            raise ValueError(f"{lora.path}: {key} and {found[part]} say the same thing twice.")
        found[part] = key
    if strange or not parts:
        named = ", ".join(sorted(strange)[:3]) or "none"
        raise ValueError(f"{lora.path}: not a LoRA file; tensors that fit no LoRA: {named}.")
    needed = {m for m, found in parts.items() if set(found) - {"diff_b"}}
    needed |= {f"{m}|bias" for m, found in parts.items() if "diff_b" in found}
    if unknown := sorted(needed - set(modules)):
        named = ", ".join(name.replace("|bias", " (bias)") for name in unknown[:SHOWN])
        more = ", ..." if len(unknown) > SHOWN else ""
        raise ValueError(
            f"{lora.path}: {len(unknown)} modules that this transformer does not have: {named}"
            f"{more}."
        )
    settings = _Adapter.read(weights)
    changes = []
    for module, found in parts.items():
        for part, name in (("diff", module), ("diff_b", f"{module}|bias")):
            if part in found:
                place = modules[name]
                changes.append((place, _difference(lora, weights, found[part], shapes[place])))
        if set(found) & {"down", "up", "alpha"}:
            place = modules[module]
            strength = settings.strength(spelled[module])
            change = _product(lora, weights, module, found, shape=shapes[place], strength=strength)
            changes.append((place, change))
    return changes


class _Adapter(NamedTuple):
    """What PEFT's settings say of alpha; without any, it is the rank.

    `patterns` are modules with an alpha of their own.
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = {}
    power: float = 1.0  # of the rank that alpha is divided by: 1/2 in rank-stabilised LoRA

    @classmethod
    def read(cls, weights: Weights) -> "_Adapter":
        """From the file's header, as diffusers writes them, or from adapter_config.json beside it.

        Raises:
          ValueError: settings that are none, naming their file.
        """
        where = weights.paths[0]
        text = weights.metadata.get("lora_adapter_metadata")
        try:
            if text is None:
                beside = where.with_name("adapter_config.json")
                if not beside.is_file():
                    return cls()
                where, text = beside, beside.read_text()
            settings = {k.removeprefix("transformer."): v for k, v in json.loads(text).items()}
            alpha = settings.get("lora_alpha")
            patterns = (settings.get("alpha_pattern") or {}).items()
            for pattern, _ in patterns:
                re.compile(pattern)
            return cls(
                None if alpha is None else float(alpha),
                {pattern: float(value) for pattern, value in patterns},
                0.5 if settings.get("use_rslora") else 1.0,
            )
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise ValueError(
                f"{where}: not PEFT's settings of a LoRA ({error}); copy or export it again."
            ) from error

    def strength(self, module: str) -> Callable[[int], float]:
        """rank -> the factor of B A for a module by its name in the file."""
        name = module.removeprefix(_PREFIXES[0])
        matches = (v for key, v in self.patterns.items() if re.match(rf"(.*\.)?({key})$", name))
        alpha = next(matches, self.alpha)  # the first, as in PEFT
        return lambda rank: 1.0 if alpha is None else alpha / rank**self.power


def _difference(lora: LoRA, weights: Weights, key: str, shape: tuple[int, ...]):
    if tuple(weights.shapes[key]) != tuple(shape):
        raise ValueError(_misfit(lora, key, weights.shapes[key], shape))
    return lambda: lora.scale * weights.read(key).astype(np.float32)


def _product(
    lora: LoRA,
    weights: Weights,
    module: str,
    found: dict[str, str],
    *,
    shape: tuple[int, ...],
    strength: Callable[[int], float],
):
    missing = {"down", "up"} - set(found)
    if missing:
        names = _DOWN if "down" in missing else _UP
        raise ValueError(f"{lora.path}: module {module} lacks {' or '.join(names)}; half a pair.")
    down, up = (weights.shapes[found[part]] for part in ("down", "up"))
    inputs = int(np.prod(shape[1:]))
    fits = min(len(down), len(up), len(shape)) > 1 and (
        int(np.prod(down[1:])) == inputs and up[0] == shape[0] and up[1] == down[0]
    )
    if not fits:
        raise ValueError(_misfit(lora, module, (up, down), shape))

    def change() -> np.ndarray:
        a = weights.read(found["down"]).astype(np.float32).reshape(down[0], inputs)
        b = weights.read(found["up"]).astype(np.float32).reshape(up[0], up[1])
        factor = strength(down[0])
        if "alpha" in found:
            factor = float(weights.read(found["alpha"]).reshape(())) / down[0]
        return lora.scale * factor * (b @ a)

    return change


def _misfit(lora: LoRA, name: str, given, wanted) -> str:
    return (
        f"{lora.path}: {name} has shape {given}, which does not fit this transformer's "
        f"{tuple(wanted)}; the LoRA was made for a model of another size."
    )
