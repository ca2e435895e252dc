"""Inference checkpoints: safetensors in the diffusers folder layout, read and written.

model_index.json
transformer/  config.json  diffusion_pytorch_model.safetensors
vae/          config.json  diffusion_pytorch_model.safetensors
text_encoder/ config.json  model.safetensors
tokenizer/    scheduler/   sampling.json (our defaults for size, steps and guidance)

and, in some models, transformer_2/ (the expert for little noise) and image_encoder/.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sora_jax import sharding
from sora_jax.convert import lora, names
from sora_jax.convert.dit import dit_entries
from sora_jax.convert.image import UNREAD, image_entries
from sora_jax.convert.recognize import Naming, recognize
from sora_jax.convert.tensors import hash_files, missing_file, write_shards
from sora_jax.convert.text import entries_held, text_entries
from sora_jax.convert.vae import vae_entries
from sora_jax.convert.weights import INDEX, PICKLES, Weights, open_weights
from sora_jax.diffusion.feature_cache import ChangeCurve
from sora_jax.diffusion.times import NO_SHIFT, TokenShift
from sora_jax.dit.model import DiT, DiTConfig
from sora_jax.image.clip import CLIPVision, CLIPVisionConfig
from sora_jax.text.t5 import T5Config, T5Encoder
from sora_jax.vae.model import VAEConfig, VideoVAE


class Component(NamedTuple):
    """How one part of a pipeline is stored; `kind` is what `recognize` calls such a file."""

    kind: str
    folder: str
    stem: str
    config: type
    module: Callable[..., nnx.Module]
    entries: Callable[[Any], list[names.Entry]]


_STEM = "diffusion_pytorch_model"
COMPONENTS = {
    "dit": Component("dit", "transformer", _STEM, DiTConfig, DiT, dit_entries),
    "dit_2": Component("dit", "transformer_2", _STEM, DiTConfig, DiT, dit_entries),
    "vae": Component("vae", "vae", _STEM, VAEConfig, VideoVAE, vae_entries),
    "text": Component("text", "text_encoder", "model", T5Config, T5Encoder, text_entries),
    "image": Component(
        "image", "image_encoder", "model", CLIPVisionConfig, CLIPVision, image_entries
    ),
}
REQUIRED = ("dit", "vae", "text")  # of a pipeline; the others are there where its model has them
WORDS = {
    "dit": "transformer",
    "dit_2": "second transformer",
    "vae": "VAE",
    "text": "text encoder",
    "image": "image encoder",
}


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """What `sora-jax sample` uses where the user says nothing; sizes in pixels.

    `guidance_2` is for the second of two transformers, None the same. `text_tokens` is the longest
    prompt in tokens, end of sequence included. `tasks` are the masks that it was trained with, by
    the names in `diffusion.tasks.MASKS`, and FRAME_TIMES of there. `refine_prefix` are the words
    before captions of parts of larger pictures, which refining puts before its prompt.
    `feature_cache` was measured by `tools/calibrate_cache.py`, and is what a request's
    `cache_threshold` needs.
    """

    width: int = 64
    height: int = 64
    frames: int = 17
    fps: float = 8.0
    steps: int = 30
    guidance: float = 3.0
    guidance_2: float | None = None
    guidance_interval: Sequence[float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    shift: TokenShift = NO_SHIFT
    solver: str = "unipc"
    schedule: str = "wan"
    text_tokens: int = 224
    tasks: Sequence[str] = ("none",)
    refine_prefix: str = ""
    feature_cache: ChangeCurve | None = None


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
    graphdef, shapes = _abstract_params(name, config)
    return graphdef, jax.tree.map(lambda leaf: leaf, shapes)  # a tree of the caller's own


@functools.lru_cache(maxsize=32)
def _abstract_params(name: str, config):
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
        if naming.component != COMPONENTS[name].kind:
            raise ValueError(
                f"{weights.source}: holds a {WORDS[naming.component]}, not a {WORDS[name]}."
            )
        return config, naming, weights
    # Nothing but the folder tells one expert from the other.
    loose = [] if name == "dit_2" else loose_parts(folder)
    found = [part for part in loose if part[0].component == name]
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


class Opened(NamedTuple):
    """A component whose names and shapes were checked; `load()` reads its parameters."""

    config: Any
    graphdef: Any
    abstract: Any  # the parameters' shapes
    load: Callable[[], Any]


def load_component(folder: str | Path, name: str, **options):
    """(config, graphdef, params) of a component; arguments and errors are `open_component`'s."""
    opened = open_component(folder, name, **options)
    return opened.config, opened.graphdef, opened.load()


