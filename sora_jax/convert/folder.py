"""Inference checkpoints: safetensors in the diffusers folder layout, read and written.

model_index.json
transformer/  config.json  diffusion_pytorch_model.safetensors
vae/          config.json  diffusion_pytorch_model.safetensors
text_encoder/ config.json  model.safetensors
tokenizer/    scheduler/   sampling.json (our defaults for size, steps and guidance)

and, in some models, transformer_2/ (the expert for little noise) and image_encoder/. Read also from
official files, which lie loose (`convert.loose`).
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

from sora_jax import sharding, video_io
from sora_jax.convert import loose, lora, names, official, settings
from sora_jax.convert.dit import dit_entries
from sora_jax.convert.image import UNREAD, image_entries
from sora_jax.convert.recognize import Naming, recognize
from sora_jax.convert.tensors import hash_files, missing_file, write_shards
from sora_jax.convert.text import entries_held, text_entries
from sora_jax.convert.vae import vae_entries
from sora_jax.convert.weights import INDEX, Weights, open_weights
from sora_jax.dit.model import DiT, DiTConfig
from sora_jax.image.clip import CLIPVision, CLIPVisionConfig
from sora_jax.text.t5 import T5Config, T5Encoder
from sora_jax.text.tokenizer import Tokenizer, load_tokenizer
from sora_jax.text.unigram import UnigramTokenizer
from sora_jax.vae.model import VAEConfig, VideoVAE


class Component(NamedTuple):
    """How one part of a pipeline is stored.

    `kind` is what `recognize` calls such a file, `called` what its config.json calls itself.
    """

    kind: str
    called: tuple[str, ...]
    folder: str
    stem: str
    config: type
    module: Callable[..., nnx.Module]
    entries: Callable[[Any], list[names.Entry]]


_STEM = "diffusion_pytorch_model"
_DIT, _VAE = ("WanTransformer3DModel",), ("AutoencoderKLWan",)
_T5, _CLIP = ("umt5", "t5"), ("clip_vision_model",)
COMPONENTS = {
    "dit": Component("dit", _DIT, "transformer", _STEM, DiTConfig, DiT, dit_entries),
    "dit_2": Component("dit", _DIT, "transformer_2", _STEM, DiTConfig, DiT, dit_entries),
    "vae": Component("vae", _VAE, "vae", _STEM, VAEConfig, VideoVAE, vae_entries),
    "text": Component("text", _T5, "text_encoder", "model", T5Config, T5Encoder, text_entries),
    "image": Component(
        "image", _CLIP, "image_encoder", "model", CLIPVisionConfig, CLIPVision, image_entries
    ),
}
# Settings of a component that other software alone reads, and those that it may leave null.
_UNREAD_SETTINGS = (
    *("_class_name", "architectures", "is_encoder_decoder", "dropout", "dropout_rate"),
    *("pad_token_id", "eos_token_id", "decoder_start_token_id"),
)
_NULLABLE = (
    *("out_channels", "latents_mean", "latents_std"),
    *("scale_factor_temporal", "scale_factor_spatial"),
)
REQUIRED = ("dit", "vae", "text")  # of a pipeline; the others are there where its model has them
WORDS = {
    "dit": "transformer",
    "dit_2": "second transformer",
    "vae": "VAE",
    "text": "text encoder",
    "image": "image encoder",
}


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
    with video_io.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def tensor_path(folder: Path, name: str) -> Path:
    component = COMPONENTS[name]
    return Path(folder) / component.folder / f"{component.stem}.safetensors"


def read_config(folder: Path, name: str):
    """The frozen config dataclass of component `name` ("dit", "vae" or "text").

    Raises:
      ValueError: the file is missing or damaged, or has settings that do not fit.
    """
    path = Path(folder) / COMPONENTS[name].folder / "config.json"
    return _config_of(name, read_json(path), source=path)


def _config_of(name: str, values: dict, *, source: str | Path):
    kind = COMPONENTS[name].config
    ours = {key: value for key, value in kind().to_dict().items() if key not in _UNREAD_SETTINGS}
    values = settings.checked(values, ours, source=source, nullable=_NULLABLE)
    try:
        return kind.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


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
    files, with official names or diffusers'. Their config is in the file's header, or in a
    config.json beside it; where neither is there it follows from the shapes.

    Raises:
      ValueError: naming the missing or damaged file and tensor.
    """
    folder = Path(folder)
    directory = folder / COMPONENTS[name].folder
    if not is_loose(folder) and (
        (directory / "config.json").is_file() or (folder / "model_index.json").is_file()
    ):
        config = read_config(folder, name)
        single = tensor_path(folder, name)
        sharded = directory.is_dir() and any(directory.glob(f"*{INDEX}"))
        naming, weights = recognize(open_weights(directory if sharded else single))
        if naming.component != COMPONENTS[name].kind:
            raise ValueError(
                f"{weights.source}: holds a {WORDS[naming.component]}, not a {WORDS[name]}."
            )
        return config, naming, weights
    naming, weights = _loose_component(folder, name)
    told, source = weights.config, weights.source
    if told is None:
        told, source = _config_beside(weights, name), weights.paths[0].parent / "config.json"
    if told is not None:
        return _config_of(name, told, source=source), naming, weights
    try:
        config = naming.config(weights.shapes)
    except (KeyError, StopIteration) as error:
        raise ValueError(
            f"{weights.source}: lacks tensor {error}; if it is one shard of several, give the "
            "folder that holds them and their index."
        ) from error
    if config is None:
        raise ValueError(
            f"{weights.source}: a VAE in diffusers names needs its config.json beside it; put it "
            "there."
        )
    return config, naming, weights


