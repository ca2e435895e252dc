"""The record of a built set: one clip as MP4 bytes (an image: PNG) with captions and scores.

Records lie in ArrayRecord shards as tf.train.Example messages, so that TFDS reads them with or
without TensorFlow:

  clip           bytes of an MP4 (H.264, short GOPs, constant frame rate) or of a PNG
  key            source # index of the first frame; unique in a set
  source         path of the source, relative to the input's root
  captions       any number, with their kinds in caption_kinds ("sidecar", "short", ...)
  width, height  pixels
  num_frames     1 for an image
  fps            frames a second; 0 for an image
  start, end     seconds in the source
  scores         JSON object of numbers; see build.settings.SCORE_UNITS
  phash          perceptual hash of the middle frame, 16 hexadecimal digits
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

FEATURES = tfds.features.FeaturesDict(
    {
        "clip": tfds.features.Tensor(shape=(), dtype=np.object_),
        "key": tfds.features.Text(),
        "source": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "caption_kinds": tfds.features.Sequence(tfds.features.Text()),
        "width": np.int32,
        "height": np.int32,
        "num_frames": np.int32,
        "fps": np.float32,
        "start": np.float32,
        "end": np.float32,
        "scores": tfds.features.Text(),
        "phash": tfds.features.Text(),
    }
)
INDEX_FIELDS = ("num_frames", "height", "width", "fps")  # of index.npz, one array each
_PNG = b"\x89PNG\r\n\x1a\n"


class ClipRecord(NamedTuple):
    """One record with Python's own types; `clip` is still encoded."""

    clip: bytes
    key: str
    source: str
    captions: list[str]
    caption_kinds: list[str]
    width: int
    height: int
    num_frames: int
    fps: float
    start: float
    end: float
    scores: dict[str, float]
    phash: str


def record_from_row(row: Mapping[str, Any], clip: bytes, *, source: str) -> ClipRecord:
    """The record of one kept clip of a FileResult; `clip` holds its staged bytes."""
    fields = {name: row[name] for name in ClipRecord._fields if name not in ("clip", "source")}
    return ClipRecord(clip=clip, source=source, **fields)


def serialize(record: ClipRecord) -> bytes:
    """The bytes of `record` in a shard; equal records give equal bytes.

    Raises:
      ValueError: as many captions as there are not kinds of them.
    """
    if len(record.captions) != len(record.caption_kinds):
        raise ValueError(
            f"{record.key}: {len(record.captions)} captions of {len(record.caption_kinds)} kinds; "
            "give one kind for each."
        )
    example = record._asdict()
    example["scores"] = json.dumps(record.scores, sort_keys=True)
    return _deterministic(FEATURES.serialize_example(FEATURES.encode_example(example)))


def _deterministic(example: bytes) -> bytes:
    # Protocol buffers keep the entries of a map in an order that differs from run to run.
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


def parse(example: Mapping[str, Any] | bytes) -> ClipRecord:
    """A record from what a TFDS data source gives for it, or from the bytes of a shard."""
    if isinstance(example, bytes):
        example = FEATURES.deserialize_example_np(example)
    return ClipRecord(
        clip=bytes(example["clip"]),
        key=_text(example["key"]),
        source=_text(example["source"]),
        captions=[_text(text) for text in example["captions"]],
        caption_kinds=[_text(text) for text in example["caption_kinds"]],
        width=int(example["width"]),
        height=int(example["height"]),
        num_frames=int(example["num_frames"]),
        fps=float(example["fps"]),
        start=float(example["start"]),
        end=float(example["end"]),
        scores=json.loads(_text(example["scores"])),
        phash=_text(example["phash"]),
    )


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def decode_clip(
    data: bytes, *, start: int = 0, num_frames: int | None = None, stride: int = 1
) -> UInt8[np.ndarray, "F H W 3"]:
    """Frames start, start + stride, ... of an encoded clip, as upright RGB.

    Decodes from the last key frame at or before `start`, and stops at the last frame wanted.

    Args:
      start: index of the first frame.
      num_frames: how many; None takes all to the end.
      stride: from one frame to the next.

    Raises:
      ValueError: damaged data, or frames that the clip does not have; one line.
    """
    if start < 0 or stride < 1 or (num_frames is not None and num_frames < 1):
        raise ValueError(
            f"clip frames start={start}, num_frames={num_frames}, stride={stride}; start must be "
            "at least 0, the others at least 1."
        )
    frames = _decode_png(data) if data.startswith(_PNG) else _decode_mp4(data, start)
    wanted: list[np.ndarray] = []
    total = 0
    for index, to_rgb in frames:
        total = index + 1
        if index >= start and (index - start) % stride == 0:
            wanted.append(to_rgb())
            if len(wanted) == num_frames:
                break
    if not wanted or len(wanted) < (num_frames or 1):
        raise ValueError(
            f"clip: {num_frames or 1} frames from {start} on with stride {stride} asked for, but "
            f"it has {total}; lower start, num_frames or stride."
        )
    return np.stack(wanted)


def _decode_png(data: bytes) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"clip: damaged PNG ({error}).") from error
    yield 0, lambda: pixels


def _decode_mp4(data: bytes, start: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """Index and conversion to RGB of every frame from the last key frame before `start` on."""
    import av
    from av.video.reformatter import Interpolation

    # Without these flags swscale truncates, which darkens every pixel by 1/255.
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    try:
        with av.open(io.BytesIO(data), format="mp4") as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # clips are decoded side by side by the loader
            first, step = (
                stream.start_time or 0,
                1 / ((stream.average_rate or 1) * stream.time_base),
            )
            if start > 0:
                container.seek(first + round(start * step), stream=stream, backward=True)
            for frame in container.decode(stream):
                yield (
                    round((frame.pts - first) / step),
                    lambda frame=frame: frame.to_ndarray(format="rgb24", interpolation=flags),
                )
    except (av.FFmpegError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"clip: damaged MP4 ({reason}).") from error
