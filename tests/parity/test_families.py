"""Every family of Wan's pipelines against diffusers, on tiny random weights: `make parity`.

diffusers writes each folder; `sora_jax.load` reads it, tells the family from its configs alone, and
denoises from the same noise: equal latents after every step, and equal frames.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

import sora_jax
from tests.parity import reference

PROMPT, NEGATIVE = "a red ball rolls left", "blurry"
FRAMES, STEPS, GUIDANCE, SHIFT = 9, 4, 3.0, 3.0
IMAGE_SIZE, PATCH = 28, 14  # of the image encoder: 5 rows of features a picture


class Family(NamedTuple):
    """What tells one of Wan's families from another."""

    pictures: int = 0
    clip: bool = False
    boundary: float | None = None
    expand: bool = False

    @property
    def size(self) -> tuple[int, int]:  # height, width: cells of 16 or 32 pixels
        return (64, 96) if self.expand else (32, 48)


FAMILIES = {
    "t2v": Family(),
    "i2v": Family(pictures=1, clip=True),
    "flf2v": Family(pictures=2, clip=True),
    "ti2v_5b_text": Family(expand=True),
    "ti2v_5b_image": Family(expand=True, pictures=1),
    "t2v_a14b": Family(boundary=0.875),
    "i2v_a14b": Family(boundary=0.9, pictures=1),
    "flf2v_a14b": Family(boundary=0.9, pictures=2),
}


def shaken(model):
    """`model` in evaluation mode, every parameter moved, so that none is zero or one."""
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return model.eval()


def make_vae(family: Family):
    wan22 = {
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "is_residual": True,
        "decoder_base_dim": 6,
        "scale_factor_spatial": 16,
        "latents_mean": np.linspace(-0.3, 0.3, 8).tolist(),
        "latents_std": np.linspace(0.8, 1.2, 8).tolist(),
    }
    vae = shaken(
        AutoencoderKLWan(
            base_dim=4,
            z_dim=8 if family.expand else 16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            **(wan22 if family.expand else {}),
        )
    )
    # A random decoder's frames reach far beyond [-1, 1], and differ by 2e-4 from equal latents in
    # two programs that round differently; a trained one's fill the range.
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.1)
    return vae


def make_transformer(family: Family):
    latent = 8 if family.expand else 16
    by_channels = family.pictures and not family.expand
    rows = 1 + (IMAGE_SIZE // PATCH) ** 2
    return shaken(
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=2 * latent + 4 if by_channels else latent,
            out_channels=latent,
            text_dim=32,
            freq_dim=32,
            ffn_dim=40,
            num_layers=2,
            image_dim=16 if family.clip else None,
            added_kv_proj_dim=24 if family.clip else None,
            pos_embed_seq_len=2 * rows if family.clip and family.pictures == 2 else None,
            rope_max_seq_len=32,
        )
    )


def make_pipeline(family: Family, scheduler):
    torch.manual_seed(0)
    text = UMT5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    parts = {
        "tokenizer": ByT5Tokenizer(),
        "text_encoder": shaken(UMT5EncoderModel(text)),
        "vae": make_vae(family),
        "transformer": make_transformer(family),
        "transformer_2": None if family.boundary is None else make_transformer(family),
        "scheduler": scheduler,
        "boundary_ratio": family.boundary,
        "expand_timesteps": family.expand,
    }
    if not family.pictures:
        return WanPipeline(**parts)
    encoder = processor = None
    if family.clip:
        encoder = shaken(
            CLIPVisionModel(
                CLIPVisionConfig(
                    hidden_size=16,
                    intermediate_size=24,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    image_size=IMAGE_SIZE,
                    patch_size=PATCH,
                    hidden_act="gelu",
                )
            )
        )
        square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=square)
    return WanImageToVideoPipeline(**parts, image_encoder=encoder, image_processor=processor)


def pictures_of(family: Family) -> list[np.ndarray | None]:
    height, width = family.size
    rng = np.random.default_rng(1)
    rough = rng.integers(0, 256, (2, height // 8, width // 8, 3), np.uint8)
    made = list(rough.repeat(8, axis=1).repeat(8, axis=2)[: family.pictures])
    return made + [None] * (2 - family.pictures)


def diffusers_video(pipe, family: Family, noise):
    """(frames in [0, 1], latents after each step, channels last)."""
    first, last = pictures_of(family)
    shown = {} if first is None else {"image": Image.fromarray(first)}
    shown |= {} if last is None else {"last_image": Image.fromarray(last)}
    return reference.denoise(
        pipe,
        noise,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=family.size[0],
        width=family.size[1],
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        **({"guidance_scale_2": GUIDANCE + 1} if family.boundary else {}),
        **shown,
    )


SCHEDULERS = {
    "unipc": UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    ),
    "euler": FlowMatchEulerDiscreteScheduler(shift=SHIFT),
}
SCHEDULES = {"unipc": "wan", "euler": "flow_match_euler"}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_renders_the_same_frames_step_by_step(name, tmp_path):
    family = FAMILIES[name]
    theirs_pipe = make_pipeline(family, SCHEDULERS["unipc"])
    theirs_pipe.save_pretrained(tmp_path / "model")
    pipe = sora_jax.load(tmp_path / "model")
    assert (pipe.sampling.solver, pipe.sampling.schedule) == ("unipc", "wan")
    assert pipe.sampling.steps == 50 and pipe.sampling.text_tokens == 512
    for solver, scheduler in SCHEDULERS.items():
        theirs_pipe.scheduler = scheduler
        request = pipe.request(
            PROMPT,
            negative_prompt=NEGATIVE,
            size=family.size[::-1],
            frames=FRAMES,
            steps=STEPS,
            guidance=GUIDANCE,
            guidance_2=GUIDANCE + 1 if family.boundary else None,
            solver=solver,
            schedule=SCHEDULES[solver],
        )
        assert request.shift == SHIFT
        noise = np.random.default_rng(0).standard_normal((1, *pipe.latent_shape(request)))
        noise = noise.astype(np.float32)
        theirs, their_steps = diffusers_video(theirs_pipe, family, noise)
        assert theirs.std() > 0.01

        ours, steps = {}, []
        video = pipe.run(
            [request],
            pictures=pictures_of(family),
            noise=noise,
            on_step=lambda i, n, moment, steps=steps: steps.append(np.asarray(moment.x)),
            on_tensor=ours.__setitem__,
        )[0]
        # Where the first latent frame is given, what the solver makes of it is thrown away.
        moving = slice(1 if family.expand and family.pictures else 0, None)
        for mine, other in zip(steps, their_steps, strict=True):
            np.testing.assert_allclose(mine[:, moving], other[:, moving], atol=3e-5, rtol=0)
        frames = (np.asarray(pipe.decode(ours["latents"])[0]) + 1) / 2
        print(f"{name}, {solver}: frames differ by up to {np.abs(frames - theirs).max():.2e}")
        np.testing.assert_allclose(frames, theirs, atol=1e-4)
        if not (family.expand and family.pictures):  # else the picture itself is put back
            assert np.abs(video.frames / 255 - theirs).max() < 0.5 / 255 + 1e-4
