"""Encodes clips once, so that VAE and image encoder stay off the training step's path."""

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from sora_jax import checkpoint_path
from sora_jax.convert import folder
from sora_jax.data import latents
from sora_jax.data.clips import ClipSettings, ClipSource
from sora_jax.data.latents import Encoded, LatentSource
from sora_jax.data.transforms import RandomTransform
from sora_jax.progress import Progress
from sora_jax.prompts import timed
from sora_jax.text.tokenizer import Tokenizer
from sora_jax.train.encode import (
    CaptionEncoder,
    ClipEncoder,
    PictureEncoder,
    image_hash,
    text_hash,
    vae_hash,
)
from sora_jax.train.pictures import GIVEN
from sora_jax.video_io import atomic_path

READERS = 4  # threads that draw or decode clips
SHARD_CLIPS = 512


@dataclasses.dataclass(frozen=True)
class PickCaption(RandomTransform):
    """One of a record's captions, another one in every epoch.

    Those of at most `max_tokens` are preferred: one that is cut leaves out what is seen.

    Args:
      fps: adds the frames a second to the caption ("..., 8 fps"), for a model that is to follow
        them; prompts then say them too. Images have none, and what has no caption gets none.
      embedding: keeps that of the caption, which a cache may hold; those of the others go.
    """

    tokenizer: Tokenizer
    max_tokens: int
    fps: bool = False
    embedding: bool = False

    def _choices(self, captions: list[str], fps: float) -> tuple[list[str], list[int]]:
        def told(text: str) -> str:
            return f"{text}, {fps:g} fps" if self.fps and fps and text else text

        if self.embedding:  # one for each caption
            captions = [timed.as_one(c) for c in captions]
        words = [timed.change(c, told) if len(timed.spans(c)) > 1 else told(c) for c in captions]
        whole = [i for i, c in enumerate(words) if not self._is_cut(c)]
        return words, whole or list(range(len(words)))

    def _is_cut(self, caption: str) -> bool:
        return any(
            self.tokenizer.truncate(span.text, self.max_tokens)[1] for span in timed.spans(caption)
        )

    def longest(self, captions: list[str], fps: float) -> tuple[int, int]:
        """Most tokens that the caption chosen from these has, and most texts."""
        words, choices = self._choices(captions, fps)
        texts = [[span.text for span in timed.spans(words[i])] for i in choices]
        most = max(map(len, texts))
        if self._is_cut(words[choices[0]]):
            # All are cut: ids at a word, embeddings where they must be.
            return self.max_tokens * most, most
        _, mask = self.tokenizer.batch(
            [text for row in texts for text in row],
            length=self.max_tokens,
            max_length=self.max_tokens,
        )
        counts = iter(mask.sum(axis=1).tolist())
        return max(sum(next(counts) for _ in row) for row in texts), most

    def __call__(self, record: dict, rng: np.random.Generator) -> dict:
        several = record.get("captions") or [record["caption"]]
        captions, choices = self._choices(several, record.get("fps", 0.0))
        chosen = choices[int(rng.integers(len(choices)))]
        picked = record | {"caption": captions[chosen]}
        embeddings = picked.pop("text_emb", None)
        if self.embedding and embeddings is not None:
            picked["text_emb"] = embeddings[chosen]
        return picked


