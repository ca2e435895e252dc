"""What Wan's published code does with each of its models, which their files do not tell.

From its configurations and `generate.py`: github.com/Wan-Video/Wan2.1 and Wan2.2.
"""

from typing import NamedTuple

from sora_jax.dit.config import DiTConfig
from sora_jax.vae.config import WAN22_MEAN, VAEConfig


class Family(NamedTuple):
    """Settings of one kind of model; sizes in pixels.

    `boundary_ratio` is the time at which the second of two transformers takes over;
    `expand_timesteps`: each token has a time of its own. `pictures`: it takes them as channels.
    """

    steps: int
    shift: float
    guidance: float = 5.0
    guidance_2: float | None = None
    boundary_ratio: float | None = None
    expand_timesteps: bool = False
    pictures: bool = False
    width: int = 832
    height: int = 480
    frames: int = 81
    fps: float = 16.0


T2V = Family(steps=50, shift=5.0)
I2V = Family(steps=40, shift=3.0, pictures=True)  # at 480p; 5 is for 720p
FLF2V = Family(steps=50, shift=16.0, pictures=True)
TI2V_5B = Family(
    **{"steps": 50, "shift": 5.0, "expand_timesteps": True},
    **{"width": 1280, "height": 704, "frames": 121, "fps": 24.0},
)
T2V_A14B = Family(steps=40, shift=12.0, guidance=4.0, guidance_2=3.0, boundary_ratio=0.875)
I2V_A14B = Family(
    **{"steps": 40, "shift": 5.0, "guidance": 3.5, "guidance_2": 3.5},
    **{"boundary_ratio": 0.9, "pictures": True},
)


def family(dit: DiTConfig, vae: VAEConfig, *, experts: bool) -> Family:
    """By the shapes of a transformer and its VAE, and whether there are two transformers."""
    pictures = dit.in_channels != vae.z_dim
    if experts:
        return I2V_A14B if pictures else T2V_A14B
    if pictures:
        return I2V if dit.image_positions is None else FLF2V
    # Only the 5B model's VAE has these channels, and only it takes a time for every token.
    return TI2V_5B if vae.z_dim == len(WAN22_MEAN) else T2V
