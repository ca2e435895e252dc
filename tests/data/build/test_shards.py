"""The plan is a function of the rows alone; shards and what describes them are read by TFDS."""

import random
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sora_jax.data import records
from sora_jax.data.build import shards
from sora_jax.data.build.settings import BuildSettings, DuplicateSettings, WriteSettings
from sora_jax.data.build.similar import first_alike


def first_alike_slowly(phashes, distance):
    stay, gone = [], {}
    for i, text in enumerate(phashes):
        near = [j for j in stay if (int(phashes[j], 16) ^ int(text, 16)).bit_count() <= distance]
        if near:
            gone[i] = near[0]
        else:
            stay.append(i)
    return gone


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7, 8, 11, 12, 20])
def test_banded_search_finds_what_comparing_all_finds(distance):
    rng = random.Random(distance)
    hashes = []
    for _ in range(12):
        seed = rng.getrandbits(64)
        for _ in range(20):
            flips = rng.sample(range(64), rng.randrange(0, 2 * distance + 2))
            hashes.append(seed ^ sum(1 << bit for bit in flips))
    rng.shuffle(hashes)
    texts = [f"{value:016x}" for value in hashes]
    found = first_alike(texts, distance)
    assert found == first_alike_slowly(texts, distance)
    assert found and len(found) < len(texts)


def test_clips_without_a_hash_are_like_none():
    assert first_alike(["", "", "0" * 16, "0" * 16], 4) == {3: 2}
    assert first_alike(["", "", "0" * 16, "0" * 16], 20) == {3: 2}


def row(source, *clips):
    return {"source": source, "error": None, "clips": list(clips)}


def clip(key, *, size=1000, phash=None, dropped=None, captions=("a ball",), sharp=50.0, width=64):
    phash = f"{random.Random(key).getrandbits(64):016x}" if phash is None else phash
    return {
        "key": key, "bytes": size, "phash": phash, "num_frames": 5, "height": 32, "width": width,
        "fps": 8.0, "dropped": dropped, "captions": dict.fromkeys(captions, "text"),
        "scores": {"sharpness": sharp},
    }  # fmt: skip


SETTINGS = BuildSettings(
    duplicate=DuplicateSettings(max_distance=4), write=WriteSettings(shard_mebibytes=1)
)


def test_the_plan_depends_neither_on_the_order_of_files_nor_on_their_names_order():
    rows = [row(f"{i}.mp4", clip(f"{i}.mp4#0", size=60_000)) for i in range(100)]
    plan = shards.make_plan(rows, SETTINGS)
    assert plan == shards.make_plan(reversed(rows), SETTINGS)
    keys = [c.key for shard in plan.shards for c in shard]
    assert sorted(keys) == sorted(r["clips"][0]["key"] for r in rows) and keys != sorted(keys)
    assert len(plan.shards) == 6
    assert {len(shard) for shard in plan.shards} == {16, 17}
    other = BuildSettings(write=WriteSettings(shard_mebibytes=1, seed=1))
    assert keys != [c.key for s in shards.make_plan(rows, other).shards for c in s]


def test_a_shard_is_never_empty_however_large_one_clip_is():
    rows = [row("a", clip("a#0", size=10 << 20), clip("a#1", size=10), clip("a#2", size=10))]
    plan = shards.make_plan(rows, SETTINGS)
    assert all(plan.shards) and sum(map(len, plan.shards)) == 3
    nothing = [row("a", clip("a#0", size=0), clip("a#1", size=0))]
    assert all(shards.make_plan(nothing, SETTINGS).shards)
    assert shards.make_plan([], SETTINGS).shards == [[]]


def test_the_first_key_of_those_that_look_alike_stays_and_the_others_name_it():
    same = "00ff00ff00ff00ff"
    rows = [
        row("b.mp4", clip("b.mp4#8", phash="00ff00ff00ff00fe"), clip("b.mp4#0", phash=same)),
        row("a.mp4", clip("a.mp4#0", phash=same, dropped={"stage": "blur", "reason": "blurred"})),
        row("c.mp4", clip("c.mp4#0")),
    ]
    plan = shards.make_plan(rows, SETTINGS)
    assert plan.duplicates == {"b.mp4#8": "b.mp4#0"}
    assert {c.key for c in plan.shards[0]} == {"b.mp4#0", "c.mp4#0"}
    dropped = {
        c["key"]: c["dropped"]
        for r in shards.final_rows(rows, plan.duplicates)
        for c in r["clips"]
        if c["dropped"]
    }
    assert dropped["b.mp4#8"] == {"stage": "duplicate", "reason": "looks like b.mp4#0"}
    assert dropped["a.mp4#0"]["stage"] == "blur" and len(dropped) == 2
    assert rows[0]["clips"][0]["dropped"] is None  # the rows themselves stay
    without = BuildSettings(duplicate=None)
    assert not shards.make_plan(rows, without).duplicates


@pytest.mark.parametrize(
    "better", [{"captions": ("short",)}, {"width": 128}, {"sharp": 60.0}], ids=["caption", "pixels",
                                                                              "sharpness"]
)  # fmt: skip
def test_of_those_that_look_alike_the_better_one_stays(better):
    poor = {"captions": (), "width": 64, "sharp": 50.0, "phash": "00ff00ff00ff00ff"}
    for later in ({}, {"sharp": 99.0} if "sharp" not in better else {}):
        first, second = clip("a.mp4#0", **poor | later), clip("b.mp4#0", **poor | better)
        plan = shards.make_plan([row("a.mp4", first), row("b.mp4", second)], SETTINGS)
        assert plan.duplicates == {"a.mp4#0": "b.mp4#0"}


def test_tfds_reads_what_is_written(tmp_path):
    made = [
        records.ClipRecord(
            clip=bytes([i]) * 5000, key=f"k{i}", source="s.mp4", captions=["a dog"] * i,
            caption_kinds=["short"] * i, width=64, height=32, num_frames=5, fps=8.0, start=0.0,
            end=1.5, scores={"luma": 1.5}, phash="0" * 16,
        )
        for i in range(3)
    ]  # fmt: skip
    written = []
    for i, part in enumerate((made[:2], made[2:])):
        path = tmp_path / shards.shard_name(i, 2)
        shards._write_records(path, map(records.serialize, part))
        written.append({"records": len(part), "bytes": path.stat().st_size})
    shards.write_dataset_info(tmp_path, written)
    source = tfds.builder_from_directory(tmp_path).as_data_source("train")
    assert [records.parse(source[i]) for i in range(3)] == made
    assert "tensorflow" not in sys.modules


def test_the_index_has_a_value_a_record_and_no_time(tmp_path):
    plan = shards.make_plan([row("a", clip("a#0"), clip("a#1"))], SETTINGS)
    data = shards.index_bytes(plan)
    (tmp_path / "index.npz").write_bytes(data)
    index = np.load(tmp_path / "index.npz")
    assert {name: index[name].tolist() for name in index} == {
        "num_frames": [5, 5], "height": [32, 32], "width": [64, 64], "fps": [8.0, 8.0],
    }  # fmt: skip
    assert data == shards.index_bytes(plan)