def build(
    source,
    vae_folder: str | Path,
    path: str | Path,
    *,
    clips: int = 0,
    text_folder: str | Path = "",
    text_tokens: int = 512,
    pictures: str = "",
    image_folder: str | Path = "",
    shard_clips: int = SHARD_CLIPS,
) -> LatentSource:
    """Encodes the first `clips` records of `source` into `path`, or finishes doing so.

    Every process encodes its share of the shards, on a shared file system. A shard appears whole
    or not at all, so an interrupted build goes on where it stopped.

    Args:
      clips: 0 takes all.
      text_folder: inference folder whose text encoder encodes the captions; "" keeps them as text.
      text_tokens: captions are cut to so many, where they are encoded.
      pictures: a mask of `pictures.GIVEN`, whose frames a model goes on from; "" stores none.
      image_folder: inference folder whose image encoder sees those frames; "" has none do so.
      shard_clips: records of one file.

    Raises:
      ValueError: a count out of range, another mask, or the cache, complete or not, was made by
        other encoders, of other pictures, of another number or size of clips, or of another world
        (`source.origin`).
    """
    path = Path(path)
    if clips < 0 or shard_clips < 1:
        raise ValueError(
            f"cache_clips {clips} must be 0 (all) or more, and shard_clips {shard_clips} 1 or "
            "more; change config.data.cache_clips."
        )
    if pictures and pictures not in GIVEN:
        raise ValueError(f"pictures {pictures!r} is no mask of a cache; use {', '.join(GIVEN)}.")
    image_folder = image_folder if pictures else ""
    count = min(clips, len(source)) if clips else len(source)
    wanted = {
        "vae_hash": vae_hash(Path(vae_folder)),
        "text_hash": text_hash(Path(text_folder)) if text_folder else None,
        "pictures": pictures or None,
        "image_hash": image_hash(Path(image_folder)) if image_folder else None,
        "clips": count,
        "clip_shape": list(source[0]["video"].shape),
        "shard_clips": shard_clips,
    }
    if text_folder:
        wanted["text_tokens"] = text_tokens
    if origin := getattr(source, "origin", None):
        wanted["origin"] = origin
    check_meta(path, wanted)
    if not latents.is_complete(path):
        encoders = _Encoders(
            ClipEncoder(vae_folder),
            CaptionEncoder(text_folder, max_tokens=text_tokens) if text_folder else None,
            pictures,
            PictureEncoder(image_folder, pictures=len(GIVEN[pictures])) if image_folder else None,
        )
        _encode(source, encoders, path, meta=wanted)
    return LatentSource(path)


def clips_for(
    path: str | Path, vae_folder: str | Path, *, frames: int = 0, fps: float | int = 0.0
) -> ClipSource:
    """The clips of a built set as that VAE takes them, and a DiT with patches of 2x2 latents.

    Args:
      frames: at most so many a clip; 0 takes all.
      fps: they are resampled to; 0 keeps their own.

    Raises:
      ValueError: no built set there, or no VAE.
    """
    config = folder.find_component(checkpoint_path(vae_folder), "vae")[0]
    settings = ClipSettings(
        frames=frames or 1 << 20,
        fps=fps,
        multiple=2 * config.scale_factor_spatial,
        frame_step=config.scale_factor_temporal,
    )
    return ClipSource(path, settings)


def check_meta(path: Path, wanted: dict[str, Any]) -> None:
    """Raises ValueError where a cache at `path`, complete or not, was made otherwise, or where
    what is there is a built set or else no cache."""
    if not (path / latents.META).is_file():
        # What a cache has first is missing, so these are another's; a built set has both.
        others = [name for name in ("manifest.json", latents.INDEX) if (path / name).is_file()]
        if others:
            raise ValueError(
                f"{path} holds {others[0]} of something else than a cache of latents; give a new "
                "folder."
            )
        return
    found = folder.read_json(path / latents.META)
    if "origin" in wanted and "origin" in found:  # caches did not always tell
        _check_origin(path, found["origin"], wanted["origin"])
    for name, value in wanted.items():
        if name == "text_tokens" and name not in found:
            continue  # caches did not always tell
        if name != "origin" and found.get(name) != value:
            raise ValueError(
                f"the latents in {path} have {name} {found.get(name)}, the config asks for "
                f"{value}; delete the cache or change config.data.cache."
            )


