"""The 14B from scratch in four stages: images, then video at 256, 480 and 720 lines.

for size in 256 480 720: a set of that size by `sora-jax data build` (resize.max_pixels 65536,
399360, 921600), of images and of clips; then of each
sora-jax data cache --data SET --checkpoint DIR --text --fps 16 --frames 81 --out LATENTS

sora-jax train --config configs/staged.py:stage1 --workdir runs/stage1 FOLDERS
sora-jax convert export --checkpoint runs/stage1 --out runs/stage1/export
sora-jax train --config configs/staged.py:stage2 --workdir runs/stage2 FOLDERS \
    --config.init_from=runs/stage1/export

and so on to stage4; docs/pods.md has all of it. FOLDERS are --config.vae_checkpoint=DIR
--config.text_checkpoint=DIR and the latents of each part, --config.data.parts.images_256.path=...
DIR is a published Wan 2.1, for its VAE (4x8x8) and text encoder.

Stages differ in what they pack into rows, not in the model. Tokens of an image and of a clip of 81
frames (21 latent ones): 256 and 5,376 at 256x256; 1,560 and 32,760 at 832x480; 3,600 and 75,600 at
1280x720. A row holds: stage1, 16 images of 256; stage2, two clips of 256 and two images; stage3, a
clip of 480 or six of 256, or 21 images; stage4, a clip of 720, or two of 480 and two images.

All for v5p:8x8x8, so that one slice serves the whole recipe: fsdp 512, 512, 256 and 64, and
`context` the rest. Tokens a step: 2.1 M, 5.8 M, 8.4 M and 4.8 M.

Variants: stage1 (full is the same) to stage4; smoke, the twin of stage2, which has both kinds.
"""

from ml_collections import ConfigDict

from configs import wan

STAGES = ("stage1", "stage2", "stage3", "stage4")
SLICES = dict.fromkeys(("full", *STAGES), "v5p:8x8x8")
# Lines of a part: width and height of its largest pictures.
SIZES = {256: (256, 256), 480: (832, 480), 720: (1280, 720)}
# Parts of a stage, and their shares of the records.
PARTS = {
    "stage1": {"images_256": 1.0},
    "stage2": {"images_256": 0.5, "clips_256": 0.5},
    "stage3": {"images_480": 0.4, "clips_256": 0.2, "clips_480": 0.4},
    "stage4": {"images_720": 0.3, "clips_480": 0.2, "clips_720": 0.5},
}
# Stage: tokens a row, its clips and images at most, rows a step, chips a row, steps, peak rate.
BUDGETS = {
    "stage1": (4_096, 32, 512, 1, 200_000, 1e-4),
    "stage2": (11_264, 24, 512, 1, 100_000, 1e-4),
    "stage3": (32_768, 24, 256, 2, 50_000, 5e-5),
    "stage4": (75_776, 24, 64, 8, 30_000, 2e-5),
}


def get_config(arg: str = "full"):
    stage = {"full": "stage1", "smoke": "stage2"}.get(arg, arg)
    if stage not in STAGES:
        raise ValueError(f"staged: unknown variant {arg!r}; use 'stage1' to 'stage4', or 'smoke'.")
    c = wan.from_scratch("t2v_14b")
    tokens, segments, rows, chips, c.num_steps, c.optim.peak_lr = BUDGETS[stage]
    c.batch_size, c.mesh.context = rows, chips
    c.data.pack.update(tokens=tokens, text_tokens=256 * segments, max_segments=segments)
    # Less is computed again than with "full", with which a compiler's check fails in stage3.
    c.dit.remat = "attention_out"
    # A clip among images is one example and many tokens: by tokens, both are learned from.
    c.data.pack_weight = "token"
    for name, weight in PARTS[stage].items():
        kind, lines = name.split("_")
        width, height = SIZES[int(lines)]
        part = {"weight": weight, "kind": "latents", "path": "", "width": width, "height": height}
        c.data.parts[name] = ConfigDict(part | {"frames": 1 if kind == "images" else 81})
    c.data.update(width=width, height=height, frames=part_frames(c))
    # In the root of the number of tokens: an image of 256 lines is at 1, a clip of 720 at 5.
    c.diffusion.shift.update(tokens_lo=256, shift_lo=1.0, tokens_hi=75_600, shift_hi=5.0)
    return (wan.shrunken(c) if arg == "smoke" else c).lock()


def part_frames(c: ConfigDict) -> int:
    """Of the stage's longest clips."""
    return max(part.frames for part in c.data.parts.values())
