"""Makes tests/goldens/wan_keys.json: names and shapes of every published Wan model's tensors.

Needs the `parity` extra; models are built on torch's meta device, so nothing is allocated:

    python tools/make_goldens_keys.py
"""

import json
import pathlib
import re

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

ROOT = pathlib.Path(__file__).parent.parent
OUT = ROOT / "tests/goldens/wan_keys.json"

B14 = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
TRANSFORMERS = {
    "t2v_1.3b": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
    "t2v_14b": B14,
    "i2v_14b": B14 | I2V,
    "flf2v_14b": B14 | I2V | {"pos_embed_seq_len": 514},
    "ti2v_5b": {
        "num_layers": 30,
        "num_attention_heads": 24,
        "ffn_dim": 14336,
        "in_channels": 48,
        "out_channels": 48,
    },
    "t2v_a14b": B14,
    "i2v_a14b": B14 | {"in_channels": 36},
}
VAES = {
    "vae_2.1": {},
    "vae_2.2": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}
UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}

VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "gelu",
}


def summary(model: torch.nn.Module, *, prefix: str = "") -> dict:
    """Keys with the number of a block as *, how many tensors there are, and of how many values."""
    state = model.state_dict()
    keys = {
        prefix + re.sub(r"^((?:encoder\.)?(?:blocks?|layers))\.\d+\.", r"\1.*.", k): list(v.shape)
        for k, v in state.items()
    }
    return {
        "tensors": len(state),
        "parameters": sum(p.numel() for p in model.parameters()),
        "keys": keys,
    }


def main():
    with torch.device("meta"):
        models = {name: WanTransformer3DModel(**c) for name, c in TRANSFORMERS.items()}
        models |= {name: AutoencoderKLWan(**c) for name, c in VAES.items()}
        models["umt5_xxl"] = UMT5EncoderModel(UMT5Config(**UMT5_XXL))
        image = CLIPVisionModel(CLIPVisionConfig(**VIT_H))
    result = {name: summary(model) for name, model in models.items()}
    # Published files have the prefix, which transformers 5 leaves out.
    result["clip_vit_h"] = summary(image, prefix="vision_model.")
    OUT.write_text(json.dumps(result, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    for name, entry in result.items():
        print(f"{name}: {entry['tensors']} tensors, {entry['parameters']:,} parameters")


if __name__ == "__main__":
    main()
