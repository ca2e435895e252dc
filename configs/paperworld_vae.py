"""The patch VAE of the shipped Paperworld model: 4x16x16, 32 channels, for 64x64 clips.

sora-jax train --config configs/paperworld_vae.py --workdir runs/paperworld_vae
"""

from configs import base


def get_config(arg: str = "full"):
    c = base.get_config()
    c.stage = "vae"
    c.num_steps = 6000
    c.batch_size = 4
    # Patches of 4 keep the costly first level at 16x16; residual shortcuts learn fast.
    c.vae.update(
        base_dim=32,
        decoder_base_dim=48,
        z_dim=32,
        dim_mult=(1, 2, 2),
        num_res_blocks=1,
        temporal_downsample=(True, True),
        patch_size=4,
        is_residual=True,
    )
    # Small windows from many clips teach more a second than whole clips.
    c.vae_loss.update(crop=(9, 32, 32), crops=4, kl=2e-3)
    c.optim.update(peak_lr=2e-3, warmup_steps=100, ema_decay=0.998, final_lr=0.02)
    c.log_every = 20
    c.sample_every = 500
    c.checkpoint_every = 500
    if arg == "smoke":
        c.num_steps, c.batch_size = 4, 8
        c.data.frames = 5
        c.vae.update(base_dim=8, decoder_base_dim=8)
        c.vae_loss.update(crop=(5, 32, 32), crops=1)
        c.log_every, c.checkpoint_every = 1, 2
        c.sample_every = 0
    elif arg != "full":
        raise ValueError(f"paperworld_vae: unknown variant {arg!r}; use 'full' or 'smoke'.")
    return c.lock()
