"""Inference checkpoints: safetensors in the diffusers folder layout, read and written.

model_index.json
transformer/  config.json  diffusion_pytorch_model.safetensors
vae/          config.json  diffusion_pytorch_model.safetensors
text_encoder/ config.json  model.safetensors
tokenizer/    scheduler/   sampling.json (our defaults for size, steps and guidance)
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sora_jax import sharding
from sora_jax.convert import lora, names
from sora_jax.convert.dit import dit_entries
from sora_jax.convert.recognize import Naming, recognize
from sora_jax.convert.tensors import hash_files, missing_file, write_shards
from sora_jax.convert.text import load_text, text_entries
from sora_jax.convert.vae import vae_entries
from sora_jax.convert.weights import INDEX, PICKLES, Weights, open_weights
from sora_jax.diffusion.times import NO_SHIFT, TokenShift
from sora_jax.dit.model import DiT, DiTConfig
from sora_jax.text.t5 import T5Config, T5Encoder
from sora_jax.vae.model import VAEConfig, VideoVAE


class Component(NamedTuple):
    """How one part of a pipeline is stored."""

    folder: str
    stem: str
    config: type
    module: Callable[..., nnx.Module]
    entries: Callable[[Any], list[names.Entry]]


COMPONENTS = {
    "dit": Component("transformer", "diffusion_pytorch_model", DiTConfig, DiT, dit_entries),
    "vae": Component("vae", "diffusion_pytorch_model", VAEConfig, VideoVAE, vae_entries),
    "text": Component("text_encoder", "model", T5Config, T5Encoder, text_entries),
}
WORDS = {"dit": "transformer", "vae": "VAE", "text": "text encoder"}


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """What `sora-jax sample` uses where the user says nothing; sizes in pixels.

    `text_tokens` is the longest prompt in tokens, end of sequence included.
    """

    width: int = 64
    height: int = 64
    frames: int = 17
    fps: float = 8.0
    steps: int = 30
    guidance: float = 3.0
    guidance_interval: Sequence[float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    shift: TokenShift = NO_SHIFT
    solver: str = "unipc"
    schedule: str = "wan"
    text_tokens: int = 224


def read_json(path: Path) -> dict:
    """Raises ValueError, in one line, for a missing file or one that is no JSON object."""
    if not path.is_file():
        raise ValueError(missing_file(path))
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy or export it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object; copy or export it again.")
    return value


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def tensor_path(folder: Path, name: str) -> Path:
    component = COMPONENTS[name]
    return Path(folder) / component.folder / f"{component.stem}.safetensors"


def read_config(folder: Path, name: str):
    """The frozen config dataclass of component `name` ("dit", "vae" or "text")."""
    component = COMPONENTS[name]
    return component.config.from_dict(read_json(Path(folder) / component.folder / "config.json"))


def abstract_params(name: str, config):
    """(graphdef, parameter shapes) of a component, without allocating."""
    module = nnx.eval_shape(lambda: COMPONENTS[name].module(config, rngs=nnx.Rngs(0)))
    return nnx.split(module, nnx.Param)


def find_component(folder: str | Path, name: str) -> tuple[Any, Naming, Weights]:
    """(config, naming, weights) of component `name` ("dit", "vae" or "text") at `folder`.

    `folder` has diffusers' layout; or it is a single file of that component, or a folder of such
    files, with official names or diffusers', and the config follows from the shapes, where
    the file's header does not hold it.

    Raises:
      ValueError: naming the missing or damaged file and tensor.
    """
    folder = Path(folder)
    directory = folder / COMPONENTS[name].folder
    if (directory / "config.json").is_file() or (folder / "model_index.json").is_file():
        config = read_config(folder, name)
        single = tensor_path(folder, name)
        sharded = directory.is_dir() and any(directory.glob(f"*{INDEX}"))
        naming, weights = recognize(open_weights(directory if sharded else single))
        if naming.component != name:
            raise ValueError(
                f"{weights.source}: holds a {WORDS[naming.component]}, not a {WORDS[name]}."
            )
        return config, naming, weights
    found = [part for part in loose_parts(folder) if part[0].component == name]
    if len(found) != 1:
        files = ", ".join(part[1].source for part in found) or "none"
        raise ValueError(
            f"{folder}: needs one {WORDS[name]}, in official or diffusers names; found: {files}."
        )
    naming, weights = found[0]
    if weights.config is not None:
        return COMPONENTS[name].config.from_dict(weights.config), naming, weights
    try:
        config = naming.config(weights.shapes)
    except (KeyError, StopIteration) as error:
        raise ValueError(
            f"{weights.source}: lacks tensor {error}; if it is one shard of several, give the "
            "folder that holds them and their index."
        ) from error
    if config is None:
        raise ValueError(
            f"{weights.source}: a VAE in diffusers names needs its config.json beside it; put both "
            f"into a folder {COMPONENTS[name].folder}/."
        )
    return config, naming, weights


def loose_parts(path: Path) -> list[tuple[Naming, Weights]]:
    """The models in a single file, or in the files of a folder and of the folders in it."""
    if not path.is_dir():
        return [recognize(open_weights(path))]
    indexes = [*path.glob(f"*{INDEX}"), *path.glob(f"*/*{INDEX}")]
    covered = {file for index in indexes for file in open_weights(index).paths}
    files = [*path.glob("*.safetensors"), *path.glob("*/*.safetensors")]
    alone = [file for file in files if file not in covered]
    if not indexes and not alone:
        pickles = sorted(p for p in path.rglob("*") if p.suffix in PICKLES)
        if pickles:
            open_weights(pickles[0])  # says why not
        raise ValueError(f"{path}: holds no .safetensors file; give a folder of weights.")
    return [recognize(open_weights(file)) for file in sorted([*indexes, *alone])]


def load_component(
    folder: str | Path,
    name: str,
    *,
    mesh: Mesh | None = None,
    dtype=jnp.float32,
    loras: Sequence[lora.LoRA] = (),
):
    """(config, graphdef, params) of component `name` of an inference checkpoint.

    Args:
      folder: as for `find_component`.
      mesh: where the parameters go, by `sharding.tree_shardings`; None: the default device.
      dtype: of the parameters.
      loras: merged into the transformer; other components take none.

    Raises:
      ValueError: naming the missing or damaged file and tensor, or what a LoRA does not fit.
    """
    config, naming, weights = find_component(folder, name)
    graphdef, abstract = abstract_params(name, config)
    read = weights.read
    if loras:
        entries = naming.entries(config)
        names.check_keys(
            names.flat_params(abstract), entries, keys=weights.shapes, source=weights.source
        )
        read = lora.merged(weights, entries, config, loras)
    options = {
        "keys": weights.shapes,
        "read": read,
        "source": weights.source,
        "dtype": dtype,
        "shardings": None if mesh is None else sharding.tree_shardings(abstract, mesh),
    }
    if name == "text" and naming.names == "diffusers":
        # Its embeddings have two names, and a file may hold either.
        params = load_text(abstract, config, **options)
    else:
        params = names.load(abstract, naming.entries(config), **options)
    return config, graphdef, params


def save_component(folder: Path, name: str, config, params, *, dtype: str = "float32") -> None:
    """Writes config.json and the tensors of one component."""
    component = COMPONENTS[name]
    target = Path(folder) / component.folder
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "config.json", config.to_dict())
    tensors = names.export(jax.device_get(params), component.entries(config))
    shapes = {key: value.shape for key, value in tensors.items()}
    write_shards(target, component.stem, shapes, tensors.__getitem__, dtype=dtype)


def checkpoint_hash(folder: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 over the tensor files of all components."""
    paths = [path for name in COMPONENTS for path in find_component(folder, name)[2].paths]
    return hash_files(paths)[:16]


def read_sampling(folder: Path) -> SamplingDefaults:
    """The folder's sampling.json, or our defaults where it has none.

    Raises:
      ValueError: the file has unknown keys.
    """
    path = Path(folder) / "sampling.json"
    if not path.is_file():
        return SamplingDefaults()
    values = read_json(path)
    known = [field.name for field in dataclasses.fields(SamplingDefaults)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; allowed: {', '.join(known)}.")
    shift = values.get("shift", 1.0)
    try:
        values["shift"] = (
            TokenShift(**shift) if isinstance(shift, dict) else TokenShift.constant(float(shift))
        )
    except TypeError as error:
        raise ValueError(
            f"{path}: shift {shift} is neither a number nor tokens_lo, shift_lo, tokens_hi and "
            "shift_hi."
        ) from error
    return SamplingDefaults(**values)
