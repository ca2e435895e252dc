"""Random-access sources of records: Paperworld, folders of real videos, TFDS sets.

A record is a dictionary `video` (uint8 F H W 3), `caption` (str) and `fps` (float); record i of
a source is a pure function of i. Sources only look up and decode: what is done to records is in
`transforms`, their order in `loader`.
"""

import concurrent.futures
import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from sora_jax import video_io

KINDS = ("paperworld", "folder", "tfds", "clips")  # and "latents", which training opens itself
MANY_FILES = 200  # from here on, indexing shows a progress bar
PROBES_AT_ONCE = 8


class Record(TypedDict):
    """One clip: RGB frames in 0..255, its caption, and frames per second."""

    video: UInt8[np.ndarray, "F H W 3"]
    caption: str
    fps: float


@runtime_checkable
class Source(Protocol):
    """What the loader reads from.

    Packing and buckets also need `sizes`, an array (records, 3) of frames, height and width of
    every record, known without reading any; all sources here have it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def equal_sizes(frames: int, height: int, width: int, *, length: int) -> Int[np.ndarray, "r 3"]:
    """The `sizes` of a source whose records are all alike; takes no memory."""
    return np.broadcast_to(np.array([frames, height, width], np.int32), (length, 3))


class FolderReport(NamedTuple):
    """What a folder holds, in files, and why files were left out."""

    files: int  # used
    clips: int
    images_left_out: int  # a clip of several frames cannot be made of a picture
    short_left_out: int
    damaged_left_out: int
    without_caption: int  # among the used

    def __str__(self) -> str:
        counts = [
            (self.images_left_out, "images (they are used only for num_frames = 1)"),
            (self.short_left_out, "too short"),
            (self.damaged_left_out, "damaged"),
        ]
        left_out = ", ".join(f"{n} {why}" for n, why in counts if n) or "nothing"
        return (
            f"{self.clips} clips of {self.files} files, {self.without_caption} of them without "
            f"caption; left out: {left_out}"
        )


@dataclasses.dataclass(frozen=True)
class FolderSettings:
    """How clips are cut from the files of a folder.

    Raises:
      ValueError: a size, count, rate or stride that is not positive.
    """

    height: int
    width: int
    num_frames: int
    fps: float
    stride: float | None = None  # seconds between starts in one file; None: clips do not overlap
    clips_per_file: int | None = None  # at most so many, spread evenly; None: all that fit
    require_captions: bool = False
    skip_damaged: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or value is None:
                continue
            if not value > 0:
                raise ValueError(f"folder {field.name} {value} is not above 0.")

    @property
    def seconds_apart(self) -> float:
        return self.num_frames / self.fps if self.stride is None else self.stride


class FolderSource:
    """Clips of every video and image under `path`, with captions from sidecar `.txt` files.

    `dir/name.mp4` takes its caption from `dir/name.txt`. Hidden files are ignored. Files are
    probed once, here, in the order of their names; an image makes a clip of one frame, so images
    are used only where `num_frames` is 1. `report` says what was left out and why.

    Raises:
      ValueError: no such directory, nothing usable in it, a damaged file (unless `skip_damaged`)
        or a missing caption (if `require_captions`); one line that names the files.
    """

    def __init__(self, path: str | os.PathLike, settings: FolderSettings) -> None:
        self.path = Path(path)
        self.settings = settings
        files = _media_files(self.path)
        infos, damaged = _probe_all(files)
        if damaged and not settings.skip_damaged:
            raise ValueError(
                f"{damaged[0]} ({len(damaged)} of {len(files)} files of {self.path} are damaged; "
                "remove them, or set skip_damaged to leave them out.)"
            )
        self._files: list[Path] = []
        self._infos: list[video_io.VideoInfo] = []
        self._captions: list[str] = []
        clips: list[tuple[int, float]] = []
        images = short = 0
        for file, info in infos.items():
            starts = _clip_starts(info, settings)
            if len(starts) == 0:
                is_image = info.duration == 0
                images, short = images + is_image, short + (not is_image)
                continue
            clips += [(len(self._files), start) for start in starts]
            self._files.append(file)
            self._infos.append(info)
            self._captions.append(_caption(file, required=settings.require_captions))
        self.report = FolderReport(
            files=len(self._files),
            clips=len(clips),
            images_left_out=images,
            short_left_out=short,
            damaged_left_out=len(damaged),
            without_caption=self._captions.count(""),
        )
        if not clips:
            longest = max((info.duration for info in infos.values()), default=0.0)
            raise ValueError(
                f"{self.path}: no clip of {settings.num_frames} frames at {settings.fps:g} fps in "
                f"{len(files)} files (the longest lasts {longest:.2f} s; {self.report}); lower "
                "the number of frames or raise fps."
            )
        self._file_of_clip = np.array([file for file, _ in clips], np.int32)
        self._start_of_clip = np.array([start for _, start in clips], np.float64)

    @property
    def sizes(self) -> Int[np.ndarray, "r 3"]:
        s = self.settings
        return equal_sizes(s.num_frames, s.height, s.width, length=len(self))

    def __len__(self) -> int:
        return len(self._file_of_clip)

    def clip(self, index: int) -> tuple[Path, float]:
        """The file that clip `index` is cut from, and the second it starts at."""
        return self._files[self._file_of_clip[index]], float(self._start_of_clip[index])

    def __getitem__(self, index: int) -> Record:
        file = int(self._file_of_clip[index])
        path, start = self.clip(index)
        settings = self.settings
        clip = video_io.read_video(
            path,
            start=start,
            num_frames=settings.num_frames,
            fps=settings.fps,
            size=(settings.height, settings.width),
            info=self._infos[file],
        )
        return Record(video=clip.frames, caption=self._captions[file], fps=float(settings.fps))

    def __repr__(self) -> str:
        return f"FolderSource({str(self.path)!r}, {self.settings})"


def _media_files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give a folder of videos or images.")
    files = [
        file
        for file in path.rglob("*")
        if file.suffix.lower() in video_io.READABLE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    ]
    if not files:
        raise ValueError(
            f"{path}: no video or image in it; put files of {', '.join(video_io.READABLE_SUFFIXES)}"
            " there, with captions in .txt files of the same names."
        )
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _probe_all(files: Sequence[Path]) -> tuple[dict[Path, video_io.VideoInfo], list[str]]:
    """What each readable file holds, and one line for each that is not."""
    from rich.progress import track

    infos, damaged = {}, []
    with concurrent.futures.ThreadPoolExecutor(PROBES_AT_ONCE) as pool:
        results = pool.map(_probe_or_error, files)
        bar = track(
            zip(files, results, strict=True),
            description="Looking at the videos",
            total=len(files),
            disable=len(files) < MANY_FILES,
        )
        for file, result in bar:
            if isinstance(result, video_io.VideoInfo):
                infos[file] = result
            else:
                damaged.append(result)
    return infos, damaged


def _probe_or_error(file: Path) -> video_io.VideoInfo | str:
    try:
        return video_io.probe(file)
    except ValueError as error:
        return str(error)


def _clip_starts(info: video_io.VideoInfo, settings: FolderSettings) -> list[float]:
    """Seconds at which the clips of one file start."""
    if info.duration == 0:
        return [0.0] if settings.num_frames == 1 else []
    available = video_io.frames_available(info, start=0, fps=settings.fps)
    if available < settings.num_frames:
        return []
    count = 1 + int((available - settings.num_frames) / (settings.seconds_apart * settings.fps))
    chosen = np.arange(count)
    if settings.clips_per_file is not None and settings.clips_per_file < count:
        chosen = np.linspace(0, count - 1, settings.clips_per_file).round()
    return [float(i * settings.seconds_apart) for i in chosen]


def _caption(file: Path, *, required: bool) -> str:
    sidecar = file.with_suffix(".txt")
    if not sidecar.is_file():
        if required:
            raise ValueError(
                f"{file}: no caption; write {sidecar.name} beside it, or allow empty captions "
                "with require_captions = False."
            )
        return ""
    try:
        return " ".join(sidecar.read_text("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{sidecar}: the caption is not UTF-8 text; save it as UTF-8.") from error


class TfdsSource:
    """A TFDS set prepared as ArrayRecord files, read without TensorFlow.

    Args:
      path: the folder of the prepared set, the one that holds `dataset_info.json`, or one above
        with a single such folder in it.

    Raises:
      ValueError: no such set, split or feature; one line.
    """

    def __init__(self, path: str | os.PathLike, split: str = "train") -> None:
        import tensorflow_datasets as tfds

        found = sorted(info.parent for info in Path(path).rglob("dataset_info.json"))
        if len(found) != 1:
            raise ValueError(
                f"{path}: {len(found)} prepared TFDS sets under it; give the folder of one."
            )
        builder = tfds.builder_from_directory(found[0])
        missing = {"video", "caption"} - set(builder.info.features)
        if missing:
            raise ValueError(
                f"{path}: records have {', '.join(builder.info.features)} but not "
                f"{', '.join(sorted(missing))}; prepare the set with these features."
            )
        if split not in builder.info.splits:
            raise ValueError(
                f"{path}: no split {split!r}; use one of {', '.join(builder.info.splits)}."
            )
        self.path, self.split = Path(path), split
        self._records = builder.as_data_source(split)

    @property
    def sizes(self) -> Int[np.ndarray, "r 3"]:
        return equal_sizes(*self[0]["video"].shape[:3], length=len(self))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        caption = record["caption"]
        caption = caption.decode("utf-8") if isinstance(caption, bytes) else str(caption)
        return Record(
            video=np.asarray(record["video"]), caption=caption, fps=float(record.get("fps", 0))
        )

    def __repr__(self) -> str:
        return f"TfdsSource({str(self.path)!r}, {self.split!r})"


def make_source(config: Any, *, split: str = "train") -> Source:
    """The source that `config.data` describes.

    Args:
      config: the `data` part of a config, or a dict, with kind, path, width, height, frames, fps
        and seed.
      split: "train", or another split of a Paperworld or TFDS set; a folder has only "train".

    Raises:
      ValueError: an unknown kind (did you mean), or whatever the source itself refuses.
    """
    kind = config["kind"]
    if kind == "paperworld":
        from sora_jax.data.paperworld.settings import PaperworldSettings
        from sora_jax.data.paperworld.source import PaperworldSource

        settings = PaperworldSettings(
            width=config["width"],
            height=config["height"],
            frames=config["frames"],
            fps=config["fps"],
            **_world(config.get("world") or {}, PaperworldSettings),
        )
        return PaperworldSource(config["seed"], settings, split)
    if kind in ("folder", "tfds", "clips") and not config["path"]:
        raise ValueError(f"data.kind {kind!r} needs a directory; set config.data.path.")
    if kind in ("folder", "clips") and split != "train":
        raise ValueError(f"a {kind} source has no split {split!r}; use 'train'.")
    if kind == "clips":
        from sora_jax.data.clips import ClipSettings, ClipSource

        size = (config["height"], config["width"])
        settings = ClipSettings(
            frames=config["frames"],
            fps=config["fps"],
            size=size if any(size) else None,
            random_start=config.get("random_start", False),
        )
        return ClipSource(config["path"], settings)
    if kind == "folder":
        settings = FolderSettings(
            height=config["height"],
            width=config["width"],
            num_frames=config["frames"],
            fps=config["fps"],
        )
        return FolderSource(config["path"], settings)
    if kind == "tfds":
        return _checked_shape(TfdsSource(config["path"], split), config)
    if kind == "latents":
        raise ValueError(
            f"data.kind {kind!r} has no videos, only latents of them for training; use one of "
            f"{', '.join(KINDS)}."
        )
    kinds = (*KINDS, "latents")
    close = difflib.get_close_matches(str(kind), kinds, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"unknown data.kind {kind!r}: use one of {', '.join(kinds)}{hint}")


def _world(shares: Any, settings: type) -> dict[str, float]:
    """The shares of `config.data.world`; ValueError for a name that the settings do not have."""
    known = {field.name for field in dataclasses.fields(settings)}
    known -= {"width", "height", "frames", "fps"}
    for name in shares:
        if name not in known:
            raise ValueError(
                f"config.data.world.{name} is unknown; use one of {', '.join(sorted(known))}."
            )
    return dict(shares)


def _checked_shape(source: TfdsSource, config: Any) -> TfdsSource:
    have = source[0]["video"].shape
    want = (config["frames"], config["height"], config["width"], 3)
    if have != want:
        raise ValueError(
            f"{source.path}: clips are {have[0]} frames of {have[2]}x{have[1]}, but the config "
            f"says {want[0]} of {want[2]}x{want[1]}; change config.data.frames, width and height."
        )
    return source
