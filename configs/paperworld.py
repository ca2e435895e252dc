"""The shipped Paperworld model: an 8-layer DiT of width 256, text from words.

sora-jax train --config configs/paperworld.py --workdir runs/paperworld \
    --config.vae_checkpoint=runs/vae/export

Variants: full, clips of one size; packed, images and such clips in shared rows; tasks, these
with every mask, more cuts and collisions, clips that begin late, and parts of larger pictures;
turning, these with more of what is small or turns; fine, which is shipped, the same with tokens of
8x8 pixels, 576 a clip where the others have 144, and MLPs half as wide again, from what
tools/halve_patches.py and tools/widen.py made of their weights; mixed, other durations and shapes
too; smoke, seconds.
"""

from ml_collections import ConfigDict

from configs import base
from sora_jax.data.paperworld.captions import NEAR


def get_config(arg: str = "full"):
    c = base.get_config()
    c.num_steps, c.batch_size = 12_000, 16
    c.vae_checkpoint = "paperworld"
    c.data.cache, c.data.cache_clips = "runs/paperworld_latents", 20_000
    # A word is one token: over bytes the encoder had not told the eight shapes apart after 3,000
    # steps. The longest caption has 43.
    c.tokenizer, c.text_tokens = "paperworld", 48
    c.text.update(vocab_size=256, width=192, head_dim=48, mlp_dim=512, depth=4, num_heads=4)
    c.text.dtype = "bfloat16"
    c.dit.update(depth=8, width=256, num_heads=4, ffn_dim=1024, dtype="bfloat16")
    # Recomputing is faster here than moving stacked activations through memory, on CPUs too.
    c.dit.remat, c.text.remat = "full", True
    # What a prompt decides is decided above t = 0.9; below, the noisy latents themselves tell the
    # place. Without the shift the text was hardly used: docs/training.md.
    c.diffusion.shift.update(shift_lo=5.0, shift_hi=5.0)
    c.diffusion.std = 1.5
    c.optim.update(name="muon", peak_lr=3e-3, warmup_steps=200, final_lr=0.02, ema_decay=0.999)
    c.sample.update(steps=24, guidance=3.5, past_guidance_interval=(0.2, 1.0))
    c.sample.prompts = (
        "a red ball rolls left in the meadow",
        "a yellow bird flies right at night",
        "a blue fish bounces by the sea",
        "a large green box slides right in the snow",
        "a pink star spins in the desert",
        "a purple heart hides behind a wall and comes out again in the city",
        "a black tree falls in the forest",
        "a small orange boat stays still in the meadow",
    )
    c.sample_every, c.checkpoint_every = 500, 250
    with_tasks = arg in ("tasks", "turning", "fine")
    if arg in ("packed", "mixed") or with_tasks:
        # Images and clips share rows of two clips' length: a drawing is learned from images, which
        # cost a ninth, and motion from clips. Nine images have the tokens of a clip.
        c.batch_size = 8
        c.data.batching, c.data.pack_weight, c.data.cache = "pack", "token", ""
        c.data.pack.update(tokens=288, text_tokens=256, max_segments=18, look_ahead=64)
        sizes = {"images": (9, 64, 64, 1, 40_000), "clips": (1, 64, 64, 17, 20_000)}
        if arg == "mixed":  # durations and shapes too
            sizes["short"] = (0.5, 64, 64, 9, 5_000)
            sizes["wide"] = (0.5, 96, 64, 9, 5_000)
            sizes["tall"] = (0.5, 64, 96, 9, 5_000)
        elif with_tasks:
            sizes["shots"] = (0.25, 64, 64, 17, 4_000)
            sizes["late"] = (0.25, 64, 64, 17, 4_000)
            sizes["hits"] = (0.15, 64, 64, 17, 3_000)
            sizes["near"] = (0.15, 64, 64, 17, 3_000)
        if arg in ("turning", "fine"):
            # Of what was drawn wrong most was small or turned: shapes of small ones were read right
            # in .47, of spinning ones in .38, of large ones in .89.
            sizes["turns"] = (1, 64, 64, 17, 6_000)
            sizes["drawings"] = (9, 64, 64, 1, 20_000)
        if arg == "fine":
            shares = {"images": 7, "drawings": 6, "shots": 1, "clips": 0.6, "turns": 0.6}
            shares |= {"late": 0.35, "hits": 0.3, "near": 0.1}
            sizes = {name: (shares[name], *size[1:]) for name, size in sizes.items()}
        for name, (weight, width, height, frames, clips) in sizes.items():
            part = {"weight": weight, "width": width, "height": height, "frames": frames}
            part |= {"cache": f"runs/paperworld_{name}", "cache_clips": clips}
            c.data.parts[name] = ConfigDict(part)
        if arg in ("turning", "fine"):
            several = {"multi_shot": 0.0, "collisions": 0.0, "companions": 0.0}
            for name in ("turns", "drawings"):
                c.data.parts[name].world = ConfigDict({"turning": 0.6, "small": 0.6, **several})
        if with_tasks:
            c.data.parts.shots.world = ConfigDict(
                # Without stamps the order of the places was not read: docs/status.md.
                {"multi_shot": 1.0, "collisions": 0.0, "companions": 0.0, "time_stamps": 0.5}
            )
            c.data.parts.late.world = ConfigDict({"late": 1.0, "collisions": 0.0})
            c.data.parts.hits.world = ConfigDict(
                {"collisions": 1.0, "multi_shot": 0.0, "companions": 0.0}
            )
            c.data.parts.near.world = ConfigDict({"near": 1.0})
            c.sample.refine_prefix = NEAR
            c.tasks.weights = ConfigDict(
                {
                    **{"none": 0.4, "first": 0.1, "first_last": 0.05, "keyframes": 0.05},
                    **{"prefix": 0.1, "suffix": 0.06, "middle": 0.05, "loop": 0.04},
                    **{"box": 0.05, "border": 0.05, "tokens": 0.05},
                }
            )
            c.tasks.given_noise, c.tasks.frame_noise = 0.1, 0.1
        if arg == "fine":
            c.init_from = "runs/halved"
            c.dit.patch_size, c.dit.ffn_dim = (1, 1, 1), 1536
            c.batch_size, c.num_steps = 4, 4300
            c.data.pack.update(tokens=576, max_segments=9)
            c.tasks.weights.none = 0.5
            # Outlines are drawn wrong between t = .75 and .3; what a prompt decides is known.
            c.diffusion.shift.update(shift_lo=3.0, shift_hi=3.0)
            c.optim.update(warmup_steps=100, ema_decay=0.998)
    elif arg == "smoke":
        c.num_steps, c.batch_size = 4, 8
        c.data.frames, c.data.cache = 5, ""
        c.text.update(width=32, head_dim=16, mlp_dim=32, depth=1, num_heads=2, dtype="float32")
        c.dit.update(depth=2, width=32, num_heads=2, ffn_dim=64, dtype="float32")
        c.sample.update(steps=2, prompts=c.sample.prompts[:2])
        c.log_every, c.checkpoint_every, c.sample_every = 1, 2, 4
    elif arg != "full":
        raise ValueError(
            f"paperworld: unknown variant {arg!r}; use 'full', 'packed', 'tasks', 'turning', "
            "'fine', 'mixed' or 'smoke'."
        )
    return c.lock()