def _check_origin(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError, naming what differs, where clips came from another world."""
    # What one of the two does not know came to the package after the other.
    apart = [name for name in sorted(found.keys() & wanted) if found[name] != wanted[name]]
    if apart:
        told = ", ".join(f"{name} {found[name]} (asked for: {wanted[name]})" for name in apart)
        raise ValueError(
            f"the latents in {path} are of clips with {told}; delete the cache or change "
            "config.data.cache."
        )


class _Encoders(NamedTuple):
    """What makes the records of clips; None and "" leave out what they would add."""

    clips: ClipEncoder
    captions: CaptionEncoder | None
    pictures: str
    images: PictureEncoder | None

    def __call__(self, records: Sequence[dict], captions: Sequence[list[str]]) -> list[Encoded]:
        videos = [record["video"] for record in records]
        posteriors = self.clips(videos)
        given = [None] * len(videos)
        if self.pictures:
            given = [shown.mean for shown in self.clips(videos, pictures=self.pictures)]
        seen = [None] * len(videos) if self.images is None else self.images(videos)
        encoded = []
        for i, words in enumerate(captions):
            emb = None
            if self.captions is not None:
                emb = self.captions([timed.as_one(caption) for caption in words])
            fps = float(records[i]["fps"])
            encoded.append(Encoded(*posteriors[i], words, fps, emb, given[i], seen[i]))
        return encoded


def _encode(source, encode: _Encoders, path: Path, *, meta: dict[str, Any]) -> None:
    clips, size = meta["clips"], meta["shard_clips"]
    path.mkdir(parents=True, exist_ok=True)
    rank, processes = jax.process_index(), jax.process_count()
    if rank == 0 and not (path / latents.META).is_file():
        with atomic_path(path / latents.META) as part:
            folder.write_json(part, meta)
    shards = -(-clips // size)
    names = [path / f"latents-{i:05d}-of-{shards:05d}.array_record" for i in range(shards)]
    mine = list(range(rank, shards, processes))
    done = [i for i in mine if names[i].is_file() and _is_told(_sidecar(names[i]))]
    step = encode.clips.config.scale_factor_temporal
    finished = min(len(done) * size, clips)
    with Progress("encoding", total=clips // processes, unit="clips", start=finished) as bar:
        for i in (i for i in mine if i not in done):
            indices = range(i * size, min((i + 1) * size, clips))
            rows, sizes, rates, captions = [], [], [], []
            for batch in _read_ahead(source, indices, step):
                texts = [_captions(source, j, record) for j, record in batch]
                for clip in encode([record for _, record in batch], texts):
                    rows.append(latents.to_bytes(clip))
                    sizes.append(clip.mean.shape[:3])
                    rates.append(clip.fps)
                    captions.append(clip.captions)
                bar.update(finished + len(rows))
            finished += len(rows)
            _write_shard(names[i], rows)
            with atomic_path(_sidecar(names[i])) as part:
                told = {"sizes": sizes, "fps": rates, "captions": captions}
                part.write_text(json.dumps(told) + "\n")
    if processes > 1:
        multihost_utils.sync_global_devices("latent cache encoded")
    if rank == 0:
        _complete(path, [_sidecar(name) for name in names])
    if processes > 1:
        multihost_utils.sync_global_devices("latent cache complete")


def _sidecar(shard: Path) -> Path:
    return shard.with_name(f".{shard.stem}.json")


def _is_told(sidecar: Path) -> bool:
    """Whether what a shard says of its records is there, and whole."""
    try:
        folder.read_json(sidecar)
    except ValueError:
        return False
    return True


def _write_shard(path: Path, rows: Sequence[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    with atomic_path(path) as part:
        # One record a group: they are read one by one, in any order.
        writer = ArrayRecordWriter(str(part), "group_size:1")
        for row in rows:
            writer.write(row)
        writer.close()


def _complete(path: Path, sidecars: Sequence[Path]) -> None:
    """Joins what the shards say of their records; the index comes last."""
    parts = [folder.read_json(file) for file in sidecars]
    with atomic_path(path / latents.CAPTIONS) as part:
        lines = (json.dumps(words) + "\n" for piece in parts for words in piece["captions"])
        part.write_text("".join(lines), "utf-8")
    with atomic_path(path / latents.INDEX) as part, part.open("wb") as file:
        sizes = np.array([size for piece in parts for size in piece["sizes"]], np.int32)
        fps = np.array([rate for piece in parts for rate in piece["fps"]], np.float32)
        np.savez(file, sizes=sizes, fps=fps)
    for file in sidecars:
        file.unlink()


def _captions(source, index: int, record: dict) -> list[str]:
    """All wordings of a clip, where the source has several."""
    several: Callable | None = getattr(source, "captions", None)
    if several is not None:
        return several(index)
    return list(record.get("captions") or [record["caption"]])


def whole_chunks(video: np.ndarray, step: int) -> np.ndarray:
    """The first 1 + k * `step` frames of a clip: what a causal VAE encodes."""
    return video[: 1 + (len(video) - 1) // step * step]


def _read_ahead(
    source, indices: Sequence[int], step: int, batch: int = 32
) -> Iterator[list[tuple[int, dict]]]:
    """Records in batches, the next one being read while this one is used."""

    def read(index: int) -> tuple[int, dict]:
        record = source[index]
        return index, {**record, "video": whole_chunks(record["video"], step)}

    parts = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        ahead = [pool.submit(read, i) for i in parts[0]] if parts else []
        for following in [*parts[1:], []]:
            ahead, now = [pool.submit(read, i) for i in following], ahead
            yield [future.result() for future in now]
