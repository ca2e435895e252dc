"""From a config to batches: fixed sizes, packed rows or buckets, of pixels or of cached latents."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import einops
import numpy as np
from jaxtyping import Int

from sora_jax import sharding
from sora_jax.data import clips, latents, mixture, packing, sources, transforms
from sora_jax.data import loader as loaders
from sora_jax.data.packing import Lengths, PackSettings, Segment
from sora_jax.prompts import timed
from sora_jax.text.tokenizer import Tokenizer
from sora_jax.train import frozen, latent_cache
from sora_jax.train.encode import ClipEncoder, image_hash, text_hash, vae_hash
from sora_jax.train.pictures import Beside

BATCHING = ("fixed", "pack", "bucket")


def make_loader(config, stage, mesh):
    """The batches of `config`'s source, or of its latent cache, for `stage`.

    Raises:
      ValueError: an unknown way of batching, sizes that do not fit the model or the budget, or
        whatever the source refuses.
    """
    # `get`: the configs of earlier runs lack these keys.
    batching = config.data.get("batching", "fixed")
    if batching not in BATCHING:
        raise ValueError(f"config.data.batching {batching!r}: use one of {', '.join(BATCHING)}.")
    if batching != "fixed" and config.stage != "dit":
        raise ValueError(
            f"config.data.batching {batching!r} is for stage 'dit'; the VAE trains on crops of one "
            "size (config.vae_loss.crop)."
        )
    source, steps = make_source(config, stage)
    options = {
        "seed": config.seed,
        "num_threads": config.data.threads,
        "num_workers": config.data.workers,
        "mesh": mesh,
    }
    if batching == "fixed":
        check_one_size(source)
        return loaders.make_loader(
            source,
            batch_size=config.batch_size,
            transforms=[*steps, stage.prepare],
            **options,
        )
    return _planned(config, stage, source, steps, options)


def check_one_size(source) -> None:
    """Raises ValueError where records that are to be stacked have several sizes."""
    sizes = getattr(source, "sizes", None)
    if sizes is None or not np.ptp(sizes, axis=0).any():
        return
    raise ValueError(
        f"config.data.batching 'fixed' takes records of one size, these have "
        f"{len(np.unique(sizes, axis=0))}; set it to 'pack' or 'bucket', or config.data.width and "
        "height to fit them to one."
    )


def make_source(config, stage) -> tuple[Any, list]:
    """A source of records and the transforms that choose and change what a record shows."""
    # `get`: the configs of earlier runs lack these keys.
    data = config.data
    opening = [clips.ReadWindow()] if data.get("random_start", False) else []
    flipping = [transforms.HorizontalFlip()] if data.flip else []
    if config.stage != "dit":
        return mixture.make_mixture(data, sources.make_source), [*opening, *flipping]
    pick = make_pick(config, stage)
    source = mixture.make_mixture(data, functools.partial(_part, config=config, stage=stage))
    cached = [is_cached(part) for part in mixture.parts_of(source)]
    if any(cached) != all(cached):
        raise ValueError(
            "config.data.parts mixes cached latents and pixels; give every part a cache, or none."
        )
    if not any(cached):
        return source, [*opening, pick, *flipping]
    drawing = [latents.SampleLatents()] if data.get("sample_posterior", False) else []
    first = data.get("first_frames", 0)
    cutting = [latents.FirstFrames(first)] if first else []
    beside = Beside() if stage.pictures is None else stage.pictures.of_records
    return source, [*drawing, *cutting, pick, beside]  # last: draws depend on the place in the list


def make_pick(config, stage) -> latent_cache.PickCaption:
    if config.data.get("caption_fps", False) and config.data.get("text_embeddings", False):
        raise ValueError(
            "config.data.caption_fps adds to captions, whose embeddings config.data."
            "text_embeddings reads as they were made; set one of them to False."
        )
    return latent_cache.PickCaption(
        stage.text.tokenizer,
        config.text_tokens,
        fps=config.data.get("caption_fps", False),
        embedding=config.data.get("text_embeddings", False),
    )


def _part(settings: Mapping[str, Any], *, config, stage) -> Any:
    """The source of one part of `config.data`, or its cache."""
    vae, text = _encoders(config)
    shown = {}
    if stage.pictures is not None:
        seen = stage.pictures.feature_rows > 0
        image = str(frozen.path_of(config, "image_checkpoint")) if seen else ""
        shown = {"pictures": stage.pictures.cached, "image_folder": image}
    if settings["kind"] == "latents":
        return open_cache(settings["path"], vae, text, **shown)
    if not settings["cache"]:
        return sources.make_source(settings)
    # What is encoded once shows one window for ever.
    found = sources.make_source({**settings, "random_start": False})
    return latent_cache.build(
        found,
        vae,
        settings["cache"],
        clips=settings["cache_clips"],
        text_folder=text,
        text_tokens=config.text_tokens,
        **shown,
    )


def _encoders(config) -> tuple[str, str]:
    """Folders of the VAE and, where the captions' embeddings are cached, of the text encoder."""
    cached = config.data.get("text_embeddings", False)
    keys = ("vae_checkpoint", "text_checkpoint" if cached else "")
    vae, text = (str(frozen.path_of(config, k)) if k and config[k] else "" for k in keys)
    return vae, text


