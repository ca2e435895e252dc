"""A video that was made: frames, and all that made them."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sora_jax.convert import folder

_VERSION = "sora_jax"  # the key of metadata that every video made here has


def to_bytes(video: Float[Array, "*b F H W 3"]) -> UInt8[np.ndarray, "*b F H W 3"]:
    """[-1, 1] to 0..255, rounded."""
    return np.asarray(jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5).astype(jnp.uint8))


def array_hash(array: np.ndarray) -> str:
    """First 16 hexadecimal digits of the SHA-256 of an array's values as float32."""
    data = np.ascontiguousarray(array, np.float32).tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def sheet_path(path: str | Path) -> Path:
    """Of the contact sheet beside a video."""
    return Path(path).with_name(f"{Path(path).stem}_sheet.png")


def check_beside(path: str | Path, *, sheet: bool = False) -> None:
    """Raises ValueError unless a video's metadata, and its contact sheet, can lie beside it.

    They cannot where NAME.json is there and of another program, a folder has the name of one of
    them, or the names are too long.
    """
    from sora_jax import video_io

    beside = Path(path).with_suffix(".json")
    for file in (beside, *([sheet_path(path)] if sheet else [])):
        video_io.check_name(file)
        if file.is_dir():
            raise ValueError(
                f"{path}: {file} is written beside it, and is a folder; use another name, or move "
                "that away."
            )
    if not beside.is_file():
        return
    try:
        there = folder.read_json(beside)
        ours = not there or _VERSION in there
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(
            f"{path}: its settings are written to {beside}, and what is there is none of a video; "
            "use another name, or move that file away."
        )


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames with what made them.

    Attributes:
      frames: uint8 (F, H, W, 3), RGB.
      fps: frames a second.
      metadata: prompt, seed, settings, checkpoint hash and version: enough to make it again.
    """

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float
    metadata: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Writes .mp4, .webm, .gif, .webp or .png, and the metadata inside and beside it."""
        from sora_jax import video_io

        path = Path(path)
        video_io.check_output_path(path)
        check_beside(path)
        written = video_io.write_video(path, self.frames, fps=self.fps, metadata=self.metadata)
        folder.write_json(path.with_suffix(".json"), self.metadata)
        return written

    def _repr_html_(self) -> str:
        """A looping player for notebooks, the video inside the page."""
        import base64
        import html
        import tempfile

        from sora_jax import video_io

        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "video.mp4"
            scale = max(1, 256 // self.frames.shape[2])
            large = self.frames.repeat(scale, axis=1).repeat(scale, axis=2)
            video_io.write_video(path, large, fps=self.fps)
            data = base64.b64encode(path.read_bytes()).decode()
        title = html.escape(str(self.metadata.get("prompt", "")), quote=True)
        return (
            f'<video controls loop autoplay muted playsinline title="{title}" '
            f'src="data:video/mp4;base64,{data}"></video>'
        )


@dataclasses.dataclass(frozen=True)
class Film:
    """A video whose frames are made while they are asked for, once.

    Attributes:
      parts: uint8 (n, H, W, 3) each, RGB.
      fps: frames a second.
      metadata: as a video's.
    """

    parts: Iterator[np.ndarray]
    fps: float
    metadata: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """As `Video.save`; .mp4 and .webm take each part as it comes, and forget it."""
        from sora_jax import video_io

        path = Path(path)
        check_beside(path)
        written = video_io.write_video(path, self.parts, fps=self.fps, metadata=self.metadata)
        folder.write_json(path.with_suffix(".json"), self.metadata)
        return written
