"""Writes tests/goldens/vae_*.npz: tiny random VAEs of diffusers, with inputs and outputs.

Run in an environment with the `parity` extra: python tools/make_goldens_vae.py
"""

import json
import pathlib

import numpy as np
import torch
from diffusers import AutoencoderKLWan

GOLDENS = pathlib.Path(__file__).parents[1] / "tests" / "goldens"

# Every stage of each kind, at widths that keep the files small.
CONFIGS = {
    "wan21": {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    },
    "wan22": {
        "base_dim": 3,
        "decoder_base_dim": 4,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
    "small": {
        "base_dim": 4,
        "decoder_base_dim": 6,
        "z_dim": 8,
        "dim_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "latents_mean": [0.1 * i - 0.3 for i in range(8)],
        "latents_std": [1.0 + 0.1 * i for i in range(8)],
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
    },
}
VIDEO = {"wan21": (9, 16, 24), "wan22": (13, 32, 16), "small": (9, 16, 24)}


# The published sizes, of which only names and shapes are kept.
def make(name: str) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in vae.parameters():  # norms and biases away from 1 and 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    frames, height, width = VIDEO[name]
    video = torch.rand(2, 3, frames, height, width) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(video).latent_dist
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        latents = torch.randn_like(posterior.mean)
        decoded = vae.decode(latents * std + mean).sample

    def last(x):
        return x.permute(0, 2, 3, 4, 1).contiguous().numpy()

    arrays = {f"param/{key}": value.numpy() for key, value in vae.state_dict().items()}
    np.savez_compressed(
        GOLDENS / f"vae_{name}.npz",
        config=json.dumps(dict(vae.config)),
        video=last(video),
        mean=last(posterior.mean),
        logvar=last(posterior.logvar),
        latents=last(latents),
        decoded=last(decoded),
        **arrays,
    )
    share = (decoded.abs() >= 1).float().mean().item()
    print(f"{name}: decoded std {decoded.std():.3f}, clamped {share:.3f}")


if __name__ == "__main__":
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for config_name in CONFIGS:
        make(config_name)
