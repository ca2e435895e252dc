"""Pre-training the 14B from scratch: text to video at 720p, 81 frames at 16 frames a second.

sora-jax data cache --data SET --checkpoint DIR --text --fps 16 --frames 81 --out LATENTS
sora-jax train --config configs/t2v_14b.py --workdir runs/t2v_14b \
    --config.vae_checkpoint=DIR --config.text_checkpoint=DIR --config.data.path=LATENTS

DIR holds the VAE (4x8x8, 16 channels) and the text encoder, in diffusers layout: a published Wan
2.1, of which nothing else is used. SET is what `sora-jax data build` made, at most 1280x720. To
720p by way of images and smaller clips: configs/staged.py.

81 frames are 21 latent ones, 720 x 1280 pixels 45 x 80 tokens: 75,600 a clip, in rows of 75,776.
64 rows a step are 4.8 M tokens.

For v5p:8x8x8: fsdp 64 x context 8, eight chips a row with five of the 40 heads each. On tpu7x a
chip is two devices: the same 512 devices are tpu7x:4x8x8.

Variants: full and smoke.
"""

from configs import wan

SLICES = {"full": "v5p:8x8x8"}


def get_config(arg: str = "full"):
    c = wan.from_scratch("t2v_14b")
    c.mesh.context = 8
    c.batch_size = 64
    c.data.update(width=1280, height=720)
    c.data.pack.tokens = 75_776
    c.dit.remat = "attention_out"
    return wan.choose(c, arg, name="t2v_14b")
