"""Training runs and checkpoints out into the folders and files that other software reads."""

import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import sora_jax
from sora_jax.checkpoint import Checkpointer
from sora_jax.convert import folder, onnx, programs, replace, rewrite, stablehlo
from sora_jax.convert.sampling import SamplingDefaults, of_family, read_sampling
from sora_jax.data import loader as loaders
from sora_jax.diffusion import times
from sora_jax.image import clip
from sora_jax.train import batches, frozen, shown
from sora_jax.train.program import STAGES
from sora_jax.train.vae_stage import to_float

WEIGHTS = ("ema", "raw")
PROGRAMS = {"stablehlo": stablehlo, "onnx": onnx}
TARGETS = (*rewrite.TARGETS, *PROGRAMS)
_DIFFUSERS_VERSION = "0.35.0"
STATISTICS_CLIPS = 256  # clips that the latents' mean and standard deviation are measured on


def export(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "diffusers",
    weights: str = "ema",
    dtype: str = "float32",
    max_shard_size: int | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> Path:
    """Writes a training run, or an inference checkpoint in any layout, as the folder `out`.

    A VAE run gives a folder that holds the VAE alone, its latent statistics measured on the
    run's own data; a DiT run gives a complete pipeline, its VAE that of `config.vae_checkpoint`.

    Args:
      source: workdir of a run, or what `folder.find_component` reads.
      to: "diffusers"; "wan": single files with the official names, as ComfyUI reads them, with
        the tokenizer and the defaults of sampling beside them; or "stablehlo" or "onnx":
        programs for other runtimes, see the modules of these names.
      weights: of a run, "ema" or "raw".
      dtype: of the stored tensors, "float32", "bfloat16" or "float16".
      max_shard_size: bytes of one file, with "diffusers".
      size: (width, height) in pixels that programs are for; by default the checkpoint's own, as
        are `frames`.

    Raises:
      ValueError: `source` holds no checkpoint, an unknown choice, or an `out` in which the export
        would replace or mix with something else; nothing is written then.
    """
    for name, value, allowed in (("weights", weights, WEIGHTS), ("to", to, TARGETS)):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is unknown; use {' or '.join(allowed)}.")
    if max_shard_size is not None and to != "diffusers":
        raise ValueError("max_shard_size is for --to diffusers; others come as one file.")
    if to not in PROGRAMS and (size or frames):
        raise ValueError("size and frames are for --to stablehlo or onnx; weights serve any.")
    out = Path(out)
    source = sora_jax.checkpoint_path(source)
    if out.resolve() == source.resolve() or out.is_file():
        raise ValueError(f"out {out} is the source, or a file; name another folder.")
    if to in PROGRAMS:
        options = {"weights": weights, "dtype": dtype, "size": size, "frames": frames}
        return _write_programs(PROGRAMS[to], source, out, **options)
    if (source / "checkpoints").is_dir():
        parts, config, step = run_parts(source, weights)
        finish = functools.partial(_finish_run, config=config, weights=weights, step=step)
    else:
        parts = rewrite.parts_of(source)
        config, finish = None, functools.partial(_finish_folder, source)
    replace.check(out, parts, official=to == "wan")
    with replace.staged(out) as made:
        if to == "wan":
            index = _index(source, parts, config)
            rewrite.write_official(made, parts, dtype=dtype, named_for=out, index=index)
            _finish_official(source, made, parts, config, named=out)
        else:
            rewrite.write_diffusers(made, parts, dtype=dtype, max_shard_size=max_shard_size)
            finish(made, named=out)
    return out


def _write_programs(kind, source: Path, out: Path, *, weights: str, dtype: str, **size) -> Path:
    if not (source / "checkpoints").is_dir():
        return kind.write(source, out, dtype=dtype, **size)
    kind.check(dtype)
    programs.check_empty(out)
    with tempfile.TemporaryDirectory() as temporary:
        folder_path = export(source, temporary, weights=weights)
        if not (folder_path / "model_index.json").is_file():
            raise ValueError(f"{source}: trains a VAE alone; programs need a whole pipeline.")
        return kind.write(folder_path, out, dtype=dtype, **size)


def parse_bytes(text: str | None) -> int | None:
    """Bytes of "5GB", "500MB" or "1000000".

    Raises:
      ValueError: anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)\s*(|k|M|G)B?", text.strip(), re.IGNORECASE)
    if match is None or not int(match[1]):
        raise ValueError(f"--max-shard-size {text}: write a size such as 5GB or 500MB.")
    return int(match[1]) * 1000 ** ["", "k", "m", "g"].index(match[2].lower())


def run_parts(run: Path, weights: str, *, statistics: bool = True):
    """(components, config, step) of the newest checkpoint of training run `run`.

    Args:
      statistics: measure those of a VAE's latents, which its config stores.
    """
    config, params, step = restore(run, weights)
    stage = STAGES[config.stage](config)
    if config.stage == "vae":
        settings = stage.config
        if statistics:
            settings = with_statistics(stage, config, params["vae"])
        return {"vae": rewrite.from_params("vae", settings, params["vae"])}, config, step
    parts = {
        "dit": rewrite.from_params("dit", stage.dit_config, params["dit"]),
        "text": rewrite.from_params("text", stage.text.config, params["text"])
        if stage.text.is_trained
        else rewrite.from_folder(frozen.path_of(config, "text_checkpoint"), "text"),
        "vae": rewrite.from_folder(frozen.path_of(config, "vae_checkpoint"), "vae"),
    }
    if stage.dit_config.image_dim is not None:
        parts["image"] = rewrite.from_folder(frozen.path_of(config, "image_checkpoint"), "image")
    return parts, config, step


def _finish_run(out: Path, config, *, weights: str, step: int, named: Path) -> None:
    """What a pipeline's folder holds beside its weights; a VAE alone needs none of it."""
    if config.stage == "vae":
        return
    stage = STAGES[config.stage](config)
    stage.text.tokenizer.save(out / "tokenizer")
    write_pipeline(out, config, stage)
    (out / "README.md").write_text(model_card(named, config, weights, step))


def _finish_official(
    source: Path, out: Path, parts, config: ConfigDict | None, *, named: Path
) -> None:
    """Beside official files: the tokenizer and the defaults of sampling, where the source has them.

    No other software asks for them there; without them the files alone are no pipeline here.
    """
    if config is not None:
        if config.stage == "vae":
            return
        stage = STAGES[config.stage](config)
        stage.text.tokenizer.save(out / "tokenizer")
        _write_sampling(out, config, stage)
    elif "text" in parts:
        try:
            folder.open_tokenizer(source).save(out / "tokenizer")
        except ValueError as error:
            print(
                f"{named}: weights alone; a pipeline needs a tokenizer too: {error}",
                file=sys.stderr,
            )
        if (source / "sampling.json").is_file():
            shutil.copyfile(source / "sampling.json", out / "sampling.json")
        elif (source / "model_index.json").is_file():  # its scheduler stays behind
            try:
                folder.write_json(out / "sampling.json", dataclasses.asdict(read_sampling(source)))
            except ValueError as error:
                print(f"{named}: has no sampling.json: {error}", file=sys.stderr)


def _index(source: Path, parts, config: ConfigDict | None) -> folder.Index | None:
    """What a pipeline's model_index.json says, or would say; None where there is no pipeline."""
    if config is not None:
        if config.stage == "vae":
            return None
        return folder.Index(None, _expands_timesteps(STAGES[config.stage](config)))
    if "dit" not in parts:
        return None
    if not folder.is_loose(source):
        return folder.read_index(source) if (source / "model_index.json").is_file() else None
    # A transformer alone tells no family, but its header may.
    told = folder.find_component(source, "dit")[2].pipeline is not None
    return folder.read_index(source) if told or "vae" in parts else None


def _finish_folder(source: Path, out: Path, *, named: Path) -> None:
    if source.is_dir() and "model_index.json" in rewrite.copy_companions(source, out):
        return
    if lacks := _complete(source, out):
        print(
            f"{named}: weights and configs alone; a pipeline also needs model_index.json, "
            f"scheduler/ and tokenizer/, which were not made: {lacks}",
            file=sys.stderr,
        )


def _complete(source: Path, out: Path) -> str:
    """Makes a pipeline of the models in `out`, if they are all there; else says what it lacks.

    The image encoder is one of them where the transformer attends to pictures.
    """
    held = [name for name, c in folder.COMPONENTS.items() if (out / c.folder).is_dir()]
    needed = list(folder.REQUIRED)
    if "dit" in held and folder.read_config(out, "dit").image_dim is not None:
        needed.append("image")
    if missing := [name for name in needed if name not in held]:
        return f"the source has no {', '.join(folder.WORDS[name] for name in missing)}."
    try:
        tokenizer = folder.open_tokenizer(source)
    except ValueError as error:
        return str(error)
    tokenizer.save(out / "tokenizer")
    family = folder.read_family(out)
    index = folder.read_index(source) if folder.is_loose(source) else family
    if not (out / "sampling.json").is_file():
        folder.write_json(out / "sampling.json", dataclasses.asdict(of_family(family)))
    sampling = read_sampling(out)
    dit, vae = (folder.read_config(out, name) for name in ("dit", "vae"))
    space = vae.scale_factor_spatial
    frames = 1 + (sampling.frames - 1) // vae.scale_factor_temporal
    latents = (frames, sampling.height // space, sampling.width // space)
    tokens = math.prod(-(-n // p) for n, p in zip(latents, dit.patch_size, strict=True))
    write_index(
        out,
        shift=float(times.shift_for_tokens(tokens, sampling.shift)),
        expand_timesteps=index.expand_timesteps,
        boundary_ratio=index.boundary_ratio,
        pictures=family.pictures,
    )
    return ""


def model_card(out: Path, config, weights: str, step: int) -> str:
    """What the exported folder is and how to run it; the run's owner adds data and licence."""
    size = f"{config.data.frames} frames of {config.data.width}x{config.data.height}"
    return f"""# {out.resolve().name}

A text-to-video diffusion transformer in the Wan family's layout, trained with sora_jax.

| | |
|---|---|
| Data | {config.data.kind} {config.data.path}, {size} at {config.data.fps:g} fps |
| Steps, batch | {step} of {config.batch_size} clips |
| Weights | {weights} |
{replace.UNFILLED}

```bash
sora-jax sample --checkpoint {out.resolve().name} --prompt "..." --out video.mp4
```

It loads in diffusers too: `WanPipeline.from_pretrained("{out.resolve().name}")`.
"""


def restore(run: str | Path, weights: str):
    """(config, parameters, step) of the newest sound checkpoint of `run`.

    Raises:
      ValueError: there is none.
    """
    directory = Path(run) / "checkpoints"
    if not directory.is_dir():
        raise ValueError(f"{run}: not a training run, it has no folder 'checkpoints'.")
    with Checkpointer(directory) as checkpointer:
        meta = checkpointer.read_meta()
        config = ConfigDict(json.loads(meta["config"]))
        stage = STAGES[config.stage](config)
        shapes = jax.eval_shape(stage.init, jax.random.key(0))
        averaged = weights == "ema" and config.optim.ema_decay
        under = "ema" if averaged else "params"
        params = checkpointer.restore_part(shapes, under=under)
        step = checkpointer.newest_sound()
    return config, params, step


def with_statistics(stage, config, params):
    """The VAE's settings with the mean and standard deviation of its latents.

    The standard deviation is that of the aggregate posterior: sqrt(E[variance] + Var[mean]), so
    that a channel which carries nothing is not blown up to unit variance.
    """
    source, steps = batches.make_source(config, stage)
    loader = loaders.make_loader(
        source,
        batch_size=8,
        seed=config.seed + 1,
        transforms=[*steps, stage.prepare],
        num_threads=2,
    )

    @jax.jit
    def moments(params, video):
        vae = nnx.merge(stage.graphdef, params)
        mean, logvar = vae.encode_moments(to_float(video))
        axes = (0, 1, 2, 3)
        square = jnp.square(mean) + jnp.exp(logvar)
        return jnp.mean(mean, axes), jnp.mean(square, axes)

    some = itertools.islice(loader, max(1, STATISTICS_CLIPS // 8))
    sums = [moments(params, batch["video"]) for batch in some]
    mean, square = (np.mean([np.asarray(s[i], np.float64) for s in sums], 0) for i in (0, 1))
    std = np.sqrt(square - mean**2)
    return dataclasses.replace(stage.config, latents_mean=mean.tolist(), latents_std=std.tolist())


def write_pipeline(out: Path, config, stage) -> None:
    """The pipeline's index, its scheduler, and our sampling defaults."""
    shape = (1, *shown.of_config(config)[:3], 3)
    tokens = stage.tokens_per_clip({"video": jax.ShapeDtypeStruct(shape, jnp.uint8)})
    write_index(
        out,
        shift=times.shift_for_tokens(tokens, stage.token_shift),
        expand_timesteps=_expands_timesteps(stage),
        pictures=stage.pictures is not None,
    )
    _write_sampling(out, config, stage)


def _expands_timesteps(stage) -> bool:
    """Whether a run's transformer takes a clean first frame as diffusers' TI2V pipelines give it.

    They count tokens of 2x2 latents.
    """
    fits = stage.pictures is None and tuple(stage.dit_config.patch_size) == (1, 2, 2)
    return fits and "first" in stage.tasks.recorded


def _write_sampling(out: Path, config, stage) -> None:
    frames, height, width, fps = shown.of_config(config)
    defaults = SamplingDefaults(
        width=width,
        height=height,
        frames=frames,
        fps=fps,
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        guidance_interval=config.sample.guidance_interval,
        past_guidance_interval=config.sample.get("past_guidance_interval", ()),
        guidance_rescale=config.sample.guidance_rescale,
        guidance_blocks=config.sample.get("guidance_blocks", ()),
        guidance_blocks_interval=config.sample.get("guidance_blocks_interval", (0.0, 1.0)),
        shift=stage.token_shift,
        solver=config.sample.solver,
        schedule=config.sample.schedule,
        text_tokens=config.text_tokens,
        tasks=stage.tasks.recorded,
        refine_prefix=config.sample.get("refine_prefix", ""),
        cache_threshold=config.sample.get("cache_threshold", 0.0),
    )
    folder.write_json(out / "sampling.json", dataclasses.asdict(defaults))


def write_index(
    out: Path,
    *,
    shift: float,
    expand_timesteps: bool = False,
    boundary_ratio: float | None = None,
    pictures: bool = False,
) -> None:
    """model_index.json and the scheduler's config, from which diffusers builds a WanPipeline.

    The tokenizer is already in its folder.

    Args:
      pictures: the transformer takes pictures as channels: a WanImageToVideoPipeline.
    """
    named = folder.read_json(out / "tokenizer" / "tokenizer_config.json")
    # Every tokenizer that is loaded here but the one of bytes, which names itself, is of T5's kind.
    tokenizer = named.get("tokenizer_class", "T5Tokenizer")
    transformer = ["diffusers", "WanTransformer3DModel"]
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "boundary_ratio": boundary_ratio,
        "expand_timesteps": expand_timesteps,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": transformer,
        "transformer_2": [None, None] if boundary_ratio is None else transformer,
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if pictures:
        image = (out / folder.COMPONENTS["image"].folder).is_dir()
        index |= {
            "_class_name": "WanImageToVideoPipeline",
            "image_encoder": ["transformers", "CLIPVisionModel"] if image else [None, None],
            "image_processor": ["transformers", "CLIPImageProcessor"] if image else [None, None],
        }
        if image:
            size = folder.read_config(out, "image").image_size
            processor = out / "image_processor" / "preprocessor_config.json"
            folder.write_json(processor, clip.processor_config(size))
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "solver_order": 2,
        "solver_type": "bh2",
        "prediction_type": "flow_prediction",
        "predict_x0": True,
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "lower_order_final": True,
    }
    folder.write_json(out / "model_index.json", index)
    folder.write_json(out / "scheduler" / "scheduler_config.json", scheduler)
