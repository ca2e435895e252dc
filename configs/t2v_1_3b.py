"""Pre-training the 1.3B from scratch: text to video at 480p, 81 frames at 16 frames a second.

sora-jax data cache --data SET --checkpoint DIR --text --fps 16 --frames 81 --out LATENTS
sora-jax train --config configs/t2v_1_3b.py --workdir runs/t2v_1_3b \
    --config.vae_checkpoint=DIR --config.text_checkpoint=DIR --config.data.path=LATENTS

DIR holds the VAE (4x8x8, 16 channels) and the text encoder, in diffusers layout: a published Wan
2.1, of which nothing else is used. SET is what `sora-jax data build` made, at most 832x480.

81 frames are 21 latent ones, 480 x 832 pixels 30 x 52 tokens: 32,760 a clip, in rows of 32,768
which shorter clips and images fill up. 128 rows a step are 4.2 M tokens.

For v6e:16x16: data 2 x fsdp 64 x context 2, two chips a row; of a width of 1536 more parts than 64
would be less than a tile's rows. On another slice keep `context`, set --config.mesh.data=1 and
--config.batch_size to a multiple of chips / 2.

Variants: full and smoke.
"""

from configs import wan

SLICES = {"full": "v6e:16x16"}


def get_config(arg: str = "full"):
    c = wan.from_scratch("t2v_1.3b")
    c.mesh.update(data=2, context=2)
    c.batch_size = 128
    return wan.choose(c, arg, name="t2v_1_3b")
