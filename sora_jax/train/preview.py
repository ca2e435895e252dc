"""What a training run shows of itself: generated or reconstructed clips as MP4 and PNG."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax import video_io
from sora_jax.diffusion import guidance, sampler, times
from sora_jax.generate import to_bytes
from sora_jax.train import shown

COLUMNS = 9  # frames shown of each clip on the sheet


def write(stage, config, params, frozen, batch, workdir: Path, *, step: int) -> None:
    """Writes `workdir/samples/<step>.mp4` and `.png` from the averaged weights `params`."""
    if stage.name == "vae":
        clips, labels = reconstructions(stage, params, batch)
    else:
        labels = list(config.sample.prompts)
        clips = generations(stage, config, params, frozen, labels)
    if jax.process_index() != 0:
        return
    fps = shown.of_config(config).fps
    folder = Path(workdir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / f"{step:07d}"
    sheet = video_io.contact_sheet(clips, columns=COLUMNS, labels=labels)
    video_io.save_image(base.with_suffix(".png"), sheet)
    video_io.write_video(base.with_suffix(".mp4"), video_io.tile_videos(clips), fps=fps)


def reconstructions(stage, params, batch) -> tuple[list[np.ndarray], list[str]]:
    """Pairs of original and reconstruction for up to four clips of the batch."""
    video = batch["video"][:4]
    recon, _ = jax.jit(stage.reconstruct)(params, video)
    clips, labels = [], []
    for original, made in zip(np.asarray(video), to_bytes(recon), strict=True):
        clips += [original, made]
        labels += ["original", "reconstruction"]
    return clips, labels


def generations(stage, config, params, frozen, prompts: list[str]) -> list[np.ndarray]:
    """One clip a prompt, with the sampling settings of the config and a fixed seed."""
    text_emb, mask = stage.text.of_prompts(params, frozen, [*prompts, *[""] * len(prompts)])
    frames, height, width, _ = shown.of_config(config)
    shape = stage.latent_shape(frames, height, width)
    shift = times.shift_for_tokens(stage.tokens_of(shape[:3]), stage.token_shift)
    table, told = times.schedule(config.sample.schedule, config.sample.steps, shift=shift)
    guide = guidance.of_config(config.sample)

    @jax.jit
    def run(params, frozen, text_emb, mask, noise):
        def velocity(x, t):
            apart = guidance.frames_apart(guide, t, rows=len(x))
            made = stage.velocity(params, text_emb, mask, frames_apart=apart)
            return made(x, jnp.full(x.shape[:1], t))

        guided = guidance.guided_velocity(velocity, config=guide)
        latents = sampler.sample(
            guided, noise, table, solver=config.sample.solver, model_times=told
        )
        return nnx.merge(stage.vae.graphdef, frozen["vae"]).decode(latents)

    noise = jax.random.normal(jax.random.key(0), (len(prompts), *shape))
    return list(to_bytes(run(params, frozen, text_emb, mask, noise)))
