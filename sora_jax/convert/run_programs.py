"""Makes a video from the programs beside this file, which came from `sora-jax convert export`.

python run.py --ids 3 17 42 1 --out video.npy [--image first.npy] [--seed 0] [--steps 24]

Needs onnxruntime for .onnx files; jax, and flatbuffers to read them, for .jax_export files. `--ids`
are the prompt's tokens, by the tokenizer in tokenizer/, or take `--prompt-ids FILE.npy`. Writes the
frames as uint8 (videos, frames, height, width, 3) and, beside them, a picture of the first video's
frames side by side (.ppm). Models that take pictures take them as uint8 (height, width, 3) of the
video's size (manifest.json has it).
"""

import argparse
import json
import mmap
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# Of each program, the model whose weights it takes.
WEIGHTS = {
    "text_encoder": "text_encoder",
    "denoise": "transformer",
    "denoise_2": "transformer_2",
    "encode": "vae",
    "encode_picture": "vae",
    "decode": "vae",
    "image_encoder": "image_encoder",
}


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


def read_picture(path: Path, manifest: dict) -> np.ndarray:
    """(1, height, width, 3), from 0 to 255."""
    picture = np.load(path)
    if picture.dtype != np.uint8 or list(picture.shape) != manifest["video"][1:]:
        raise SystemExit(
            f"{path}: is {picture.dtype} {picture.shape}; give uint8 {manifest['video'][1:]}."
        )
    return picture[None].astype(np.float32)


def conditions(shown: list[np.ndarray], manifest: dict, videos: int) -> list[np.ndarray]:
    """What the transformer takes of the pictures, in the order of its arguments."""
    frames, height, width, _ = manifest["video"]
    pixels = [picture / 127.5 - 1 for picture in shown]
    made = {}
    if "channels" in manifest["pictures"]:
        video = np.zeros((1, frames, height, width, 3), np.float32)  # grey where none is given
        known = np.zeros(frames, np.float32)
        for place, picture in zip((0, -1), pixels, strict=False):
            video[:, place], known[place] = picture, 1
        latents = program("encode")(video)
        factor = manifest["frames_a_latent"]
        mask = np.concatenate([np.repeat(known[:1], factor), known[1:]]).reshape(-1, factor)
        mask = np.broadcast_to(mask[None, :, None, None], (*latents.shape[:-1], factor))
        made["channels"] = np.concatenate([mask, latents], axis=-1).astype(np.float32)
    if "clean" in manifest["pictures"]:
        made["clean"] = np.zeros((1, 1, *manifest["latents"][1:]), np.float32)
        if shown:
            made["clean"] = program("encode_picture")(pixels[0][:, None])
    if "features" in manifest["pictures"]:
        rows = program("image_encoder")(np.concatenate(shown))
        made["features"] = rows.reshape(1, -1, rows.shape[-1])
    made = {name: np.repeat(value, videos, axis=0) for name, value in made.items()}
    made["given"] = np.asarray(len(shown) > 0, np.float32)
    return [made[name] for name in manifest["pictures"]]


def main() -> None:
    manifest = json.loads((HERE / "manifest.json").read_text())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", type=int, nargs="+", help="tokens of the prompt")
    parser.add_argument("--prompt-ids", type=Path, help="the same as .npy, one row a video")
    parser.add_argument("--negative-ids", type=int, nargs="+", default=manifest["empty_ids"])
    parser.add_argument("--out", type=Path, required=True, help=".npy")
    parser.add_argument("--noise", type=Path, help=".npy (videos, f, h, w, c); else from the seed")
    parser.add_argument("--image", type=Path, help=".npy: the picture that the video begins with")
    parser.add_argument("--last-image", type=Path, help=".npy: the one that it ends with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=manifest["steps"])
    parser.add_argument("--guidance", type=float, default=manifest["guidance"])
    parser.add_argument(
        "--guidance-2", type=float, default=manifest["guidance_2"], help="of a second transformer"
    )
    args = parser.parse_args()
    shown = [path for path in (args.image, args.last_image) if path is not None]
    least, most = manifest["picture_counts"]
    if not least <= len(shown) <= most or (args.last_image and not args.image):
        count = least if least == most else f"{least} to {most}"
        parser.error(f"this model takes {count} pictures, --image first")
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
    given = conditions([read_picture(path, manifest) for path in shown], manifest, len(rows))
    boundary = manifest["boundary"]
    name, denoise = None, None
    for i in range(args.steps):
        # Times are rounded: .9 must not fall below a boundary of .9.
        second = boundary is not None and round(times[i] - boundary, 9) < 0
        if name != (wanted := "denoise_2" if second else "denoise"):
            name, denoise = wanted, program(wanted)
        guidance = args.guidance_2 if second else args.guidance
        scalars = (np.asarray(v, np.float32) for v in (times[i], times[i + 1], guidance))
        x = denoise(x, *scalars, cond, mask, uncond, empty_mask, *given)
        print(f"step {i + 1} of {args.steps}", end="\r", flush=True)
    if "clean" in manifest["pictures"] and shown:
        x = np.concatenate([given[manifest["pictures"].index("clean")], x[:, 1:]], axis=1)
    video = program("decode")(x)
    frames = np.round((np.clip(video, -1, 1) + 1) * 127.5).astype(np.uint8)
    np.save(args.out, frames)
    strip = np.concatenate(list(frames[0]), axis=1)
    picture = args.out.with_suffix(".ppm")
    picture.write_bytes(b"P6 %d %d 255\n" % strip.shape[1::-1] + strip.tobytes())
    print(f"{args.out} {picture}")


if __name__ == "__main__":
    main()
