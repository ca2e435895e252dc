"""Makes tests/goldens/official.npz: outputs of the official Wan modules on weights made by name.

Needs the `parity` extra and the package `wan22` (installed with --no-deps):

    python tools/make_goldens_official.py

No weights are stored: both sides draw each tensor from a generator seeded by its official name
(`tests/convert/by_name.py`), so the file holds names, shapes, inputs and outputs alone.
"""

import importlib
import importlib.util
import json
import pathlib
import sys
import types

import numpy as np
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.convert.by_name import tensor  # noqa: E402

OUT = ROOT / "tests/goldens/official.npz"
TEXT_LEN = 512


def official(name: str):
    """Module `wan.modules.NAME`, without the package's own imports, which want a GPU."""
    if "wan" not in sys.modules:
        path = importlib.util.find_spec("wan").submodule_search_locations[0]
        for package, folder in (("wan", path), ("wan.modules", f"{path}/modules")):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [folder]
    torch.cuda.current_device = lambda: 0  # read where a default argument is defined
    return importlib.import_module(f"wan.modules.{name}")


def attention(q, k, v, k_lens=None, **_):
    """Stands in for the flash kernel: (b, n, heads, head_dim), keys beyond `k_lens` masked."""
    mask = None
    if k_lens is not None:
        mask = (torch.arange(k.shape[1])[None] < k_lens[:, None])[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2)


def fill(model: torch.nn.Module) -> dict[str, list[int]]:
    """Sets every tensor by its name; returns all shapes."""
    state = {
        key: torch.from_numpy(tensor(key, value.shape)) for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    model.eval().requires_grad_(False)
    return {key: list(value.shape) for key, value in state.items()}


def dit(rng) -> dict:
    module = official("model")
    module.flash_attention = attention
    settings = {"dim": 128, "ffn_dim": 48, "freq_dim": 32, "text_dim": 16, "in_dim": 4}
    model = module.WanModel(**settings, out_dim=4, num_heads=1, num_layers=2)
    shapes = fill(model)
    x = rng.standard_normal((4, 3, 4, 6), np.float32)
    text = rng.standard_normal((5, 16), np.float32)
    tokens = 3 * 2 * 3
    t = (rng.integers(0, 129, (1, tokens)) / 128).astype(np.float32)
    y = model([torch.from_numpy(x)], torch.from_numpy(t * 1000), [torch.from_numpy(text)], tokens)
    return {
        "shapes": shapes,
        "latents": x.transpose(1, 2, 3, 0)[None],
        "t": t,
        "text_emb": text[None],
        "velocity": y[0].numpy().transpose(1, 2, 3, 0)[None],
    }


def vae21(rng) -> dict:
    module = official("vae2_1")
    options = {"dim": 4, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
    return run_vae(module.WanVAE_(**options, temperal_downsample=[False, True, True]), rng, 3)


def vae22(rng) -> dict:
    module = official("vae2_2")
    options = {"dim": 8, "dec_dim": 12, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
    return run_vae(module.WanVAE_(**options, temperal_downsample=[False, True, True]), rng, 3)


def run_vae(model, rng, channels: int) -> dict:
    """Raw latents of a clip, and the clip that they decode to, before the clamp."""
    shapes = fill(model)
    z_dim = shapes["conv2.weight"][0]
    x = rng.uniform(-1, 1, (1, channels, 5, 32, 32)).astype(np.float32)
    scale = [torch.zeros(z_dim), torch.ones(z_dim)]
    mean = model.encode(torch.from_numpy(x), scale)
    y = model.decode(mean, scale)
    return {
        "shapes": shapes,
        "video": x.transpose(0, 2, 3, 4, 1),
        "mean": mean.numpy().transpose(0, 2, 3, 4, 1),
        "recon": y.numpy().transpose(0, 2, 3, 4, 1),
    }


def text(rng) -> dict:
    module = official("t5")
    model = module.T5Encoder(60, 16, 24, 32, 2, 2, 32, shared_pos=False, dropout=0.0)
    shapes = fill(model)
    ids = rng.integers(3, 60, (2, 7))
    mask = np.arange(7)[None] < np.array([7, 4])[:, None]
    y = model(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)))
    return {"shapes": shapes, "ids": ids.astype(np.int32), "mask": mask, "text_emb": y.numpy()}


def main():
    arrays = {}
    for make in (dit, vae21, vae22, text):
        result = make(np.random.default_rng(0))
        shapes = np.array(json.dumps(result.pop("shapes")))
        arrays |= {f"{make.__name__}/{key}": v for key, v in (result | {"shapes": shapes}).items()}
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
