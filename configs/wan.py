"""The published Wan models at full size, for fine-tuning, planning and conversion.

sora-jax data cache --data SET --checkpoint DIR --text --fps 16 --frames 81 --out LATENTS
sora-jax train --config configs/wan.py:t2v_1.3b --config.init_from=DIR --workdir runs/wan \
    --config.vae_checkpoint=DIR --config.text_checkpoint=DIR --config.data.path=LATENTS

DIR is the checkpoint in diffusers layout, SET what `sora-jax data build` made. On clips encoded on
the way: --config.data.kind=folder --config.data.batching=fixed
--config.data.text_embeddings=False --config.data.path=CLIPS.

Variants: full (the first) and smoke; t2v_1.3b, t2v_14b, i2v_14b, flf2v_14b (Wan 2.1); ti2v_5b,
t2v_a14b, i2v_a14b (2.2; each expert of the last two has these sizes). ti2v_5b is given the first
frame in half of the examples. The image-to-video variants read pixels, or with data.kind=latents
what `data cache --pictures first` made, packed as well (docs/training.md); those of Wan 2.1 need
the image encoder of --config.image_checkpoint=DIR. flf2v_14b is given the first and last frame.

A row holds a clip: 81 frames of 832x480 are 21 x 30 x 52 = 32,760 tokens, and of the 5B, whose VAE
folds 16x16 pixels, 121 of 1280x704 are 31 x 22 x 40 = 27,280. Slices and meshes: SLICES and
CONTEXT below; `fsdp` takes the chips that `context` leaves.
"""

from ml_collections import ConfigDict

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
# What each fine-tunes on, as `sora-jax plan --topology` names it.
SLICES = {
    "full": "v6e:2x4",
    "t2v_1.3b": "v6e:2x4",
    "ti2v_5b": "v5p:2x2x4",
    **dict.fromkeys(("t2v_14b", "i2v_14b", "flf2v_14b", "t2v_a14b", "i2v_a14b"), "v5p:4x4x4"),
}
CONTEXT = {"t2v_1.3b": 1, "ti2v_5b": 2}  # chips that share a row; else 4


def get_config(arg: str = "full"):
    smoke = arg == "smoke"
    arg = "t2v_1.3b" if arg in ("full", "smoke") else arg
    if arg not in VARIANTS:
        raise ValueError(
            f"wan: unknown variant {arg!r}; use one of {', '.join(VARIANTS)}, or smoke."
        )
    c = base.get_config()
    c.num_steps, c.batch_size = 2000, 8
    c.mesh.context = CONTEXT.get(arg, 4)
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
        c.data.pack.tokens = 27_648
    elif arg != "t2v_1.3b":
        c.batch_size = 16
    if arg == "ti2v_5b":
        c.tasks.weights = ConfigDict({"none": 0.5, "first": 0.5})
    elif arg.startswith(("i2v", "flf2v")):
        given = "first_last" if arg == "flf2v_14b" else "first"
        c.tasks.weights = ConfigDict({given: 1.0})
        c.data.kind, c.data.text_embeddings, c.data.batching = "folder", False, "fixed"
        c.sample_every = 0
    shift = SHIFT.get(arg, 5.0)
    c.diffusion.shift.update(shift_lo=shift, shift_hi=shift)
    c.optim.update(peak_lr=1e-5, weight_decay=0.01)
    c.sample.update(steps=50, guidance=5.0, prompts=("a cat walks on the grass, realistic",))
    return (shrunken(c) if smoke else c).lock()


def from_scratch(variant: str) -> ConfigDict:
    """Settings that the pre-training runs share, at the sizes of one of VARIANTS; unlocked."""
    c = get_config(variant).unlock()
    c.tasks.weights = ConfigDict({"none": 1.0})
    c.num_steps = 300_000
    c.optim.update(peak_lr=1e-4, warmup_steps=2000, final_lr=0.1, b2=0.95, ema_decay=0.9999)
    # One bad step in months ends no run. A gradient ten times the usual is left out: clipped it
    # would still point where one odd example does.
    c.skip.update(in_row=3, grad_norm=10.0)
    c.log_every, c.checkpoint_every, c.sample_every = 50, 1000, 5000
    return c


def choose(c: ConfigDict, arg: str, *, name: str) -> ConfigDict:
    """`c`, or its twin, for a file of the two variants full and smoke; locked.

    Raises:
      ValueError: another variant.
    """
    if arg not in ("full", "smoke"):
        raise ValueError(f"{name}: unknown variant {arg!r}; use 'full' or 'smoke'.")
    return (shrunken(c) if arg == "smoke" else c).lock()


def shrunken(c: ConfigDict) -> ConfigDict:
    """The twin of `c` that one CPU trains in seconds: as it is batched, shifted and optimised.

    On Paperworld, encoded on the way by the shipped VAE, with a text encoder of its own: it needs
    no files. 5 frames of 64x64 are 3 x 4 x 4 = 48 tokens.
    """
    c.num_steps, c.batch_size = 4, 8
    c.mesh.update(data=1, fsdp=-1, tensor=1, context=1)
    c.vae_checkpoint, c.text_checkpoint = "paperworld", ""
    c.data.update(kind="paperworld", path="", text_embeddings=False)
    c.data.update(width=64, height=64, frames=5, fps=8.0)
    c.data.pack.update(tokens=96, text_tokens=448, max_segments=min(c.data.pack.max_segments, 6))
    for part in c.data.parts.values():
        part.update(kind="paperworld", path="", width=64, height=64)
        part.frames = 1 if part.frames == 1 else 5
    c.vae.update(base_dim=32, decoder_base_dim=48, z_dim=16, dim_mult=(1, 2), num_res_blocks=1)
    c.vae.update(temporal_downsample=(True,), patch_size=4, is_residual=False, dtype="float32")
    c.text.update(vocab_size=384, width=32, head_dim=16, mlp_dim=32, depth=1, num_heads=2)
    c.dit.update(depth=2, width=32, num_heads=2, ffn_dim=64)
    c.text.dtype = c.dit.dtype = "float32"
    c.text_tokens = 224
    c.sample.update(steps=2)
    c.log_every, c.checkpoint_every, c.sample_every = 1, 2, 4
    return c