def _config_beside(weights: Weights, name: str) -> dict | None:
    """The config.json in the folder of loose weights, but for one that is of another model."""
    path = weights.paths[0].parent / "config.json"
    if not path.is_file():
        return None
    values = read_json(path)
    kind = values.get("_class_name", values.get("model_type"))
    return values if kind in (None, *COMPONENTS[name].called) else None


def _loose_component(folder: Path, name: str) -> loose.Model:
    found = loose.components(folder).get(name, [])
    if len(found) == 1:
        return found[0]
    hint = ""
    if name.startswith("dit") and len(found) > 1:
        hint = " Of two experts, put low_noise into the name of that for little noise."
    elif pickles := [] if found or folder.is_file() else loose.pickles(folder):
        names = ", ".join(file.name for file in pickles[:3])
        hint = f" Pickles run whatever code they hold, so {names} was not read: convert it."
    files = ", ".join(weights.source for _, weights in found) or "none"
    raise ValueError(
        f"{folder}: needs one {WORDS[name]}, in official or diffusers names; found: {files}.{hint}"
    )


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


def is_loose(folder: str | Path) -> bool:
    """Whether an inference checkpoint is official files: not all in diffusers' folders."""
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return False
    ours = {c.folder for c in COMPONENTS.values() if (folder / c.folder / "config.json").is_file()}
    return not ours or any(file.parent.name not in ours for file in loose.files(folder))


def held(folder: str | Path) -> tuple[str, ...]:
    """The components that an inference checkpoint is made of, `REQUIRED` ones first.

    By its model_index.json, if it has one, so that a missing folder is an error when it is read.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    listed = read_json(index) if index.is_file() else {}
    files = loose.components(folder) if is_loose(folder) else {}

    def has(name: str) -> bool:
        where = COMPONENTS[name].folder
        entry = listed.get(where, [None, None] if listed else None)
        return (
            name in files or (folder / where).is_dir() if entry is None else entry != [None, None]
        )

    return REQUIRED + tuple(n for n in COMPONENTS if n not in REQUIRED and has(n))


class Index(NamedTuple):
    """What a pipeline's model_index.json says about its transformers.

    `boundary_ratio`: the time at which a second one takes over, None where there is one alone;
    `expand_timesteps`: each token has a time of its own.
    """

    boundary_ratio: float | None
    expand_timesteps: bool


def read_index(folder: str | Path) -> Index:
    """From model_index.json; of loose files, what the header of our own says.

    Else what Wan's published models of that kind have.
    """
    if is_loose(folder):
        weights = find_component(folder, "dit")[2]
        values, source = weights.pipeline or read_family(folder)._asdict(), weights.source
    else:
        source = Path(folder) / "model_index.json"
        values = read_json(source)
    example = {"boundary_ratio": None, "expand_timesteps": False}
    values = settings.checked(values, example, source=source, nullable=example)
    return Index(values.get("boundary_ratio"), bool(values.get("expand_timesteps")))


def read_family(folder: str | Path) -> official.Family:
    """Which of Wan's published models the files look like."""
    dit, vae = (find_component(folder, name)[0] for name in ("dit", "vae"))
    return official.family(dit, vae, experts="dit_2" in held(folder))


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """That of an inference checkpoint; of loose files also the one within the text encoder's.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    folder = Path(folder)
    if (folder / "tokenizer").is_dir() or not is_loose(folder):
        return load_tokenizer(folder / "tokenizer")
    weights = find_component(folder, "text")[2]
    if (model := weights.sentencepiece) is not None:
        return UnigramTokenizer.from_sentencepiece(model, source=weights.source)
    if (file := loose.tokenizer_file(folder)) is None:
        raise ValueError(
            f"{folder}: no tokenizer; put the tokenizer.json or spiece.model of the text encoder "
            "there, or take ComfyUI's file of it, which holds one."
        )
    return load_tokenizer(file.parent)


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
