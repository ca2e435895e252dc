"""Makes tests/goldens/official_pipelines.npz: whole runs of the official Wan 2.2 pipelines.

Needs the `parity` extra and the package `wan22` (installed with --no-deps):

    python tools/make_goldens_official_pipelines.py

Weights follow from their names, as in `make_goldens_official.py`; text embeddings are given, so
that the runs begin at the denoiser. Only what wants a GPU or reads published files is replaced.
"""

import importlib
import json
import sys
import types

import numpy as np
import torch
from make_goldens_official import ROOT, attention, official, tensor
from PIL import Image

OUT = ROOT / "tests/goldens/official_pipelines.npz"
STEPS, SHIFT, BOUNDARY, SEED = 5, 5.0, 0.9, 3
DIT = {"dim": 128, "ffn_dim": 48, "freq_dim": 32, "text_dim": 16, "num_heads": 1, "num_layers": 2}
VAE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}


def pipeline_module(name: str):
    """Module `wan.NAME`, without torchvision, of which it takes `to_tensor` alone."""
    official("model").flash_attention = attention  # also puts the packages in their places
    for package in ("wan.utils", "wan.distributed"):
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            folder = package.split(".")[1]
            sys.modules[package].__path__ = [f"{sys.modules['wan'].__path__[0]}/{folder}"]
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.to_tensor = lambda image: torch.from_numpy(
        np.array(image, np.float32) / 255
    ).permute(2, 0, 1)
    transforms = types.ModuleType("torchvision.transforms")
    transforms.functional = functional
    vision = types.ModuleType("torchvision")
    vision.transforms = transforms
    sys.modules |= {
        "imageio": types.ModuleType("imageio"),  # for saving, which is not done here
        "torchvision": vision,
        "torchvision.transforms": transforms,
        "torchvision.transforms.functional": functional,
    }
    return importlib.import_module(f"wan.{name}")


def fill(model, prefix: str) -> dict[str, list[int]]:
    """Sets every tensor by `prefix` and its name; returns all shapes."""
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    state = {key: torch.from_numpy(weight(prefix, key, shape)) for key, shape in shapes.items()}
    model.load_state_dict(state)
    model.eval().requires_grad_(False)
    return shapes


def weight(prefix: str, key: str, shape) -> np.ndarray:
    """The last convolution is made small: a random decoder multiplies rounding otherwise."""
    value = tensor(prefix + key, shape)
    return value * np.float32(0.05) if key.startswith("decoder.head.2.") else value


def transformer(prefix: str, steps: list, **settings):
    model = official("model").WanModel(**DIT, **settings)
    shapes = fill(model, prefix)
    forward = model.forward

    def recorded(x, t, context, *args, **kwargs):
        steps.append(x[0].numpy().copy())
        return forward(x, t, context, *args, **kwargs)

    model.forward = recorded
    return model, shapes


def vae(version: str, prefix: str, **settings):
    module = official(f"vae{version}")
    model = module.WanVAE_(**settings, **VAE)
    shapes = fill(model, prefix)
    module._video_vae = lambda **_: model
    return getattr(module, f"Wan{version}_VAE")(device="cpu"), shapes


def run(kind, module: str, vae_version: str, *, experts: bool, picture: bool) -> dict:
    rng = np.random.default_rng(0)
    text = [rng.standard_normal((n, 16)).astype(np.float32) for n in (5, 3)]
    steps: list[np.ndarray] = []
    z_dim = 48 if vae_version == "2_2" else 16
    channels = {"in_dim": 36 if experts and picture else z_dim, "out_dim": z_dim}
    names = ("high_noise_model", "low_noise_model") if experts else ("model",)
    if experts and picture:
        channels["model_type"] = "i2v"
    models = [transformer(f"{name}/", steps, **channels) for name in names]
    sizes = {"dim": 8, "dec_dim": 12} if vae_version == "2_2" else {"dim": 4}
    decoder, vae_shapes = vae(vae_version, "vae/", **sizes, z_dim=z_dim)
    space = 16 if vae_version == "2_2" else 8
    pipe = object.__new__(getattr(pipeline_module(module), kind))
    encoded = iter(text)

    def encode(*_):
        return [torch.from_numpy(next(encoded))]

    pipe.__dict__ |= {
        **{name: model for name, (model, _) in zip(names, models, strict=True)},
        **{"device": torch.device("cpu"), "rank": 0, "sp_size": 1, "t5_cpu": False},
        **{"lightning": False, "init_on_cpu": False, "num_train_timesteps": 1000},
        **{"boundary": BOUNDARY, "param_dtype": torch.float32, "sample_neg_prompt": "negative"},
        **{"patch_size": (1, 2, 2), "vae_stride": (4, space, space), "vae": decoder},
    }
    text_encoder = types.SimpleNamespace(model=torch.nn.Identity())
    pipe.text_encoder = type("Encoder", (), {"__call__": encode, "model": text_encoder.model})()
    width, height = 64, 32
    options = {
        "frame_num": 9,
        "shift": SHIFT,
        "sampling_steps": STEPS,
        "guide_scale": (3.0, 4.0) if experts else 4.0,  # of (low, high) noise
        "seed": SEED,
        "offload_model": False,
    }
    arrays = {}
    if picture:
        pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        arrays["picture"] = pixels
        options |= {"img": Image.fromarray(pixels), "max_area": width * height}
    else:
        options["size"] = (width, height)
    generate = pipe.generate if experts else getattr(pipe, "i2v" if picture else "t2v")
    frames = generate("a prompt", **options)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(steps[0].shape, generator=generator).numpy()
    channels_last = lambda x: np.moveaxis(x, 0, -1)  # noqa: E731
    return arrays | {
        "noise": channels_last(noise),
        # What the transformer saw with the prompt, step by step.
        "steps": np.stack([channels_last(x) for x in steps[::2]]),
        "frames": channels_last(frames.numpy()),
        "cond": text[0],
        "uncond": text[1],
        "shapes": np.array(json.dumps({"dit": models[0][1], "vae": vae_shapes})),
    }


def main():
    cases = {
        "t2v_a14b": ("WanT2V", "text2video", "2_1", {"experts": True, "picture": False}),
        "i2v_a14b": ("WanI2V", "image2video", "2_1", {"experts": True, "picture": True}),
        "ti2v_5b_text": ("WanTI2V", "textimage2video", "2_2", {"experts": False, "picture": False}),
        "ti2v_5b_image": ("WanTI2V", "textimage2video", "2_2", {"experts": False, "picture": True}),
    }
    arrays = {}
    for name, (*how, flags) in cases.items():
        arrays |= {f"{name}/{key}": value for key, value in run(*how, **flags).items()}
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
