"""Clips of a set that `sora-jax data build` made: at their own sizes, or all fitted to one."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sora_jax import video_io
from sora_jax.data.transforms import RandomTransform


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """What of each clip is read.

    Raises:
      ValueError: a size, count or rate out of range.
    """

    frames: int  # at most so many; with `size`, exactly so many
    fps: float | int = 0.0  # frames a second they are resampled to; 0 keeps each clip's own
    size: tuple[int, int] | None = None  # height and width that all are fitted to; None: their own
    multiple: int = 16  # sides are cut to a multiple of so many pixels
    frame_step: int = 4  # clips have 1 + k frame_step frames, as causal VAEs take them
    random_start: bool = False  # a window anywhere in a longer clip, drawn anew in every epoch

    def __post_init__(self) -> None:
        if (
            self.frames < 1
            or not 0 <= self.fps < math.inf
            or self.multiple < 1
            or self.frame_step < 1
        ):
            raise ValueError(
                f"clips of {self.frames} frames at {self.fps} fps, in multiples of "
                f"{self.multiple} pixels and {self.frame_step} frames: fps must be 0 (their own) "
                "or more, the others 1 or more; change config.data."
            )
        if self.size is not None and min(self.size) < 1:
            raise ValueError(
                f"clips fitted to {self.size[1]}x{self.size[0]}; set config.data.width and height "
                "to pixels, or both to 0 for every clip's own size."
            )


class Window(NamedTuple):
    """A clip that is not decoded yet: `read(start)` gives its frames from a start on."""

    read: Callable[[int], np.ndarray]
    last_start: int  # the last frame that a window can start at


class ReadWindow(RandomTransform):
    """Decodes a record's `video`, from a random start; frames of other sources pass through."""

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        window: Window | np.ndarray = record["video"]
        if not isinstance(window, Window):
            return record
        return record | {"video": window.read(int(rng.integers(window.last_start + 1)))}


class ClipSource:
    """Random-access records: `video` (uint8 F H W 3), `caption`, `captions`, `fps`, `key`.

    Clips that are too short for what is asked are left out; `left_out` counts them.

    Attributes:
      sizes: frames, height and width of every record, known without reading any.

    Raises:
      ValueError: no built set at `path`, or no clip that is long and large enough.
    """

    def __init__(self, path: str | Path, settings: ClipSettings) -> None:
        self.path, self.settings = Path(path), settings
        if not (self.path / "index.npz").is_file():
            raise ValueError(f"{path}: no built set; make one with `sora-jax data build`.")
        with np.load(self.path / "index.npz") as index:
            frames, height, width = (index[n] for n in ("num_frames", "height", "width"))
            self._rate = index["fps"].astype(np.float64)
        moving = self._rate > 0
        # Of the clip's own frames, one in so many is shown; an image is its one frame.
        wanted = settings.fps or self._rate
        self._stride = np.where(moving, np.maximum(self._rate / np.where(moving, wanted, 1), 1), 1)
        self._have = frames
        shown = 1 + ((frames - 1) / self._stride + 1e-6).astype(np.int64)
        shown = np.minimum(shown, settings.frames)
        if settings.size is not None:
            usable = shown == settings.frames
            height, width = (np.full_like(frames, side) for side in settings.size)
        else:
            shown = 1 + (shown - 1) // settings.frame_step * settings.frame_step
            height, width = (n // settings.multiple * settings.multiple for n in (height, width))
            usable = (height > 0) & (width > 0)
        self._number = np.flatnonzero(usable)
        self.left_out = int((~usable).sum())
        if not len(self._number):
            raise ValueError(
                f"{path}: none of its {len(frames)} clips has {settings.frames} frames at "
                f"{settings.fps or 'its own'} fps and {settings.multiple} pixels a side; lower "
                "config.data.frames or fps."
            )
        sizes = np.stack([shown, height, width], axis=1)
        self.sizes: Int[np.ndarray, "r 3"] = sizes[self._number].astype(np.int32)
        manifest = json.loads((self.path / "manifest.json").read_text("utf-8"))
        self._files = [str(self.path / shard["file"]) for shard in manifest["shards"]]
        self._reader = None

    @property
    def origin(self) -> dict[str, Any]:
        """What a cache of these records is made of: the set, and what of its clips is read."""
        manifest = (self.path / "manifest.json").read_bytes()
        told = dataclasses.asdict(self.settings) | {
            "set": hashlib.sha256(manifest).hexdigest()[:16]
        }
        return json.loads(json.dumps(told))  # as a file gives it back

    def __len__(self) -> int:
        return len(self._number)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from sora_jax.data import records

        if self._reader is None:  # opened late, so that the source pickles
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            self._reader = ArrayRecordDataSource(self._files)
        number = int(self._number[index])
        record = records.parse(self._reader[number])
        frames, height, width = self.sizes[index].tolist()
        stride = float(self._stride[number])
        offsets = np.floor(np.arange(frames) * stride + 1e-6).astype(int)

        def read(start: int) -> np.ndarray:
            count = int(offsets[-1]) + 1
            video = records.decode_clip(record.clip, start=start, num_frames=count)[offsets]
            if self.settings.size is not None:
                return np.stack([video_io.fit(frame, (height, width)) for frame in video])
            top, left = (video.shape[1] - height) // 2, (video.shape[2] - width) // 2
            return video[:, top : top + height, left : left + width]

        last = int(self._have[number]) - 1 - int(offsets[-1])
        video = Window(read, last) if self.settings.random_start else read(0)
        captions = record.captions or [""]
        return {
            "video": video,
            "caption": captions[0],
            "captions": captions,
            "fps": record.fps / stride,
            "key": record.key,
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    def __repr__(self) -> str:
        return f"ClipSource({str(self.path)!r}, {self.settings})"
