"""Pre-training the 5B on the 48-channel VAE from scratch: 704x1280, 121 frames at 24 a second.

sora-jax data cache --data SET --checkpoint DIR --text --fps 24 --frames 121 --out LATENTS
sora-jax train --config configs/t2v_5b.py --workdir runs/t2v_5b \
    --config.vae_checkpoint=DIR --config.text_checkpoint=DIR --config.data.path=LATENTS

DIR holds the VAE (4x16x16, 48 channels) and the text encoder, in diffusers layout: the published
Wan 2.2 5B, of which nothing else is used. SET is what `sora-jax data build` made, at most 1280x704
and --config.resize.multiple=32, the side of a token.

121 frames are 31 latent ones, 704 x 1280 pixels 22 x 40 tokens: 27,280 a clip, in rows of 27,648.
64 rows a step are 1.8 M tokens.

For v5p:4x4x8: fsdp 64 x context 2, two chips a row. On tpu7x a chip is two devices: the same 128
devices are tpu7x:4x4x4. On v6e:16x16: --config.mesh.context=4.

Variants: full and smoke.
"""

from configs import wan

SLICES = {"full": "v5p:4x4x8"}


def get_config(arg: str = "full"):
    c = wan.from_scratch("ti2v_5b")
    c.batch_size = 64
    c.dit.remat = "attention_out"
    return wan.choose(c, arg, name="t2v_5b")