def open_cache(
    path: str,
    vae_folder: str,
    text_folder: str = "",
    *,
    pictures: str = "",
    image_folder: str = "",
) -> latents.LatentSource:
    """The cache at `path`, made by `sora-jax data cache`.

    Args:
      text_folder: whose text encoder must have encoded its captions; "" asks for none.
      pictures: the mask whose frames it must hold; "" asks for none.
      image_folder: whose image encoder must have seen them; "" asks for none.

    Raises:
      ValueError: it is not complete, other encoders made it, or of other pictures.
    """
    source = latents.LatentSource(path)
    found = source.meta.get("pictures")
    if pictures and found != pictures:
        made = f"with --pictures {found}" if found else "without --pictures"
        raise ValueError(
            f"the latents in {path} were made {made}, config.tasks.weights asks for {pictures!r}; "
            f"encode them again with `sora-jax data cache --pictures {pictures}`, or change "
            "config.tasks.weights."
        )
    wanted = [("vae", "latents", vae_folder, vae_hash(Path(vae_folder)))]
    if text_folder:
        wanted.append(("text", "captions' embeddings", text_folder, text_hash(Path(text_folder))))
    if image_folder:
        seen = image_hash(Path(image_folder))
        wanted.append(("image", "pictures' features", image_folder, seen))
    for name, what, given, value in wanted:
        found = source.meta.get(f"{name}_hash")
        if found != value:
            raise ValueError(
                f"the {what} in {path} were made by the {name} encoder {found}, "
                f"config.{name}_checkpoint {given} is {value}; encode them again with `sora-jax "
                f"data cache`, or set config.{name}_checkpoint to the folder that made them."
            )
    return source


def is_cached(source) -> bool:
    return isinstance(source, latents.LatentSource)