def open_component(
    folder: str | Path,
    name: str,
    *,
    mesh: Mesh | None = None,
    dtype=jnp.float32,
    loras: Sequence[lora.LoRA] = (),
) -> Opened:
    """Component `name` of an inference checkpoint, its weights unread.

    Args:
      folder: as for `find_component`.
      mesh: where the parameters go, by `sharding.tree_shardings`; None: the default device.
      dtype: of matrices and embeddings; "bfloat16" is also that of matrix products. Norms, biases,
        modulation and all that embeds time stay float32, as in diffusers.
      loras: merged into the transformer; other components take none.

    Raises:
      ValueError: naming the missing or damaged file and tensor, or what a LoRA does not fit.
    """
    config, naming, weights = find_component(folder, name)
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bfloat16:
        config = dataclasses.replace(config, dtype="bfloat16")
    graphdef, abstract = abstract_params(name, config)
    entries, optional = name_table(naming, config, weights.shapes)
    names.check_keys(
        names.flat_params(abstract),
        entries,
        keys=weights.shapes,
        source=weights.source,
        optional=optional,
    )
    read = lora.merged(weights, entries, config, loras) if loras else weights.read
    shardings = None if mesh is None else sharding.tree_shardings(abstract, mesh)

    def load():
        return names.fill(abstract, entries, read=read, dtype=dtype, shardings=shardings)

    return Opened(config, graphdef, abstract, load)


def name_table(
    naming: Naming, config, keys: Mapping[str, tuple[int, ...]]
) -> tuple[list[names.Entry], frozenset[str]]:
    """(name table for a file with `keys`, keys that it may hold and that stay unread)."""
    if naming.component == "text" and naming.names == "diffusers":
        # Its embeddings have two names, and a file may hold either.
        return entries_held(config, keys)
    unread = frozenset()
    if naming.component == "image":
        unread = UNREAD
    elif naming.component == "dit":
        # Published I2V transformers hold a norm that no code has ever used.
        unread = frozenset(key for key in keys if key.endswith(".attn2.norm_added_q.weight"))
    return naming.entries(config), unread


def held(folder: str | Path) -> tuple[str, ...]:
    """The components that an inference checkpoint is made of, `REQUIRED` ones first.

    By its model_index.json, if it has one, so that a missing folder is an error when it is read.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    listed = read_json(index) if index.is_file() else {}

    def has(name: str) -> bool:
        where = COMPONENTS[name].folder
        entry = listed.get(where, [None, None] if listed else None)
        return (folder / where).is_dir() if entry is None else entry != [None, None]

    return REQUIRED + tuple(n for n in COMPONENTS if n not in REQUIRED and has(n))


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
    paths = [path for name in held(folder) for path in find_component(folder, name)[2].paths]
    return hash_files(paths)[:16]


# diffusers' scheduler classes -> our solver and schedule.
SCHEDULERS = {
    "UniPCMultistepScheduler": ("unipc", "wan"),
    "FlowMatchEulerDiscreteScheduler": ("euler", "flow_match_euler"),
}


def _diffusers_sampling(folder: Path) -> SamplingDefaults:
    """Wan's published sizes and steps, and the solver and shift of the folder's scheduler."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        raise ValueError(
            f"{folder}/scheduler: {kind} is not one of {', '.join(SCHEDULERS)}; add a "
            "sampling.json, or change the scheduler."
        )
    solver, schedule = SCHEDULERS[kind]
    shift = float(config.get("flow_shift", config.get("shift", 1.0)))
    size = {"width": 832, "height": 480, "frames": 81, "fps": 16.0}
    if read_json(folder / "model_index.json").get("expand_timesteps"):  # TI2V-5B
        size = {"width": 1280, "height": 704, "frames": 121, "fps": 24.0}
    return SamplingDefaults(
        **size,
        steps=50,
        guidance=5.0,
        shift=TokenShift.constant(shift),
        solver=solver,
        schedule=schedule,
        text_tokens=512,
    )


def read_sampling(folder: Path) -> SamplingDefaults:
    """The folder's sampling.json, or what diffusers does with a folder that has none.

    Raises:
      ValueError: the file has unknown keys, or the scheduler is one that nothing here repeats.
    """
    path = Path(folder) / "sampling.json"
    if not path.is_file():
        return _diffusers_sampling(Path(folder))
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
    if (curve := values.get("feature_cache")) is not None:
        try:
            values["feature_cache"] = ChangeCurve(**curve)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    return SamplingDefaults(**values)
