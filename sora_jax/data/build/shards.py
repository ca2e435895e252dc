"""Finished files to shards: duplicates, order and sizes planned as a whole, then one by one.

The plan is a pure function of the rows, whatever order they come in, and a shard's bytes are a
pure function of the plan: any shard can be written by anyone, again, at any time.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sora_jax.data import records
from sora_jax.data.build.settings import BuildSettings
from sora_jax.data.build.similar import first_alike
from sora_jax.data.build.staging import Staging, read_json, write_json

NAME, SPLIT = "clips", "train"  # of the set, in file names as TFDS has them
PATTERN = f"{NAME}-{SPLIT}.array_record-"
WRITER_OPTIONS = "group_size:1,uncompressed"  # any record in one read; video is compressed already


class Kept(NamedTuple):
    """One clip of the set: where its row is, and what the plan and the index need of it."""

    key: str
    source: str
    bytes: int
    phash: str
    num_frames: int
    height: int
    width: int
    fps: float
    captioned: bool
    sharpness: float

    def rank(self) -> tuple:
        """Of clips that look alike, the one that sorts first is worth the most."""
        return not self.captioned, -self.height * self.width, -self.sharpness, self.key


class Plan(NamedTuple):
    """Which clips are in which shard, in order; and the duplicates, each with what it is one of."""

    shards: list[list[Kept]]
    duplicates: dict[str, str]


def make_plan(rows: Iterable[Mapping[str, Any]], settings: BuildSettings) -> Plan:
    """Leaves duplicates out, orders what stays by a hash of its key, and fills shards.

    Of clips that look alike one with a caption stays before one without, then the one of more
    pixels, then the sharper, then the first in the order of keys. A shard holds about
    `write.shard_mebibytes` of clips; all hold about the same.
    """
    kept = [
        _kept(row["source"], clip)
        for row in rows
        for clip in row["clips"]
        if clip["dropped"] is None
    ]
    kept.sort(key=Kept.rank)
    duplicates: dict[str, str] = {}
    if settings.duplicate is not None:
        alike = first_alike([clip.phash for clip in kept], settings.duplicate.max_distance)
        duplicates = {kept[i].key: kept[first].key for i, first in alike.items()}
        kept = [clip for clip in kept if clip.key not in duplicates]
    seed = f"{settings.write.seed}:"
    kept.sort(key=lambda clip: hashlib.sha256((seed + clip.key).encode()).digest())
    return Plan(_fill([clip.bytes for clip in kept], kept, settings), duplicates)


def _kept(source: str, clip: Mapping[str, Any]) -> Kept:
    read = {"source", "captioned", "sharpness"}
    return Kept(
        **{name: clip[name] for name in Kept._fields if name not in read},
        source=source,
        captioned=bool(clip["captions"]),
        sharpness=clip["scores"].get("sharpness", 0.0),
    )


def _fill(sizes: Sequence[int], kept: list[Kept], settings: BuildSettings) -> list[list[Kept]]:
    total = sum(sizes)
    count = max(1, round(total / (settings.write.shard_mebibytes * 2**20)))
    shards: list[list[Kept]] = [[]]
    before = 0
    for size, clip in zip(sizes, kept, strict=True):
        if shards[-1] and before * count >= len(shards) * total:
            shards.append([])
        shards[-1].append(clip)
        before += size
    return shards


def with_captions_alone(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with its clips that have no caption dropped."""
    dropped = {"dropped": {"stage": "caption", "reason": "no caption"}}
    clips = [
        clip if clip["dropped"] or clip["captions"] else clip | dropped for clip in row["clips"]
    ]
    return {**row, "clips": clips}


