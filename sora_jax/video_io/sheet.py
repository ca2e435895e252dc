"""Pictures of videos for human eyes: contact sheets, grids of videos, fitting and enlarging."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax.video_io.paths import atomic_path, check_output_path

# Sizes differ from clip to clip and between input and output, so they go without letters.
Frames = UInt8[np.ndarray, "_ _ _ 3"]
Image = UInt8[np.ndarray, "_ _ 3"]

SAVED_IMAGES = (".png", ".jpg", ".jpeg", ".webp")
PAPER, INK, FAINT = (250, 249, 246), (32, 32, 36), (120, 120, 126)
LEGIBLE_WIDTHS = (128, 320)  # frames outside are enlarged, or shrunk, to these pixels
GAP, MARGIN = 6, 16
CAPTION_POINTS, NUMBER_POINTS = 16, 12


def fit(frame: Image, size: tuple[int, int]) -> Image:
    """`frame` filling `size` (height, width): the centre of the same shape, resized.

    Areas are averaged on the way down (no aliasing); cubic interpolation on the way up.
    """
    import cv2

    have_h, have_w, _ = frame.shape
    want_h, want_w = size
    if want_h < 1 or want_w < 1:
        raise ValueError(f"size {size} (height, width); both must be at least 1.")
    scale = max(want_h / have_h, want_w / have_w)
    crop_h, crop_w = (min(have_h, round(want_h / scale)), min(have_w, round(want_w / scale)))
    crop_h, crop_w = max(crop_h, 1), max(crop_w, 1)
    top, left = (have_h - crop_h) // 2, (have_w - crop_w) // 2
    centre = np.ascontiguousarray(frame[top : top + crop_h, left : left + crop_w])
    if (crop_h, crop_w) == (want_h, want_w):
        return centre
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(centre, (want_w, want_h), interpolation=method)


def pad(frame: Image, size: tuple[int, int]) -> Image:
    """`frame` whole within `size` (height, width), resized, black bars beside it."""
    have_h, have_w, _ = frame.shape
    scale = min(size[0] / have_h, size[1] / have_w)
    inner = (max(1, round(have_h * scale)), max(1, round(have_w * scale)))
    padded = np.zeros((*size, 3), np.uint8)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    padded[top : top + inner[0], left : left + inner[1]] = fit(frame, inner)
    return padded


def enlarge(frames: Frames, scale: float | int) -> Frames:
    """`frames` at `scale` times the size: whole factors repeat pixels, others use Lanczos.

    Repeated pixels show exactly what a model drew; a shrinking scale averages areas.
    """
    import cv2

    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale {scale}; give a number above 0.")
    if scale == 1:
        return frames
    size = (max(1, round(frames.shape[2] * scale)), max(1, round(frames.shape[1] * scale)))
    method = cv2.INTER_LANCZOS4
    if scale < 1:
        method = cv2.INTER_AREA
    elif float(scale).is_integer():
        method = cv2.INTER_NEAREST
    return np.stack([cv2.resize(frame, size, interpolation=method) for frame in frames])


def contact_sheet(
    clips: Frames | Sequence[Frames],
    *,
    columns: int | None = None,
    scale: float | int | None = None,
    labels: Sequence[str] | None = None,
) -> Image:
    """A picture of one clip (every frame, in rows) or of several (one captioned row each).

    Every frame carries its number. Of several clips each shows at most `columns` frames, spread
    evenly from its first to its last.

    Args:
      columns: frames in a row; by default at most 8.
      scale: enlargement; by default what makes a frame 128 to 320 pixels wide.
      labels: a caption above each clip; wrapped to the width of its row.

    Raises:
      ValueError: no clips, a clip without frames, or as many labels as there are not clips.
    """
    single = isinstance(clips, np.ndarray)
    clips = [clips] if single else list(clips)
    if not clips or any(0 in clip.shape for clip in clips):
        raise ValueError("contact sheet of nothing: give at least one clip with at least a frame.")
    if labels is not None and len(labels) != len(clips):
        raise ValueError(f"{len(labels)} labels for {len(clips)} clips; give one for each.")
    if columns is not None and columns < 1:
        raise ValueError(f"columns {columns}; give at least 1.")
    columns = columns or min(8, max(len(clip) for clip in clips))
    bands = []
    for i, clip in enumerate(clips):
        count = len(clip) if single else min(columns, len(clip))
        indices = np.linspace(0, len(clip) - 1, count).round().astype(int)
        factor = scale or _legible_scale(clip.shape[2])
        tiles = enlarge(clip[indices], factor)
        label = labels[i] if labels else None
        bands.append(_band(tiles, indices, columns=columns, label=label))
    return _stack(bands)


def _legible_scale(width: int) -> float | int:
    least, most = LEGIBLE_WIDTHS
    return max(1, math.ceil(least / width)) if width <= most else most / width


def _font(points: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=points)


def _band(tiles: np.ndarray, indices: np.ndarray, *, columns: int, label: str | None) -> np.ndarray:
    """One clip's caption and rows of numbered frames, as an image without outer margins."""
    from PIL import Image as PilImage
    from PIL import ImageDraw

    count, height, width, _ = tiles.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    number_height = NUMBER_POINTS + 6
    lines = _wrap(label, columns * (width + GAP) - GAP) if label else []
    head = len(lines) * (CAPTION_POINTS + 6) + (2 if lines else 0)
    size = (columns * (width + GAP) - GAP, head + rows * (height + number_height))
    band = PilImage.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(band)
    for i, line in enumerate(lines):
        draw.text((0, i * (CAPTION_POINTS + 6)), line, fill=INK, font=_font(CAPTION_POINTS))
    for i, (tile, index) in enumerate(zip(tiles, indices, strict=True)):
        left = (i % columns) * (width + GAP)
        top = head + (i // columns) * (height + number_height)
        band.paste(PilImage.fromarray(tile), (left, top))
        draw.text(
            (left + width / 2, top + height + 1),
            str(index),
            fill=FAINT,
            font=_font(NUMBER_POINTS),
            anchor="ma",
        )
    return np.asarray(band)


def _wrap(text: str, width: int) -> list[str]:
    """Lines of `text` that each fit into `width` pixels; a longer word is cut."""
    font = _font(CAPTION_POINTS)
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:
            keep = len(word)
            while keep > 1 and font.getlength(word[:keep]) > width:
                keep -= 1
            lines[-1:] = [line for line in (lines[-1], word[:keep]) if line] + [""]
            word = word[keep:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]


def _stack(bands: list[np.ndarray]) -> np.ndarray:
    width = max(band.shape[1] for band in bands) + 2 * MARGIN
    height = sum(band.shape[0] for band in bands) + MARGIN * (len(bands) - 1) + 2 * MARGIN
    sheet = np.full((height, width, 3), PAPER, np.uint8)
    top = MARGIN
    for band in bands:
        sheet[top : top + band.shape[0], MARGIN : MARGIN + band.shape[1]] = band
        top += band.shape[0] + MARGIN
    return sheet


def tile_videos(clips: Sequence[Frames], *, columns: int | None = None, gap: int = 4) -> Frames:
    """One video that plays all `clips` side by side, in a grid as square as can be.

    A shorter clip holds its last frame, a smaller one is centred in its cell.
    """
    if not clips or any(0 in clip.shape for clip in clips):
        raise ValueError("grid of nothing: give at least one clip with at least one frame.")
    columns = columns or math.ceil(math.sqrt(len(clips)))
    if columns < 1:
        raise ValueError(f"columns {columns}; give at least 1.")
    columns = min(columns, len(clips))
    rows = math.ceil(len(clips) / columns)
    num_frames, height, width, _ = np.max([clip.shape for clip in clips], axis=0)
    shape = (num_frames, rows * (height + gap) + gap, columns * (width + gap) + gap, 3)
    grid = np.full(shape, PAPER, np.uint8)
    for i, clip in enumerate(clips):
        top = gap + (i // columns) * (height + gap) + (height - clip.shape[1]) // 2
        left = gap + (i % columns) * (width + gap) + (width - clip.shape[2]) // 2
        held = clip[np.minimum(np.arange(num_frames), len(clip) - 1)]
        grid[:, top : top + clip.shape[1], left : left + clip.shape[2]] = held
    return grid


def save_image(path: str | os.PathLike, image: Image) -> Path:
    """Writes `image` as .png, .jpg or .webp by an atomic rename, and returns the path."""
    from PIL import Image as PilImage

    path = check_output_path(path, allowed=SAVED_IMAGES)
    options = {} if path.suffix.lower() == ".png" else {"quality": 95}
    with atomic_path(path) as temporary:
        PilImage.fromarray(image).save(temporary, **options)
    return path
