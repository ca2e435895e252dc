"""The patch VAE of the shipped Paperworld model: 2x8x8, 16 channels, for 64x64 clips.

It learns from single images first, which cost a frame each, then from short clips:

sora-jax train --config configs/paperworld_vae.py:images --workdir runs/vae_images
sora-jax convert export --checkpoint runs/vae_images --out runs/vae_images/export
sora-jax train --config configs/paperworld_vae.py --workdir runs/vae \
    --config.init_from=runs/vae_images/export

Variants: images; full, windows of clips; wide, whole clips with twice the channels, from what
tools/widen.py made of the weights of full, which is what is shipped; smoke, seconds.
"""

from configs import base


def get_config(arg: str = "full"):
    c = base.get_config()
    c.stage = "vae"
    # Patches of 4 keep the costly first level at 16x16.
    c.vae.update(
        base_dim=32,
        decoder_base_dim=48,
        z_dim=16,
        dim_mult=(1, 2),
        num_res_blocks=1,
        temporal_downsample=(True,),
        patch_size=4,
    )
    c.optim.update(name="muon", peak_lr=3e-3, warmup_steps=20, ema_decay=0.995, final_lr=0.01)
    c.vae_loss.update(kl=1e-4)
    c.log_every, c.sample_every, c.checkpoint_every = 20, 250, 250
    if arg == "images":
        c.num_steps, c.batch_size = 2000, 32
        c.data.frames = 1
        c.vae_loss.update(crop=(1, 64, 64))
    elif arg == "wide":
        # Whole clips, as they are decoded later; three quarters of the error are at edges, of which
        # the mean square counts the far ones.
        c.num_steps, c.batch_size = 4000, 32
        c.init_from = "runs/wide"
        c.vae.update(base_dim=64, decoder_base_dim=96, dtype="bfloat16")
        c.vae_loss.update(l2=4.0, crop=(17, 64, 64), crops=1)
        c.optim.update(peak_lr=2e-3, warmup_steps=300)
    else:
        c.num_steps, c.batch_size = 2000, 4
        # Small windows from many clips teach more a second than whole clips.
        c.vae_loss.update(crop=(9, 32, 32), crops=4)
    if arg == "smoke":
        c.num_steps, c.batch_size = 4, 8
        c.data.frames = 5
        c.vae.update(base_dim=8, decoder_base_dim=8)
        c.vae_loss.update(crop=(5, 32, 32), crops=1)
        c.log_every, c.checkpoint_every, c.sample_every = 1, 2, 4
    elif arg not in ("full", "images", "wide"):
        raise ValueError(
            f"paperworld_vae: unknown variant {arg!r}; use 'images', 'full', 'wide' or 'smoke'."
        )
    return c.lock()
