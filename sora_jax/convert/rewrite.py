"""Checkpoints from one format into another, tensor by tensor, and the comparison of two.

Formats differ in names and files alone, so a conversion is a renaming: no model is built and the
host holds one file's tensors at a time. Between reading and writing every tensor goes by its
diffusers name.
"""

import dataclasses
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sora_jax.convert import folder, loose, names, original
from sora_jax.convert.tensors import write_shards
from sora_jax.vae.config import VAEConfig

TARGETS = ("diffusers", "wan")
# Where ComfyUI looks for each model.
COMFYUI = {
    "dit": "diffusion_models",
    "dit_2": "diffusion_models",
    "vae": "vae",
    "text": "text_encoders",
    "image": "clip_vision",
}
# Everything of an inference folder that is not weights.
COMPANIONS = (
    *("model_index.json", "sampling.json", "README.md"),
    *("scheduler", "tokenizer", "image_processor"),
)


class Tensors(NamedTuple):
    """One component's tensors by their diffusers names, read when asked for.

    `paths` are the files that they come from.
    """

    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    paths: Sequence[Path] = ()


def from_folder(path: str | Path, name: str) -> Tensors:
    """Component `name` of an inference checkpoint in any layout that `find_component` knows.

    Raises:
      ValueError: as there, and listing all keys that do not fit the config.
    """
    config, naming, weights = folder.find_component(path, name)
    entries, optional = folder.name_table(naming, config, weights.shapes)
    _, abstract = folder.abstract_params(name, config)
    names.check_keys(
        names.flat_params(abstract),
        entries,
        keys=weights.shapes,
        source=weights.source,
        optional=optional,
    )
    stored = {(entry.path, entry.index): entry.key for entry in entries}
    keys = {
        entry.key: stored[entry.path, entry.index]
        for entry in folder.COMPONENTS[name].entries(config)
    }
    shapes = {key: weights.shapes[held] for key, held in keys.items()}
    return Tensors(config, shapes, lambda key: weights.read(keys[key]), weights.paths)


def from_params(name: str, config, params) -> Tensors:
    """A component that lies in memory."""
    flat = names.flat_params(params)
    entries = {entry.key: entry for entry in folder.COMPONENTS[name].entries(config)}
    shapes = {}
    for key, entry in entries.items():
        ours = flat[entry.path].shape if entry.index is None else flat[entry.path].shape[1:]
        shapes[key] = names.file_shape(entry, ours)
    return Tensors(config, shapes, lambda key: names.tensor_of(flat, entries[key]))


def write_diffusers(
    out: Path, parts: Mapping[str, Tensors], *, dtype: str, max_shard_size: int | None = None
) -> None:
    """config.json and weights of each part, in the folders that diffusers expects."""
    for name, part in parts.items():
        component = folder.COMPONENTS[name]
        target = out / component.folder
        target.mkdir(parents=True, exist_ok=True)
        write_shards(
            target,
            component.stem,
            part.shapes,
            part.read,
            dtype=dtype,
            max_shard_size=max_shard_size,
        )
        folder.write_json(target / "config.json", part.config.to_dict())


def official_stem(out: Path, name: str, *, experts: bool) -> str:
    """What a component's official file in `out` is called, before ".safetensors".

    Of two transformers it says which is for much noise and which for little.
    """
    noise = {"dit": "high_noise_transformer", "dit_2": "low_noise_transformer"} if experts else {}
    return f"{out.resolve().name}_{noise.get(name, folder.COMPONENTS[name].folder)}"


def write_official(
    out: Path,
    parts: Mapping[str, Tensors],
    *,
    dtype: str,
    named_for: Path | None = None,
    index: folder.Index | None = None,
) -> None:
    """One file a part where ComfyUI looks for it, in official names (T5: transformers' names).

    Args:
      index: goes into the headers of the transformers.
      named_for: the folder whose name the files bear; None: `out`.
    """
    for name, part in parts.items():
        keys = {official_key(name, key, part.config): key for key in part.shapes}
        target = out / COMFYUI[name]
        target.mkdir(parents=True, exist_ok=True)
        write_shards(
            target,
            official_stem(named_for or out, name, experts="dit_2" in parts),
            {official: part.shapes[key] for official, key in keys.items()},
            lambda official, keys=keys, read=part.read: read(keys[official]),
            dtype=dtype,
            # Names and shapes do not tell the heads, nor the statistics of the latents.
            config=part.config.to_dict(),
            pipeline=index._asdict() if index and folder.COMPONENTS[name].kind == "dit" else None,
        )


