"""Makes tests/goldens/dit.npz: diffusers' WanTransformer3DModel on tiny random weights.

Needs the `parity` extra:  python tools/make_goldens_dit.py
"""

import json
import pathlib

import numpy as np
import torch
from diffusers import WanTransformer3DModel

OUT = pathlib.Path(__file__).parent.parent / "tests/goldens/dit.npz"
TEXT_LEN = 512
TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
# name: (changes to TINY, latent size (f, h, w), whether there is a timestep per token)
CASES = {
    "scalar": ({}, (3, 4, 6), False),
    "per_token": ({}, (3, 4, 6), True),
    "other_patch": (
        {"patch_size": (2, 1, 3), "out_channels": 2, "cross_attn_norm": False, "num_layers": 1},
        (4, 3, 6),
        False,
    ),
    "image": ({"image_dim": 16, "added_kv_proj_dim": 24, "num_layers": 1}, (3, 4, 6), False),
    "first_last": (
        {"image_dim": 16, "added_kv_proj_dim": 24, "pos_embed_seq_len": 6, "num_layers": 1},
        (3, 4, 6),
        False,
    ),
}
IMAGE_ROWS = 3  # features of one image


def run(changes, size, per_token, rng):
    config = {**TINY, **changes}
    torch.manual_seed(0)
    model = WanTransformer3DModel(**config).eval()
    # diffusers starts norms and biases at one and zero: a mistake there would not show.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batch, lengths = 2, (5, 3)
    latents = rng.standard_normal((batch, *size, config["in_channels"]), np.float32)
    text = rng.standard_normal((batch, max(lengths), config["text_dim"]), np.float32)
    mask = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
    tokens = np.prod([s // p for s, p in zip(size, config["patch_size"], strict=True)])
    # Multiples of 1/128 are exact in float32 after the multiplication by 1000.
    shape = (batch, tokens) if per_token else (batch,)
    t = (rng.integers(0, 129, shape) / 128).astype(np.float32)
    padded = np.zeros((batch, TEXT_LEN, config["text_dim"]), np.float32)
    padded[:, : max(lengths)] = text * mask[..., None]
    inputs, image = {}, None
    if config.get("image_dim"):
        images = 2 if config.get("pos_embed_seq_len") else 1
        shape = (batch, images * IMAGE_ROWS, config["image_dim"])
        image = rng.standard_normal(shape, np.float32)
        # diffusers takes the images of one example as consecutive rows of the batch.
        rows = torch.from_numpy(image.reshape(-1, IMAGE_ROWS, shape[-1]))
        inputs["encoder_hidden_states_image"] = rows
    with torch.no_grad():
        output = model(
            hidden_states=torch.from_numpy(latents.transpose(0, 4, 1, 2, 3).copy()),
            timestep=torch.from_numpy(t * 1000),
            encoder_hidden_states=torch.from_numpy(padded),
            return_dict=False,
            **inputs,
        )[0]
    arrays = {
        "latents": latents,
        "t": t,
        "text_emb": text,
        "text_mask": mask,
        "velocity": output.numpy().transpose(0, 2, 3, 4, 1),
        "config": np.array(json.dumps(dict(model.config))),
    }
    if image is not None:
        arrays["image_emb"] = image
    arrays |= {f"params/{key}": value.numpy() for key, value in model.state_dict().items()}
    return arrays


def main():
    rng = np.random.default_rng(0)
    arrays = {}
    for name, case in CASES.items():
        arrays |= {f"{name}/{key}": value for key, value in run(*case, rng).items()}
    # One set of weights serves both cases of the same model.
    for key in [key for key in arrays if key.startswith("per_token/params/")]:
        assert np.array_equal(arrays[key], arrays[key.replace("per_token", "scalar")])
        del arrays[key]
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
