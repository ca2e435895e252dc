"""Turns a training run into an inference folder that diffusers and `sora-jax sample` read."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from sora_jax.checkpoint import Checkpointer
from sora_jax.convert import folder
from sora_jax.convert.folder import SamplingDefaults
from sora_jax.data import loader as loaders
from sora_jax.data import sources
from sora_jax.diffusion import times
from sora_jax.text.tokenizer import ByteTokenizer
from sora_jax.train.loop import STAGES
from sora_jax.train.vae_stage import to_float

WEIGHTS = ("ema", "raw")
_DIFFUSERS_VERSION = "0.35.0"
STATISTICS_CLIPS = 256  # clips that the latents' mean and standard deviation are measured on


def export(
    run: str | Path, out: str | Path, *, weights: str = "ema", dtype: str = "float32"
) -> Path:
    """Writes the newest checkpoint of training run `run` as an inference folder `out`.

    A VAE run gives a folder that holds the VAE alone, its latent statistics measured on the
    run's own data; a DiT run gives a complete pipeline, its VAE copied from
    `config.vae_checkpoint`.

    Args:
      weights: "ema" or "raw".
      dtype: of the stored tensors, "float32", "bfloat16" or "float16".

    Raises:
      ValueError: `run` holds no checkpoint, or an unknown choice.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is unknown; use {' or '.join(WEIGHTS)}.")
    config, params = restore(run, weights)
    out = Path(out)
    stage = STAGES[config.stage](config)
    if config.stage == "vae":
        settings = with_statistics(stage, config, params["vae"])
        folder.save_component(out, "vae", settings, params["vae"], dtype=dtype)
        return out
    vae_config, _, vae_params = folder.load_component(Path(config.vae_checkpoint), "vae")
    folder.save_component(out, "vae", vae_config, vae_params, dtype=dtype)
    folder.save_component(out, "dit", stage.dit_config, params["dit"], dtype=dtype)
    folder.save_component(out, "text", stage.text_config, params["text"], dtype=dtype)
    ByteTokenizer().save(out / "tokenizer")
    write_pipeline(out, config, stage)
    return out


def restore(run: str | Path, weights: str):
    """(config, parameters) of the newest checkpoint of `run`.

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
        params = checkpointer.restore_part(shapes, under="ema" if weights == "ema" else "params")
    return config, params


def with_statistics(stage, config, params):
    """The VAE's settings with the mean and standard deviation of its latents.

    The standard deviation is that of the aggregate posterior: sqrt(E[variance] + Var[mean]), so
    that a channel which carries nothing is not blown up to unit variance.
    """
    source = sources.make_source(config.data)
    loader = loaders.make_loader(
        source, batch_size=8, seed=config.seed + 1, transforms=[stage.prepare], num_threads=2
    )

    @jax.jit
    def moments(params, video):
        vae = nnx.merge(stage.graphdef, params)
        mean, logvar = vae.encode_moments(to_float(video))
        axes = (0, 1, 2, 3)
        square = jnp.square(mean) + jnp.exp(logvar)
        return jnp.mean(mean, axes), jnp.mean(square, axes)

    batches = itertools.islice(loader, max(1, STATISTICS_CLIPS // 8))
    sums = [moments(params, batch["video"]) for batch in batches]
    mean, square = (np.mean([np.asarray(s[i], np.float64) for s in sums], 0) for i in (0, 1))
    std = np.sqrt(square - mean**2)
    return dataclasses.replace(stage.config, latents_mean=mean.tolist(), latents_std=std.tolist())


def write_pipeline(out: Path, config, stage) -> None:
    """The pipeline's index, its scheduler, and our sampling defaults."""
    defaults = SamplingDefaults(
        width=config.data.width,
        height=config.data.height,
        frames=config.data.frames,
        fps=config.data.fps,
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        guidance_interval=config.sample.guidance_interval,
        guidance_rescale=config.sample.guidance_rescale,
        shift=stage.token_shift,
        solver=config.sample.solver,
        text_tokens=config.text_tokens,
    )
    shape = (1, config.data.frames, config.data.height, config.data.width, 3)
    tokens = stage.tokens_per_clip({"video": jax.ShapeDtypeStruct(shape, jnp.uint8)})
    write_index(out, shift=times.shift_for_tokens(tokens, stage.token_shift))
    folder.write_json(out / "sampling.json", dataclasses.asdict(defaults))


def write_index(out: Path, *, shift: float) -> None:
    """model_index.json and the scheduler's config, from which diffusers builds a WanPipeline."""
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
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
