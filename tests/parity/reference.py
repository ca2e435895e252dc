"""A video by one of diffusers' pipelines from given noise, and what lay on its way."""

import numpy as np
import torch


def denoise(pipe, noise: np.ndarray, **arguments) -> tuple[np.ndarray, list[np.ndarray]]:
    """(frames in [0, 1], latents after every step); arrays are channels last."""
    pipe.set_progress_bar_config(disable=True)
    steps = []

    def keep(pipe, i, t, tensors):
        steps.append(tensors["latents"].numpy().transpose(0, 2, 3, 4, 1).copy())
        return tensors

    frames = pipe(
        latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
        output_type="np",
        callback_on_step_end=keep,
        **arguments,
    ).frames
    return frames[0], steps
