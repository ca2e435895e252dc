"""Stands for process_file: clips of a few bytes, quickly, and every way to fail."""

import hashlib
import io
import os
import signal
import time
from pathlib import Path

import numpy as np
from PIL import Image

from sora_jax.data.build.stages import staged_path


def process(file, settings, staging):
    """Three clips of every file; what its text says happens first."""
    text = Path(file.path).read_text()
    if "slow" in text:
        time.sleep(0.05)
    if "hang" in text:
        time.sleep(600)
    if "segfault" in text:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "raise" in text:
        raise ZeroDivisionError("no frame rate")
    if "full" in text:
        raise OSError(28, "No space left on device")
    row = {
        "source": file.key, "error": None, "stage": None, "warning": None, "codec": "h264",
        "width": 64, "height": 32, "fps": 8.0, "seconds": 3.0, "clips": [],
    }  # fmt: skip
    if "broken" in text:
        return {**row, "error": "cannot be decoded", "stage": "probe"}
    for i in range(3):
        key = f"{file.key}#{8 * i:08d}"
        digest = hashlib.sha256((text if "same" in text else key).encode()).digest()
        data = picture(digest)
        staged_path(staging, key).write_bytes(data)
        row["clips"].append(
            {
                "key": key, "start": float(i), "end": i + 1.0, "dropped": None,
                "width": 64, "height": 32, "num_frames": 1, "fps": 0.0, "bytes": len(data),
                "caption_kinds": [kind for kind, _ in file.captions],
                "captions": [text for _, text in file.captions],
                "scores": {"luma": 0.5 * i, "motion": float(digest[1])},
                "phash": digest[2:10].hex(),
            }
        )  # fmt: skip
    row["clips"][1]["dropped"] = {"stage": "motion", "reason": "too little motion"}
    return row


def picture(digest: bytes) -> bytes:
    seed = int.from_bytes(digest[:8])
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 64, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def make_files(folder: Path, count: int, text: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.mp4").write_text(f"{text} {i}")
        (folder / f"{i:03d}.txt").write_text(f"caption {i}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a built set, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
