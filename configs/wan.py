"""The published Wan models at full size, for fine-tuning, planning and conversion.

sora-jax data cache --data SET --checkpoint DIR --text --fps 16 --frames 81 --out LATENTS
sora-jax train --config configs/wan.py:t2v_1.3b --config.init_from=DIR --workdir runs/wan \
    --config.vae_checkpoint=DIR --config.text_checkpoint=DIR --config.data.path=LATENTS

DIR is the checkpoint in diffusers layout, SET what `sora-jax data build` made. On clips encoded on
the way: --config.data.kind=folder --config.data.batching=fixed
--config.data.text_embeddings=False --config.data.path=CLIPS.

Variants: full (the first) and smoke; t2v_1.3b, t2v_14b, i2v_14b, flf2v_14b (Wan 2.1); ti2v_5b,
t2v_a14b, i2v_a14b (2.2; each expert of the last two has these sizes). Training is text to video:
the image-to-video variants are for loading, converting and counting.
"""

from configs import base

# Differences from the 14B text-to-video model.
VARIANTS = {
    "t2v_1.3b": {"depth": 30, "width": 1536, "num_heads": 12, "ffn_dim": 8960},
    "t2v_14b": {},
    "i2v_14b": {"in_channels": 36, "image_dim": 1280},
    "flf2v_14b": {"in_channels": 36, "image_dim": 1280, "image_positions": 514},
    "ti2v_5b": {"depth": 30, "width": 3072, "num_heads": 24, "ffn_dim": 14336},
    "t2v_a14b": {},
    "i2v_a14b": {"in_channels": 36},
}
SHIFT = {"t2v_1.3b": 3.0, "t2v_a14b": 12.0}  # that the weights are published with; else 5


def get_config(arg: str = "full"):
    smoke = arg == "smoke"
    arg = "t2v_1.3b" if arg in ("full", "smoke") else arg
    if arg not in VARIANTS:
        raise ValueError(
            f"wan: unknown variant {arg!r}; use one of {', '.join(VARIANTS)}, or smoke."
        )
    c = base.get_config()
    c.num_steps, c.batch_size = 2000, 8
    c.data.kind, c.data.text_embeddings = "latents", True  # give them with --config.data.path=DIR
    c.data.batching = "pack"
    c.data.pack.update(tokens=32_768, text_tokens=2048, max_segments=16)  # one clip of 81 frames
    c.data.update(width=832, height=480, frames=81, fps=16.0)
    c.text.update(vocab_size=256384, width=4096, head_dim=64, mlp_dim=10240, depth=24, num_heads=64)
    c.text.dtype = c.dit.dtype = c.vae.dtype = "bfloat16"
    c.text_tokens = 512
    c.dit.update(depth=40, width=5120, num_heads=40, ffn_dim=13824, remat="full")
    c.dit.update(VARIANTS[arg])
    if arg == "ti2v_5b":
        c.vae.update(base_dim=160, decoder_base_dim=256, z_dim=48, patch_size=2, is_residual=True)
        c.data.update(width=1280, height=704, frames=121, fps=24.0)
    shift = SHIFT.get(arg, 5.0)
    c.diffusion.shift.update(shift_lo=shift, shift_hi=shift)
    c.optim.update(peak_lr=1e-5, weight_decay=0.01)
    c.sample.update(steps=50, guidance=5.0, prompts=("a cat walks on the grass, realistic",))
    if smoke:  # the 1.3B's shape in small, on a VAE given as for the others
        c.num_steps, c.batch_size = 4, 8
        c.data.update(kind="folder", text_embeddings=False, batching="fixed")
        c.data.update(width=64, height=64, frames=5)
        c.text.update(vocab_size=384, width=32, head_dim=16, mlp_dim=32, depth=1, num_heads=2)
        c.text.dtype = c.dit.dtype = c.vae.dtype = "float32"
        c.text_tokens = 64
        c.dit.update(depth=2, width=64, num_heads=2, ffn_dim=96, remat="none")
        c.vae.update(base_dim=8)
        c.sample.update(steps=2)
        c.log_every, c.checkpoint_every, c.sample_every = 1, 2, 4
    return c.lock()
