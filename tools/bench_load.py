"""Measures loading a transformer of full size, and one forward pass, against diffusers.

python tools/bench_load.py [--variant t2v_1.3b] [--dtype float32] [--folder DIR] [--no-reference]

Writes random weights in diffusers' layout to the folder (kept if given), loads them in a process of
its own, and prints seconds and the peak of resident memory beyond the parameters themselves, which
on a CPU lie in the same memory. The reference needs the `parity` extra (.venv-parity).
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
LATENTS = (5, 16, 16, 16)  # f, h, w, c: 320 tokens
TEXT = (1, 32, 4096)


def write(folder_path: Path, variant: str, dtype: str) -> None:
    """Random weights, tensor by tensor: scaled so that activations keep their size."""
    sys.path.insert(0, str(ROOT))
    from configs import wan
    from sora_jax.convert import folder, names
    from sora_jax.convert.tensors import write_shards
    from sora_jax.train.dit_stage import dit_config

    config = dit_config(wan.get_config(variant).dit, LATENTS[-1], TEXT[-1])
    entries = {entry.key: entry for entry in folder.COMPONENTS["dit"].entries(config)}
    flat = names.flat_params(folder.abstract_params("dit", config)[1])
    shapes = {}
    for key, entry in entries.items():
        ours = flat[entry.path].shape if entry.index is None else flat[entry.path].shape[1:]
        shapes[key] = names.file_shape(entry, ours)
    rng = np.random.default_rng(0)

    def tensor(key: str) -> np.ndarray:
        value = rng.standard_normal(shapes[key], np.float32)
        if len(shapes[key]) > 1:
            return value * np.float32(np.prod(shapes[key][1:]) ** -0.5)
        return 1 + 0.1 * value if "norm" in key and key.endswith("weight") else 0.1 * value

    target = folder_path / "transformer"
    folder.write_json(target / "config.json", config.to_dict())
    write_shards(target, folder.COMPONENTS["dit"].stem, shapes, tensor, dtype=dtype)


class Memory(threading.Thread):
    """Watches this process's own memory (RssAnon: pages of mapped files do not count), in GB."""

    def __init__(self):
        super().__init__(daemon=True)
        # What imports have freed goes back first, or the weights would fill it unnoticed.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.before, self.peak, self.stopped = self.now(), 0.0, False
        self.start()

    @staticmethod
    def now() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        return kib * 1024 / 1e9

    def run(self) -> None:
        while not self.stopped:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)

    def grown(self) -> float:
        """By how much memory had grown at its peak."""
        self.stopped = True
        return max(self.peak, self.now()) - self.before


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, *LATENTS)).astype(np.float32)
    return x, rng.standard_normal(TEXT).astype(np.float32)


def ours(folder_path: Path, out: Path) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from sora_jax import sharding
    from sora_jax.convert import folder

    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, context=1, devices=jax.devices()[:1])
    memory, begun = Memory(), time.perf_counter()
    _, graphdef, params = folder.load_component(folder_path, "dit", mesh=mesh)
    jax.block_until_ready(params)
    loaded = time.perf_counter() - begun
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9
    largest = max(leaf.nbytes / (len(leaf) if leaf.ndim == 3 else 1) for leaf in
                  jax.tree.leaves(params)) / 1e9  # fmt: skip
    report = {
        "load, s": loaded,
        "parameters, GB": size,
        "peak beyond them, GB": memory.grown() - size,
        "largest tensor, GB": largest,
    }
    x, text = inputs()
    forward = jax.jit(
        lambda params, x, text: nnx.merge(graphdef, params)(x, jnp.full((1,), 0.5), text)
    )
    jax.block_until_ready(forward(params, x, text))
    begun = time.perf_counter()
    y = np.asarray(forward(params, x, text))
    report["forward at 320 tokens, s"] = time.perf_counter() - begun
    np.save(out, y)
    return report


def reference(folder_path: Path, out: Path) -> dict[str, float]:
    import torch
    from diffusers import WanTransformer3DModel

    memory, begun = Memory(), time.perf_counter()
    model = WanTransformer3DModel.from_pretrained(
        str(folder_path), subfolder="transformer", torch_dtype=torch.float32
    ).eval()
    report = {"load, s": time.perf_counter() - begun}
    size = sum(p.numel() * 4 for p in model.parameters()) / 1e9
    report |= {"parameters, GB": size, "peak beyond them, GB": memory.grown() - size}
    x, text = inputs()
    text = np.pad(text, ((0, 0), (0, 512 - TEXT[1]), (0, 0)))  # as WanPipeline pads
    arguments = {
        "hidden_states": torch.from_numpy(np.moveaxis(x, -1, 1).copy()),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.from_numpy(text),
    }
    with torch.no_grad():
        model(**arguments)
        begun = time.perf_counter()
        y = model(**arguments, return_dict=False)[0]
        report["forward at 320 tokens, s"] = time.perf_counter() - begun
    theirs = np.moveaxis(y.numpy(), 1, -1)
    mine = np.load(out)
    report["largest difference / largest value"] = float(
        np.abs(mine - theirs).max() / np.abs(theirs).max()
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="t2v_1.3b", help="of configs/wan.py, text to video")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--part", choices=("ours", "reference"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run = {"ours": ours, "reference": reference}[args.part]
        print(json.dumps(run(args.folder, args.folder / "output.npy")))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder_path = args.folder or Path(temporary)
        if not (folder_path / "transformer").is_dir():
            write(folder_path, args.variant, args.dtype)
        for part in ("ours", "reference")[: 1 if args.no_reference else 2]:
            command = [sys.executable, __file__, "--part", part, "--folder", str(folder_path)]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(part)
            for name, value in json.loads(lines.splitlines()[-1]).items():
                print(f"  {name:36} {value:.3g}")


if __name__ == "__main__":
    main()
