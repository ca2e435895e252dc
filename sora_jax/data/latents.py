"""Clips that were encoded once: a cache directory, and records of it by number.

    meta.json                          what was encoded, and the hashes of what did it
    latents-00000-of-00004.array_record, ...
    captions.jsonl                     one list of captions a line
    index.npz                          `sizes` (latent frames, rows, columns), `fps`

A record is a safetensors file of `mean` and `logvar` (f, h, w, c) in bfloat16: the posterior of
the normalised latents. Where captions were encoded too, `text_emb` (tokens of all captions, d) and
`text_lengths` (captions,). For models that go on from pictures, `given` (f, h, w, c), latents of
the video that shows the given frames and is grey elsewhere, and where an image encoder saw them,
`image_emb` (rows, d_image). `index.npz` is written last: its presence says that all is there.
"""

import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from jaxtyping import Float, Int
from safetensors.numpy import save

from sora_jax.data.transforms import RandomTransform

INDEX, CAPTIONS, META = "index.npz", "captions.jsonl", "meta.json"
PICTURES = ("given", "image_emb")  # what a record may hold of them


class Encoded(NamedTuple):
    """One clip: posterior of its normalised latents, and its captions, encoded or not."""

    mean: Float[np.ndarray, "f h w c"]  # bfloat16, as all of these
    logvar: Float[np.ndarray, "f h w c"]
    captions: list[str]
    fps: float
    text_emb: list[Float[np.ndarray, "_ d"]] | None = None  # one array a caption
    given: Float[np.ndarray, "f h w c"] | None = None
    image_emb: Float[np.ndarray, "i d_image"] | None = None


def to_bytes(clip: Encoded) -> bytes:
    """The record of a clip."""
    tensors = {"mean": clip.mean, "logvar": clip.logvar}
    if clip.text_emb is not None:
        tensors["text_emb"] = np.concatenate(clip.text_emb)
        tensors["text_lengths"] = np.array([len(x) for x in clip.text_emb], np.int32)
    tensors |= {name: x for name in PICTURES if (x := getattr(clip, name)) is not None}
    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()})


_DTYPES = {"BF16": ml_dtypes.bfloat16, "I32": np.int32}


def from_bytes(record: bytes) -> dict[str, np.ndarray]:
    """The tensors of a record; safetensors' own numpy reader knows no bfloat16."""
    return {
        name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in safetensors.deserialize(record)
    }


def is_complete(path: Path) -> bool:
    """Whether all is there; a built set has an index too, but not what tells of latents."""
    return (path / INDEX).is_file() and (path / META).is_file()


class LatentSource:
    """Random-access records of a cache: `latents` and `logvar` (float32), `captions`, `fps`.

    With encoded captions, `text_emb` is a list of one float32 array (l, d) a caption; `given` and
    `image_emb`, float32 too, are there where the cache has them.

    Attributes:
      sizes: latent frames, rows and columns of every record.
      captions: of every record.

    Raises:
      ValueError: no complete cache at `path`, or a shard is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not is_complete(self.path):
            raise ValueError(
                f"{path}: no complete cache of latents; make it with `sora-jax data cache`, which "
                "goes on where it stopped."
            )
        with np.load(self.path / INDEX) as index:
            self.sizes: Int[np.ndarray, "r 3"] = index["sizes"]
            self.fps: Float[np.ndarray, " r"] = index["fps"]
        lines = (self.path / CAPTIONS).read_text("utf-8").splitlines()
        self.captions: list[list[str]] = [json.loads(line) for line in lines]
        self.meta: dict = json.loads((self.path / META).read_text("utf-8"))
        names = sorted(file.name for file in self.path.glob("latents-*.array_record"))
        self._files = [str(self.path / name) for name in names]
        if not names or len(names) != int(names[0].split("-of-")[1][:5]):
            raise ValueError(
                f"{path}: {len(self._files)} shards of the cache are there and some are missing; "
                "delete it and encode again."
            )
        self._reader = None

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        if self._reader is None:  # opened late, so that the source pickles
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            self._reader = ArrayRecordDataSource(self._files)
        tensors = from_bytes(self._reader[index])
        record = {
            "latents": tensors["mean"].astype(np.float32),
            "logvar": tensors["logvar"].astype(np.float32),
            "captions": self.captions[index],
            "fps": float(self.fps[index]),
        }
        if "text_emb" in tensors:
            ends = np.cumsum(tensors["text_lengths"])[:-1]
            record["text_emb"] = np.split(tensors["text_emb"].astype(np.float32), ends)
        return record | {n: tensors[n].astype(np.float32) for n in PICTURES if n in tensors}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_reader": None}

    def __repr__(self) -> str:
        return f"LatentSource({str(self.path)!r})"


class SampleLatents(RandomTransform):
    """Draws a record's latents from their posterior, in place of its mean."""

    def __call__(self, record: dict, rng: np.random.Generator) -> dict:
        deviation = np.exp(0.5 * record["logvar"])
        noise = rng.standard_normal(deviation.shape, np.float32)
        return record | {"latents": record["latents"] + deviation * noise}


class FirstFrames:
    """Keeps the first `frames` of a record's latents, exact because the VAE is causal.

    So it is of `given`, where that shows the first frame alone.
    """

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def __call__(self, record: dict) -> dict:
        names = [n for n in ("latents", "logvar", "given") if n in record]
        return record | {n: record[n][: self.frames] for n in names}