def final_rows(
    rows: Iterable[Mapping[str, Any]], duplicates: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """The rows as the report shows them: with duplicates among what was dropped."""
    for row in rows:
        clips = [
            clip
            if clip["key"] not in duplicates
            else clip
            | {"dropped": {"stage": "duplicate", "reason": f"looks like {duplicates[clip['key']]}"}}
            for clip in row["clips"]
        ]
        yield {**row, "clips": clips}


def shard_name(index: int, total: int) -> str:
    return f"{PATTERN}{index:05d}-of-{total:05d}"


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """Shard `index` of `total`: (key, source) of its clips in order.

    Attributes:
      digest: of all that decides its bytes: these, and the stamps of the rows that it is made of.
    """

    out: str
    index: int
    total: int
    digest: str
    clips: tuple[tuple[str, str], ...]


def shard_tasks(out: str, plan: Plan, *, made_from: str) -> list[ShardTask]:
    """What `write_shard` is given; `made_from` stands for the rows, whatever is in them."""
    tasks = []
    for index, shard in enumerate(plan.shards):
        clips = tuple((clip.key, clip.source) for clip in shard)
        text = json.dumps([made_from, index, len(plan.shards), clips])
        digest = hashlib.sha256(text.encode()).hexdigest()
        tasks.append(ShardTask(out, index, len(plan.shards), digest, clips))
    return tasks


def is_written(task: ShardTask) -> bool:
    done = read_json(Staging(task.out).shard_path(task.index))
    if done is None or done["plan"] != task.digest:
        return False
    path = Staging(task.out).out / done["file"]
    return path.exists() and path.stat().length == done["bytes"]


def write_shard(task: ShardTask) -> str:
    """Writes one shard whole or not at all, and notes its size and checksum; returns its name.

    Raises:
      OSError: a full disk.
    """
    staging, name = Staging(task.out), shard_name(task.index, task.total)
    if is_written(task):
        return name
    with staging.folder() as folder:
        local = folder / name
        _write_records(local, _records(staging, task))
        done = {
            "plan": task.digest,
            "file": name,
            "records": len(task.clips),
            "bytes": local.stat().st_size,
            "sha256": sha256_of(local),
        }
        staging.publish(local, name)
    write_json(staging.shard_path(task.index), done)
    return name


def written(task: ShardTask) -> dict[str, Any]:
    """What the manifest says of a shard that is written."""
    done = read_json(Staging(task.out).shard_path(task.index))
    return {name: done[name] for name in ("file", "records", "bytes", "sha256")}


def _records(staging: Staging, task: ShardTask) -> Iterator[bytes]:
    @functools.lru_cache(64)
    def clips_of(source: str) -> dict[str, dict[str, Any]]:
        return {clip["key"]: clip for clip in staging.saved(source)[1]["clips"]}

    for key, source in task.clips:
        clip = staging.clip(source, key)
        yield records.serialize(records.record_from_row(clips_of(source)[key], clip, source=source))


def _write_records(path: Path, serialized: Iterable[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
        for record in serialized:
            writer.write(record)
        writer.close()
    except (RuntimeError, ValueError) as error:
        if "No space left" in str(error) or "quota" in str(error):
            raise OSError(28, os.strerror(28), path.name) from error
        raise


def index_bytes(plan: Plan) -> bytes:
    """index.npz: one array a field, a value a record, in the order of the records."""
    clips = [clip for shard in plan.shards for clip in shard]
    kinds = {"num_frames": np.int32, "height": np.int32, "width": np.int32, "fps": np.float32}
    arrays = {
        name: np.array([getattr(clip, name) for clip in clips], kinds[name])
        for name in records.INDEX_FIELDS
    }
    data = io.BytesIO()
    np.savez(data, **arrays)  # with no time in it
    return data.getvalue()


def write_dataset_info(folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """dataset_info.json and features.json, by which TFDS reads the shards.

    Args:
      shards: what the manifest says of each.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, naming

    template = naming.ShardedFileTemplate(
        data_dir=folder, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )
    identity = dataset_info.DatasetIdentity(
        name=NAME, version="1.0.0", data_dir=str(folder), module_name="sora_jax"
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=records.FEATURES,
        description="Clips of videos with captions, built by `sora-jax data build`.",
    )
    info.set_file_format("array_record")
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[shard["records"] for shard in shards],
        num_bytes=sum(shard["bytes"] for shard in shards),
        filename_template=template,
    )
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(folder)


def sha256_of(path: Any) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
