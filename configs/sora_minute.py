"""One minute in one attention window: 60 s at 24 frames a second, 480p and 720p, by the 5B.

sora-jax data cache --data SET --checkpoint DIR --text --fps 24 --frames 1441 --out LATENTS
sora-jax train --config configs/sora_minute.py:480p --workdir runs/minute_480p \
    --config.init_from=runs/t2v_5b/export --config.vae_checkpoint=DIR \
    --config.text_checkpoint=DIR --config.data.path=LATENTS

It goes on from what configs/t2v_5b.py trained (`sora-jax convert export`), and 720p from 480p. DIR
is the published Wan 2.2 5B, for its VAE (4x16x16) and text encoder. SET is what `sora-jax data
build` made, of shots of a minute, at most 832x480 or 1280x704 and --config.resize.multiple=32.

1441 frames are 361 latent ones. At 480 x 832 pixels, 15 x 26 tokens each: 140,790 a clip, in rows
of 141,312. At 704 x 1280, 22 x 40: 317,680 a clip, in rows of 318,464. One clip a row; every
token sees every other. Rows divide by 1024, so that kernels' blocks do for every `context` here.

480p is for v5p:8x8x8: fsdp 32 x context 16. 720p is for v5p:8x8x16: fsdp 16 x context 64. The 24
heads go over 8 chips by all-to-all, the rest of `context` is a ring.

Variants: 480p (full is the same), 720p, and smoke.
"""

from configs import wan

SLICES = {"full": "v5p:8x8x8", "480p": "v5p:8x8x8", "720p": "v5p:8x8x16"}


def get_config(arg: str = "full"):
    if arg not in ("full", "480p", "720p", "smoke"):
        raise ValueError(f"sora_minute: unknown variant {arg!r}; use '480p', '720p' or 'smoke'.")
    c = wan.from_scratch("ti2v_5b")
    c.num_steps = 20_000
    c.optim.peak_lr = 3e-5
    c.data.frames = 1441
    c.data.pack.update(text_tokens=512, max_segments=1)
    if arg == "720p":
        c.batch_size, c.mesh.context = 16, 64
        c.data.pack.tokens = 318_464
    else:
        c.batch_size, c.mesh.context = 32, 16
        c.data.update(width=832, height=480)
        c.data.pack.tokens = 141_312
    # In the root of the number of tokens, from the 5B's own (Esser et al. 2024, section 5.3.2):
    # at equal noise, more tokens of one video tell more of it.
    c.diffusion.shift.update(tokens_lo=27_280, shift_lo=5.0, tokens_hi=317_680, shift_hi=17.0)
    c.checkpoint_every, c.sample_every = 250, 1000
    return (wan.shrunken(c) if arg == "smoke" else c).lock()
