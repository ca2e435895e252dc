"""Makes tests/goldens/image.npz from transformers' CLIP vision tower (tiny, random, float32).

Usage, in an environment with the `parity` extra: python tools/make_goldens_image.py [FOLDER]
"""

import pathlib
import sys

import numpy as np
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
}
PICTURES = {"wide": (37, 61), "tall": (50, 33), "small": (20, 20)}  # height, width


def main() -> None:
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/goldens")
    rng = np.random.default_rng(0)
    arrays = {}
    square = {"height": 28, "width": 28}
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square)
    for name, (height, width) in PICTURES.items():
        rough = rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3))
        image = rough.repeat(5, 0).repeat(5, 1)[:height, :width].astype(np.uint8)
        pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
        arrays |= {f"{name}:image": image, f"{name}:pixels": pixels.transpose(1, 2, 0)}
    for activation in ("gelu", "quick_gelu"):
        torch.manual_seed(len(activation))
        model = CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act=activation)).eval()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.3 * torch.randn_like(value))
            pixels = np.stack([arrays[f"{name}:pixels"] for name in PICTURES])
            states = model(
                torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True
            ).hidden_states
        arrays[f"{activation}:features"] = states[-2].numpy()
        for key, value in model.state_dict().items():
            arrays[f"{activation}:param:{key}"] = value.numpy()
    np.savez_compressed(folder / "image.npz", **arrays)


if __name__ == "__main__":
    main()
