"""Encodes clips once, so that the VAE stays off the training step's path."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from sora_jax.convert import folder
from sora_jax.data.transforms import RandomTransform
from sora_jax.train.progress import Progress
from sora_jax.train.vae_stage import to_float


class LatentCache:
    """Random-access records of a cache directory: latents (float32) and captions.

    Holds `latents.npy` (clips, f, h, w, c) in float16, `captions.jsonl` (one list of captions a
    line) and `meta.json`, stamped with the hash of the VAE that made it.
    """

    def __init__(self, path: str | Path, *, vae_hash: str):
        self._path = Path(path)
        meta = folder.read_json(self._path / "meta.json")
        if meta["vae_hash"] != vae_hash:
            raise ValueError(
                f"{path}: latents were encoded by VAE {meta['vae_hash']}, training uses "
                f"{vae_hash}; delete the cache or change config.data.cache."
            )
        self._captions = [
            json.loads(line) for line in (self._path / "captions.jsonl").read_text().splitlines()
        ]
        self._latents = None

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> dict:
        if self._latents is None:  # opened late, so that the source pickles
            self._latents = np.load(self._path / "latents.npy", mmap_mode="r")
        latents = np.asarray(self._latents[index], np.float32)
        return {"latents": latents, "captions": self._captions[index]}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_latents": None}


class PickCaption(RandomTransform):
    """One of a record's captions, another one in every epoch."""

    def __call__(self, record: dict, rng: np.random.Generator) -> dict:
        captions = record["captions"]
        return record | {"caption": captions[int(rng.integers(len(captions)))]}


def build(
    source, vae_folder: str, path: str | Path, *, clips: int, batch_size: int = 16
) -> LatentCache:
    """Encodes the first `clips` records of `source` into `path`, or finishes doing so.

    Every process encodes its share into one file on a shared file system. An interrupted build
    goes on where it stopped.

    Raises:
      ValueError: the cache was made by another VAE.
    """
    path = Path(path)
    vae_hash = folder.hash_files([folder.tensor_path(Path(vae_folder), "vae")])[:16]
    if not (path / "meta.json").is_file():
        _encode(source, vae_folder, path, clips=clips, batch_size=batch_size, vae_hash=vae_hash)
    return LatentCache(path, vae_hash=vae_hash)


def _encode(source, vae_folder, path: Path, *, clips: int, batch_size: int, vae_hash: str) -> None:
    clips = min(clips, len(source))
    path.mkdir(parents=True, exist_ok=True)
    _, graphdef, params = folder.load_component(Path(vae_folder), "vae")

    @jax.jit
    def encode(params, video):
        return nnx.merge(graphdef, params).encode(to_float(video)).astype(jnp.float16)

    rank, count = jax.process_index(), jax.process_count()
    shape = jax.eval_shape(encode, params, _batch(source, [0] * batch_size)).shape[1:]
    file = path / "latents.npy"
    if rank == 0 and not file.is_file():
        np.lib.format.open_memmap(file, "w+", np.float16, (clips, *shape)).flush()
    if count > 1:
        multihost_utils.sync_global_devices("latent cache created")
    latents = np.lib.format.open_memmap(file, "r+")
    captions_file = path / f"captions-{rank}.jsonl"
    done = len(captions_file.read_text().splitlines()) if captions_file.is_file() else 0
    share = range(rank, clips, count)
    with Progress("encoding", total=len(share), unit="clips", start=done) as progress:
        for start in range(done - done % batch_size, len(share), batch_size):
            indices = list(share[start : start + batch_size])
            full = indices + indices[-1:] * (batch_size - len(indices))  # one compiled shape
            encoded = np.asarray(encode(params, _batch(source, full)))
            latents[indices] = encoded[: len(indices)]
            latents.flush()
            fresh = indices[max(0, done - start) :]
            with captions_file.open("a") as lines:
                lines.writelines(json.dumps(_captions(source, i)) + "\n" for i in fresh)
            progress.update(start + len(indices))
    if count > 1:
        multihost_utils.sync_global_devices("latent cache encoded")
    if rank == 0:
        parts = [
            (path / f"captions-{r}.jsonl").read_text().splitlines(keepends=True)
            for r in range(count)
        ]
        merged = [parts[i % count][i // count] for i in range(clips)]
        (path / "captions.jsonl").write_text("".join(merged))
        folder.write_json(path / "meta.json", {"vae_hash": vae_hash, "clips": clips})
    if count > 1:
        multihost_utils.sync_global_devices("latent cache complete")


def _captions(source, index: int) -> list[str]:
    """All wordings of a clip, where the source has several."""
    several = getattr(source, "captions", None)
    return several(index) if several is not None else [source[index]["caption"]]


def _batch(source, indices: list[int]) -> np.ndarray:
    return np.stack([source[i]["video"] for i in indices])
