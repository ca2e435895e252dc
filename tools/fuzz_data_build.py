"""Builds a set out of damaged videos: nothing may crash or hang, and each file is accounted for.

python tools/fuzz_data_build.py --count 1000 --seed 0

Small MP4s of several layouts are damaged at random: bytes flipped anywhere or in the headers, cut
off, parts swapped, repeated or put in, emptied, under a wrong extension, with huge declared sizes.
Prints what became of each kind of damage and the reasons given; exit status 1 if a file is neither
accepted nor named with a reason, or if what was accepted cannot be read again.
"""

import argparse
import collections
import json
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from sora_jax.data.build import settings

# What the workers of a build do not need is imported below: they import this file too.

SECONDS, MEBIBYTES = 30.0, 1024  # for one file
# What is written over a size or a count.
HUGE = (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x40000000, 0x00FFFFFF, 65_535, 0)
BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"mdat", b"ftyp", b"stsd", b"avc1", b"avcC")
TABLES = (b"stts", b"ctts", b"stsz", b"stsc", b"stco", b"stss", b"elst")


def healthy(rng: np.random.Generator) -> list[bytes]:
    """MP4s with the index behind, in front and in fragments; with sound; with B-frames."""
    layouts = [
        ({}, {}, False),
        ({"movflags": "faststart"}, {"bf": "0"}, False),
        ({"movflags": "frag_keyframe+empty_moov"}, {"g": "4"}, False),
        ({}, {"bf": "2", "g": "12"}, True),
    ]
    return [_encode(rng, *layout) for layout in layouts]


def _encode(rng: np.random.Generator, container: dict, codec: dict, sound: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w", options=container) as output:
            video = output.add_stream("libx264", rate=12, options={"preset": "ultrafast", **codec})
            video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
            audio = output.add_stream("aac", rate=16_000, layout="mono") if sound else None
            picture = rng.integers(0, 256, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            for k in range(24):
                frame = av.VideoFrame.from_ndarray(np.roll(picture, 3 * k, 1), format="rgb24")
                output.mux(video.encode(frame))
            output.mux(video.encode())
            if audio is not None:
                _encode_sound(output, audio)
        return path.read_bytes()


def _encode_sound(output: av.container.OutputContainer, audio: av.AudioStream) -> None:
    wave = np.sin(np.arange(32_000) / 9).astype(np.float32)[None]
    for start in range(0, 32_000, 1024):
        part = np.ascontiguousarray(wave[:, start : start + 1024])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        output.mux(audio.encode(frame))
    output.mux(audio.encode())


def _flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 2, 8, 64, 512))):
        data[rng.randrange(len(data))] = rng.randrange(256)


def _flip_header(data: bytearray, rng: random.Random) -> None:
    start = max(0, data.find(b"moov"))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data[rng.randrange(start, min(len(data), start + 1200))] = rng.randrange(256)


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(1, len(data)) :]