def official_key(name: str, key: str, config) -> str:
    """The name of a tensor in the single files that ComfyUI reads."""
    if folder.COMPONENTS[name].kind == "dit":
        return original.dit_key(key)
    if name == "vae":
        return original.vae_key(key, config)
    return key


def copy_companions(source: Path, out: Path) -> list[str]:
    """Copies what lies beside the weights of an inference folder; returns what was there."""
    copied = []
    for name in COMPANIONS:
        if (path := Path(source) / name).is_dir():
            shutil.copytree(path, out / name, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copyfile(path, out / name)
        else:
            continue
        copied.append(name)
    return copied


def parts_of(path: str | Path) -> dict[str, Tensors]:
    """Every component that an inference checkpoint holds.

    Raises:
      ValueError: it holds none, or one that is damaged.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        held = [name for name, c in folder.COMPONENTS.items() if (path / c.folder).is_dir()]
    elif folder.is_loose(path):
        held = loose.components(path)
    else:
        held = [
            name
            for name, c in folder.COMPONENTS.items()
            if (path / c.folder / "config.json").is_file()
        ]
    if not held:
        raise ValueError(f"{path}: holds no transformer, VAE or text encoder.")
    return {name: from_folder(path, name) for name in sorted(held)}


STATISTICS = ("latents_mean", "latents_std")  # of a VAE's config: a run has none before its export


def settings(config) -> dict[str, Any]:
    """The fields of a component's config that change what the same tensors compute.

    Those that say how they are computed (precision, rematerialisation, kernels) are in no file.
    """
    fields = dataclasses.asdict(type(config).from_dict(config.to_dict()))
    fields.pop("rope_max_seq_len", None)  # nothing here reads it
    if isinstance(config, VAEConfig):  # fields that may be left out, as what that means
        fields["patch_size"] = config.patch_size or 1
        fields["decoder_base_dim"] = config.decoder_base_dim or config.base_dim
    return fields


class Difference(NamedTuple):
    """A tensor that two checkpoints do not share bit for bit, or a setting that they do not."""

    key: str
    what: str


def compare(
    a: Mapping[str, Tensors], b: Mapping[str, Tensors], *, unknown: Collection[str] = ()
) -> tuple[int, list[Difference]]:
    """(tensors compared, differences) of two checkpoints, whatever their formats.

    Values are compared, not types: a bfloat16 tensor equals the float32 one that it was cast to.
    Settings are, where they change what tensors compute.

    Args:
      unknown: settings that one of them does not know yet, by name.
    """
    count, differences = 0, []
    for name in sorted(set(a) | set(b)):
        word = folder.WORDS[name]
        if name not in a or name not in b:
            differences.append(
                Difference(word, f"only in the {'first' if name in a else 'second'}")
            )
            continue
        ours, theirs = a[name], b[name]
        one, other = settings(ours.config), settings(theirs.config)
        differences += [
            Difference(f"{word}'s config {key}", f"{one[key]} and {other[key]}")
            for key in one
            if one[key] != other[key] and key not in unknown
        ]
        for key in sorted(set(ours.shapes) | set(theirs.shapes)):
            count += 1
            what = _difference(ours, theirs, key)
            if what:
                differences.append(Difference(f"{word} {key}", what))
    return count, differences


def _difference(a: Tensors, b: Tensors, key: str) -> str:
    if key not in a.shapes or key not in b.shapes:
        return f"only in the {'first' if key in a.shapes else 'second'}"
    if tuple(a.shapes[key]) != tuple(b.shapes[key]):
        return f"shape {tuple(a.shapes[key])} and {tuple(b.shapes[key])}"
    x, y = (np.asarray(part.read(key), np.float32) for part in (a, b))
    if np.array_equal(x, y, equal_nan=True):
        return ""
    return f"differs by up to {np.max(np.abs(x - y)):.3g}, largest value {np.max(np.abs(x)):.3g}"
