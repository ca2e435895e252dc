"""Encodes clips once, so that the VAE stays off the training step's path."""

import concurrent.futures
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from sora_jax.convert import folder
from sora_jax.data.transforms import RandomTransform
from sora_jax.progress import Progress
from sora_jax.text.tokenizer import Tokenizer
from sora_jax.train.vae_stage import to_float

READERS = 4  # threads that draw or decode clips


class LatentCache:
    """Random-access records of a cache directory: latents (float32) and captions.

    Holds `latents.npy` (clips, f, h, w, c) in float16, `meta.json` (what was encoded, and the
    hash of the VAE that did it) and, once it is complete, `captions.jsonl` (one list of captions
    a line).
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
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


@dataclasses.dataclass(frozen=True)
class PickCaption(RandomTransform):
    """One of a record's captions, another one in every epoch.

    Those of at most `max_tokens` are preferred: one that is cut leaves out what is seen.
    """

    tokenizer: Tokenizer
    max_tokens: int

    def __call__(self, record: dict, rng: np.random.Generator) -> dict:
        captions = record["captions"]
        whole = [c for c in captions if not self.tokenizer.truncate(c, self.max_tokens)[1]]
        captions = whole or captions
        return record | {"caption": captions[int(rng.integers(len(captions)))]}


def build(
    source, vae_folder: str | Path, path: str | Path, *, clips: int, batch_size: int = 16
) -> LatentCache:
    """Encodes the first `clips` records of `source` into `path`, or finishes doing so.

    Every process encodes its share into one file on a shared file system. An interrupted build
    goes on where it stopped.

    Raises:
      ValueError: no clips are asked for, or the cache, complete or not, was made by another VAE
        or of another number or size of clips.
    """
    path = Path(path)
    if clips < 1:
        raise ValueError(f"cache_clips {clips} must be 1 or more; set config.data.cache_clips.")
    wanted = {
        "vae_hash": _vae_hash(Path(vae_folder)),
        "clips": min(clips, len(source)),
        "clip_shape": list(source[0]["video"].shape),
    }
    if (path / "meta.json").is_file():
        found = folder.read_json(path / "meta.json")
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(
                    f"the latents in {path} have {name} {found.get(name)}, the config asks for "
                    f"{value}; delete the cache or change config.data.cache."
                )
    if not (path / "captions.jsonl").is_file():
        _encode(source, vae_folder, path, meta=wanted, batch_size=batch_size)
    return LatentCache(path)


def _encode(source, vae_folder, path: Path, *, meta: dict, batch_size: int) -> None:
    clips = meta["clips"]
    path.mkdir(parents=True, exist_ok=True)
    _, graphdef, params = folder.load_component(Path(vae_folder), "vae")

    @jax.jit
    def encode(params, video):
        return nnx.merge(graphdef, params).encode(to_float(video)).astype(jnp.float16)

    rank, count = jax.process_index(), jax.process_count()
    shape = jax.eval_shape(encode, params, _batch(source, [0] * batch_size)).shape[1:]
    file = path / "latents.npy"
    if rank == 0 and not (path / "meta.json").is_file():
        np.lib.format.open_memmap(file, "w+", np.float16, (clips, *shape)).flush()
        folder.write_json(path / "meta.json", meta)
    if count > 1:
        multihost_utils.sync_global_devices("latent cache created")
    latents = np.lib.format.open_memmap(file, "r+")
    captions_file = path / f"captions-{rank}.jsonl"
    done = _whole_lines(captions_file)
    share = range(rank, clips, count)
    with Progress("encoding", total=len(share), unit="clips", start=done) as progress:
        starts = range(done - done % batch_size, len(share), batch_size)
        batches = [list(share[start : start + batch_size]) for start in starts]
        videos = _read_ahead(source, batches, batch_size)
        for start, indices, video in zip(starts, batches, videos, strict=True):
            encoded = np.asarray(encode(params, video))
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
        part = path / "captions.jsonl.part"
        part.write_text("".join(parts[i % count][i // count] for i in range(clips)))
        part.replace(path / "captions.jsonl")  # at once: its presence says that all is there
    if count > 1:
        multihost_utils.sync_global_devices("latent cache complete")


def _vae_hash(vae_folder: Path) -> str:
    """Of the weights and of the config, which holds the latents' mean and deviation."""
    tensors = folder.tensor_path(vae_folder, "vae")
    return folder.hash_files([tensors, tensors.with_name("config.json")])[:16]


def _whole_lines(file: Path) -> int:
    """Lines of `file`, after cutting off one that was interrupted."""
    if not file.is_file():
        return 0
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return whole.count("\n")


def _captions(source, index: int) -> list[str]:
    """All wordings of a clip, where the source has several."""
    several = getattr(source, "captions", None)
    return several(index) if several is not None else [source[index]["caption"]]


def _read_ahead(source, batches: list[list[int]], size: int) -> Iterator[np.ndarray]:
    """Videos of each batch, the next one being read while this one is used.

    A short batch is filled up with its last record, so that one compiled shape serves all.
    """
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:

        def submit(indices):
            full = indices + indices[-1:] * (size - len(indices))
            return [pool.submit(lambda i: source[i]["video"], i) for i in full]

        ahead = [submit(indices) for indices in batches[:1]]
        for following in [*batches[1:], []]:
            ahead.append(submit(following) if following else [])
            yield np.stack([future.result() for future in ahead.pop(0)])


def _batch(source, indices: list[int]) -> np.ndarray:
    return np.stack([source[i]["video"] for i in indices])
