"""Makes a video from the programs beside this file; needs jax, and flatbuffers to read them.

python run.py --ids 3 17 42 1 --out video.npy [--seed 0] [--steps 24] [--guidance 3]

`--ids` are the prompt's tokens, by the tokenizer in tokenizer/, or take `--prompt-ids FILE.npy`.
Writes the frames as uint8 (videos, frames, height, width, 3) and, beside them, a picture of them
side by side (.ppm).
"""

import argparse
import json
import mmap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # comes with jax
import numpy as np
from jax import export

HERE = Path(__file__).parent
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped, not copied."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        dtype = np.dtype(DTYPES[entry["dtype"]])
        flat = np.frombuffer(data, dtype, (end - begin) // dtype.itemsize, begin)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


class Program:
    """A StableHLO program and the weights that are its first argument."""

    def __init__(self, name: str, weights: str):
        self._run = export.deserialize((HERE / f"{name}.jax_export").read_bytes()).call
        held = read_weights(HERE / f"{weights}.safetensors")
        self._weights = jax.device_put({key: held[key] for key in sorted(held)})

    def __call__(self, *arguments):
        return jax.jit(self._run)(self._weights, *arguments)


def padded(ids: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) of one text, as the text encoder takes them."""
    kept = ids[:length]
    row = np.zeros((1, length), np.int32)
    row[0, : len(kept)] = kept
    return row, np.arange(length)[None] < len(kept)


def main() -> None:
    manifest = json.loads((HERE / "manifest.json").read_text())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", type=int, nargs="+", help="tokens of the prompt")
    parser.add_argument("--prompt-ids", type=Path, help="the same as .npy, one row a video")
    parser.add_argument("--negative-ids", type=int, nargs="+", default=manifest["empty_ids"])
    parser.add_argument("--out", type=Path, required=True, help=".npy")
    parser.add_argument("--noise", type=Path, help=".npy (videos, f, h, w, c); else from the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=manifest["steps"])
    parser.add_argument("--guidance", type=float, default=manifest["guidance"])
    args = parser.parse_args()
    if (args.ids is None) == (args.prompt_ids is None):
        parser.error("give --ids or --prompt-ids")
    rows = [args.ids] if args.prompt_ids is None else np.load(args.prompt_ids).tolist()
    length = manifest["text_tokens"]
    texts = [padded(row, length) for row in rows]
    ids, mask = (np.concatenate(parts) for parts in zip(*texts, strict=True))
    empty, empty_mask = (np.repeat(a, len(rows), 0) for a in padded(args.negative_ids, length))
    encode = Program("text_encoder", "text_encoder")
    cond, uncond = encode(ids, mask), encode(empty, empty_mask)

    shape = (len(rows), *manifest["latents"])
    x = jax.random.normal(jax.random.key(args.seed), shape)
    if args.noise is not None:
        x = jnp.asarray(np.load(args.noise), jnp.float32)
    even = np.linspace(1.0, 0.0, args.steps + 1)
    times = manifest["shift"] * even / (1 + (manifest["shift"] - 1) * even)
    denoise = Program("denoise", "transformer")
    for i in range(args.steps):
        t, t_next, scale = (np.float32(v) for v in (times[i], times[i + 1], args.guidance))
        x = denoise(x, t, t_next, scale, cond, mask, uncond, empty_mask)
        print(f"step {i + 1} of {args.steps}", end="\r", flush=True)
    video = Program("decode", "vae")(x)
    frames = np.asarray(jnp.round((video + 1) * 127.5).astype(jnp.uint8))
    np.save(args.out, frames)
    strip = np.concatenate(list(frames[0]), axis=1)
    picture = args.out.with_suffix(".ppm")
    picture.write_bytes(b"P6 %d %d 255\n" % strip.shape[1::-1] + strip.tobytes())
    print(f"{args.out} {picture}")


if __name__ == "__main__":
    main()