def latent_sizes(source, vae_config, *, first_frames: int = 0) -> Int[np.ndarray, "r 3"]:
    """Latent frames, rows and columns of every record, cached or not."""
    if is_cached(mixture.parts_of(source)[0]):
        sizes = np.asarray(source.sizes)
    else:
        pixels = np.asarray(source.sizes)
        time, space = vae_config.scale_factor_temporal, vae_config.scale_factor_spatial
        sizes = np.stack(
            [1 + (pixels[:, 0] - 1) // time, pixels[:, 1] // space, pixels[:, 2] // space], axis=1
        )
    if first_frames:
        sizes = np.minimum(sizes, [[first_frames, *[np.iinfo(np.int32).max] * 2]])
    return sizes.astype(np.int32)


def text_lengths(source, pick: latent_cache.PickCaption) -> Int[np.ndarray, "r 2"]:
    """Most tokens that the caption of each record may have, and most texts."""
    if not all(is_cached(part) for part in mixture.parts_of(source)):
        return np.full((len(source), 2), (pick.max_tokens, 1))  # unknown until they are read
    known = {
        id(part): np.array(
            [
                pick.longest(words, fps)
                for words, fps in zip(part.captions, part.fps.tolist(), strict=True)
            ]
        )
        for part in mixture.parts_of(source)
    }
    if not isinstance(source, mixture.MixtureSource):
        return known[id(source)]
    located = (source.locate(i) for i in range(len(source)))
    return np.array([known[id(part)][within] for part, within in located])


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """A record of latents and a caption as tokens of a packed row.

    Args:
      temporal: video frames in a latent one; of a time-stamped caption each token follows the text
        of its time. None: such a caption is one text, as one of pixels is.
    """

    tokenizer: Tokenizer
    text_tokens: int
    patch_size: tuple[int, int, int]
    temporal: int | None = None

    def __call__(self, record: Mapping[str, Any]) -> Segment:
        x = np.asarray(record["latents"], np.float32)
        tokens = self._patches(x)
        beside = {"image_emb": record.get("image_emb")}
        beside["given"] = self._patches(record["given"]) if "given" in record else None
        grid = [n // p for n, p in zip(x.shape[:3], self.patch_size, strict=True)]
        positions = np.indices(grid, np.int32).reshape(3, -1).T
        if "text_emb" in record:
            return Segment(tokens, positions, [record["text_emb"][: self.text_tokens]], **beside)
        words, of_latents = [timed.as_one(record["caption"])], np.zeros(len(x), np.int32)
        if self.temporal is not None and timed.is_timed(record["caption"]):
            words, of_latents = timed.latent_texts(
                record["caption"],
                frames=1 + (len(x) - 1) * self.temporal,
                fps=record["fps"],
                temporal=self.temporal,
            )
        ids, mask = self.tokenizer.batch(
            words, length=self.text_tokens, max_length=self.text_tokens
        )
        texts = [np.asarray(row[real], np.int32) for row, real in zip(ids, mask, strict=True)]
        text_of_tokens = of_latents[:: self.patch_size[0]][positions[:, 0]]
        return Segment(tokens, positions, texts, text_of_tokens, **beside)

    def _patches(self, x: np.ndarray) -> np.ndarray:
        """As dit.patchify makes them on devices."""
        pt, ph, pw = self.patch_size
        return einops.rearrange(x, "(f i) (h j) (w k) c -> (f h w) (i j k c)", i=pt, j=ph, k=pw)


@dataclasses.dataclass(frozen=True)
class PackRows:
    """Rows of records to one batch of packed rows."""

    segment: Segmenter
    settings: PackSettings

    def __call__(self, rows: list[list[dict]]) -> dict[str, np.ndarray]:
        packed = [packing.pack([self.segment(r) for r in row], self.settings) for row in rows]
        return {name: np.stack([row[name] for row in packed]) for name in packed[0]}


@dataclasses.dataclass(frozen=True)
class StackRows:
    """Rows of one record each, all of one size, to a batch."""

    prepare: Callable[[dict], dict]

    def __call__(self, rows: list[list[dict]]) -> dict[str, np.ndarray]:
        records = [self.prepare(record) for (record,) in rows]
        return {name: np.stack([r[name] for r in records]) for name in records[0]}


def _as_they_are(rows: list) -> list:
    return rows


class EncodingLoader(Iterator[dict[str, np.ndarray]]):
    """A loader of pixels of mixed sizes, encoded in groups of equal size, then collated."""

    def __init__(self, loader: loaders.Loader, encode: ClipEncoder, collate: Callable) -> None:
        self._loader, self._encode, self._collate = loader, encode, collate
        self.get_state, self.set_state = loader.get_state, loader.set_state
        self.close, self.records = loader.close, loader.records

    @property
    def batches_read(self) -> int:
        return self._loader.batches_read

    def __next__(self) -> dict[str, np.ndarray]:
        rows = next(self._loader)
        step = self._encode.config.scale_factor_temporal
        flat = [latent_cache.whole_chunks(r["video"], step) for row in rows for r in row]
        encoded = iter(self._encode(flat))
        rows = [
            [{**record, "latents": next(encoded).mean.astype(np.float32)} for record in row]
            for row in rows
        ]
        for record in (record for row in rows for record in row):
            del record["video"]
        return self._collate(rows)


def pack_settings(config) -> PackSettings:
    return PackSettings(**config.data.pack.to_dict(), rows=config.batch_size)


def _planned(config, stage, source, steps, options):
    """Packed rows or buckets; see packing.py."""
    sizes = latent_sizes(source, stage.vae_config, first_frames=config.data.get("first_frames", 0))
    patch = np.array(stage.dit_config.patch_size)
    bad = np.flatnonzero((sizes % patch).any(axis=1) | (sizes < patch).any(axis=1))
    if len(bad):
        raise ValueError(
            f"record {bad[0]} has latents of {tuple(sizes[bad[0]].tolist())} (frames, rows, "
            f"columns), which patches of {tuple(patch.tolist())} do not tile ({len(bad)} records "
            "like it); build the set with sides that are multiples of "
            f"{patch[1:].max() * stage.vae_config.scale_factor_spatial} pixels."
        )
    tokens = np.prod(sizes // patch, axis=1)
    lengths = Lengths(tokens, *text_lengths(source, make_pick(config, stage)).T)
    if config.data.batching == "pack":
        settings = pack_settings(config)
        plan = packing.PackPlan(lengths, settings, seed=config.seed)
        known = is_cached(mixture.parts_of(source)[0])  # else nothing says how many texts there are
        temporal = stage.vae_config.scale_factor_temporal if known else None
        segment = Segmenter(
            stage.text.tokenizer, config.text_tokens, stage.dit_config.patch_size, temporal
        )
        collate = PackRows(segment, settings)
    else:
        plan = packing.BucketPlan(
            lengths,
            [tuple(size) for size in sizes.tolist()],
            tokens=config.data.bucket_tokens,
            seed=config.seed,
            multiple=config.optim.accumulate * sharding.axis_size(options["mesh"], "batch"),
        )
        collate = StackRows(stage.prepare)
    if is_cached(mixture.parts_of(source)[0]):
        return loaders.make_planned_loader(
            source, plan, collate=collate, transforms=steps, **options
        )
    encode = ClipEncoder(_encoders(config)[0])
    pixels = loaders.make_planned_loader(
        source, plan, collate=_as_they_are, transforms=steps, **options
    )
    return EncodingLoader(pixels, encode, collate)