def _swap(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((4, 16, 256, 2048))
    a, b = (rng.randrange(max(1, len(data) - size)) for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def _insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.choice((1, 7, 4096)))


def _repeat(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.choice((8, 512, 4096))] * rng.choice((1, 20))


def _empty(data: bytearray, rng: random.Random) -> None:
    data.clear()


def _declare(data: bytearray, rng: random.Random) -> None:
    """A huge size of a box, number of entries, length in time, or picture."""
    places = {
        "box": [(at - 4, 4) for name in BOXES for at in _found(data, name)],
        "count": [(at + 8, 4) for name in TABLES for at in _found(data, name)],
        "size": [(at + 8 + 4 * k, 4) for at in _found(data, b"stsz") for k in range(6)],
        "time": [(at + 12 + 4 * k, 4) for at in _found(data, b"mdhd") for k in range(3)]
        + [(at + 16 + 4 * k, 4) for at in _found(data, b"mvhd") for k in range(2)],
        "picture": [(at + 28 + 2 * k, 2) for at in _found(data, b"avc1") for k in range(2)]
        + [(at + 80 + 4 * k, 4) for at in _found(data, b"tkhd") for k in range(2)],
    }
    places = {what: spots for what, spots in places.items() if spots}
    for _ in range(rng.choice((1, 1, 2))):
        at, size = rng.choice(places[rng.choice(sorted(places))])
        value = struct.pack(">I", rng.choice(HUGE))[-size:]
        data[at : at + size] = value


def _found(data: bytearray, name: bytes) -> list[int]:
    found, at = [], data.find(name)
    while at >= 4:
        found.append(at)
        at = data.find(name, at + 1)
    return found


MUTATIONS = {
    "bytes flipped": _flip,
    "header flipped": _flip_header,
    "cut off": _cut,
    "parts swapped": _swap,
    "bytes put in": _insert,
    "part repeated": _repeat,
    "empty": _empty,
    "huge sizes": _declare,
    "extension": None,
}
OTHERS = (".png", ".gif", ".webm", ".jpg", ".webp", ".mkv", ".mov")


def write_damaged(folder: Path, count: int, seed: int) -> dict[str, str]:
    """Writes `count` damaged files; returns the kind of damage by name."""
    rng = random.Random(seed)
    bases = healthy(np.random.default_rng(seed))
    pictures = {".txt": b"no video at all\n" * 50, ".bin": rng.randbytes(5000)}
    kinds = {}
    for i in range(count):
        kind = list(MUTATIONS)[i % len(MUTATIONS)]
        data, suffix = bytearray(rng.choice(bases)), ".mp4"
        if kind == "extension":
            if rng.random() < 0.3:
                data = bytearray(rng.choice(list(pictures.values())))
            else:
                suffix = rng.choice(OTHERS)
        else:
            MUTATIONS[kind](data, rng)
        name = f"{i:05d}{suffix}"
        (folder / name).write_bytes(data)
        kinds[name] = kind
    return kinds


def lenient() -> settings.BuildSettings:
    """No filter drops anything: what can be read is kept."""
    return settings.BuildSettings(
        shots=None, length=None, brightness=None, freeze=None, motion=None, blur=None,
        duplicate=None, cut=settings.CutSettings(max_seconds=4.0, max_clips=4),
        write=settings.WriteSettings(preset="ultrafast", shard_mebibytes=1),
        limits=settings.LimitSettings(seconds=SECONDS, mebibytes=MEBIBYTES),
    )  # fmt: skip


def main() -> int:
    from sora_jax.data.build import run

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--keep", metavar="DIR", help="work there, and leave everything there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        damaged = folder / "damaged"
        damaged.mkdir(parents=True)
        kinds = write_damaged(damaged, args.count, args.seed)
        began = time.monotonic()
        report = run.build(
            damaged, folder / "out", lenient(), captions="allow", workers=args.workers
        )
        seconds = time.monotonic() - began
        problems = check(folder / "out", kinds, report)
    show(kinds, report, seconds)
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


def check(out: Path, kinds: dict[str, str], report: dict) -> list[str]:
    """Every file is accepted or named with a reason; all that was accepted is read again."""
    import tensorflow_datasets as tfds

    from sora_jax.data import records
    from sora_jax.data.build import run

    problems = []
    run.verify(out)
    source = tfds.builder_from_directory(out).as_data_source("train")
    kept = set()
    for i in range(len(source)):
        record = records.parse(source[i])
        frames = records.decode_clip(record.clip)
        if frames.shape != (record.num_frames, record.height, record.width, 3):
            problems.append(f"{record.key}: {frames.shape} is not what its record says")
        kept.add(record.source)
    left_out = {file["source"] for file in report["files_left_out"]["files"] if file["reason"]}
    if missing := sorted(set(kinds) - kept - left_out):
        problems.append(f"{len(missing)} files are neither kept nor named: {', '.join(missing)}")
    if both := sorted(kept & left_out):
        problems.append(f"kept and left out: {', '.join(both)}")
    return problems


def show(kinds: dict[str, str], report: dict, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    left_out = {file["source"]: file for file in report["files_left_out"]["files"]}
    warned = {file["source"] for file in report["warnings"]["files"]}
    stages = sorted({file["stage"] for file in left_out.values()})
    table = Table("damage", "files", "accepted", "with a warning", *stages)
    for kind in MUTATIONS:
        names = [name for name, k in kinds.items() if k == kind]
        counts = collections.Counter(left_out[n]["stage"] for n in names if n in left_out)
        good = [name for name in names if name not in left_out]
        cells = [len(names), len(good), len(warned & set(good)), *(counts[s] for s in stages)]
        table.add_row(kind, *map(str, cells))
    console.print(table)
    reasons = Table("files", "reason")
    for reason, count in report["files_left_out"]["by_reason"].items():
        reasons.add_row(str(count), reason)
    console.print(reasons)
    print(json.dumps({"files": len(kinds), "left_out": len(left_out), "seconds": round(seconds)}))


if __name__ == "__main__":
    sys.exit(main())
