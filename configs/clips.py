"""A set that `sora-jax data build` made, packed at its own sizes, durations and shapes.

sora-jax data build --input VIDEOS --out runs/set
sora-jax data cache --data runs/set --checkpoint paperworld --out runs/latents
sora-jax train --config configs/clips.py --workdir runs/mine --config.data.path=runs/latents

The sizes are those of the Paperworld recipe, so that two cores can try it; for more, raise
dit.depth and dit.width, and take the VAE of a public checkpoint (vae_checkpoint).
"""

from configs import paperworld


def get_config(arg: str = "full"):
    if arg not in ("full", "smoke"):
        raise ValueError(f"clips: unknown variant {arg!r}; use 'full' or 'smoke'.")
    c = paperworld.get_config(arg).unlock()
    c.data.kind, c.data.cache = "latents", ""
    c.data.path = ""  # give it with --config.data.path=DIR
    c.data.batching = "pack"
    # Words of any captions: bytes; tools/train_tokenizer.py makes a smaller vocabulary of them.
    c.tokenizer, c.text_tokens, c.text.vocab_size = "", 224, 384
    c.batch_size = 8  # rows
    c.data.pack.update(tokens=1024, text_tokens=512, max_segments=8)
    # Longer and larger clips need more noise: a line in the root of their number of tokens.
    c.diffusion.shift.update(tokens_lo=256, shift_lo=3.0, tokens_hi=4096, shift_hi=7.0)
    if arg == "smoke":
        c.data.pack.update(tokens=256, text_tokens=256, max_segments=4)
    return c.lock()
