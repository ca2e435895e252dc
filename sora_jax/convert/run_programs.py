"""Makes a video from the programs beside this file, which came from `sora-jax convert export`.

python run.py --ids 3 17 42 1 --out video.npy [--seed 0] [--steps 24] [--guidance 3]

Needs onnxruntime for .onnx files; jax, and flatbuffers to read them, for .jax_export files. `--ids`
are the prompt's tokens, by the tokenizer in tokenizer/, or take `--prompt-ids FILE.npy`. Writes the
frames as uint8 (videos, frames, height, width, 3) and, beside them, a picture of the first video's
frames side by side (.ppm).
"""

import argparse
import json
import mmap
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# Of each program, the model whose weights it takes.
WEIGHTS = {"text_encoder": "text_encoder", "denoise": "transformer", "decode": "vae"}


class OnnxProgram:
    """An ONNX program, its weights in it and in the .data file beside it."""

    def __init__(self, name: str):
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        path = str(HERE / f"{name}.onnx")
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._names = [given.name for given in self._session.get_inputs()]

    def __call__(self, *arguments: np.ndarray) -> np.ndarray:
        return self._session.run(None, dict(zip(self._names, arguments, strict=True)))[0]


class JaxProgram:
    """A program of `jax.export`, and the weights that are its first argument."""

    def __init__(self, name: str):
        import jax
        from jax import export

        program = export.deserialize((HERE / f"{name}.jax_export").read_bytes())
        held = read_weights(HERE / f"{WEIGHTS[name]}.safetensors")
        self._weights = jax.device_put({key: held[key] for key in sorted(held)})
        self._run = jax.jit(program.call)

    def __call__(self, *arguments: np.ndarray) -> np.ndarray:
        return np.asarray(self._run(self._weights, *arguments))


def program(name: str):
    return OnnxProgram(name) if (HERE / f"{name}.onnx").exists() else JaxProgram(name)


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped, not copied."""
    import ml_dtypes  # comes with jax

    dtypes = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        dtype = np.dtype(dtypes[entry["dtype"]])
        flat = np.frombuffer(data, dtype, (end - begin) // dtype.itemsize, begin)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def padded(ids: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) of one text, as the text encoder takes them; id 0 is padding."""
    kept = ids[:length]
    row = np.zeros((1, length), np.int32)
    row[0, : len(kept)] = kept
    return row, row > 0


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
    encode = program("text_encoder")
    cond, uncond = encode(ids, mask), encode(empty, empty_mask)

    shape = (len(rows), *manifest["latents"])
    if args.noise is None:
        x = np.random.default_rng(args.seed).standard_normal(shape).astype(np.float32)
    else:
        x = np.load(args.noise).astype(np.float32)
    even = np.linspace(1.0, 0.0, args.steps + 1)
    times = manifest["shift"] * even / (1 + (manifest["shift"] - 1) * even)
    denoise = program("denoise")
    for i in range(args.steps):
        t, t_next, scale = (np.float32(v) for v in (times[i], times[i + 1], args.guidance))
        x = denoise(x, np.asarray(t), np.asarray(t_next), np.asarray(scale), cond, mask, uncond,
                    empty_mask)  # fmt: skip
        print(f"step {i + 1} of {args.steps}", end="\r", flush=True)
    video = program("decode")(x)
    frames = np.round((np.clip(video, -1, 1) + 1) * 127.5).astype(np.uint8)
    np.save(args.out, frames)
    strip = np.concatenate(list(frames[0]), axis=1)
    picture = args.out.with_suffix(".ppm")
    picture.write_bytes(b"P6 %d %d 255\n" % strip.shape[1::-1] + strip.tobytes())
    print(f"{args.out} {picture}")


if __name__ == "__main__":
    main()
