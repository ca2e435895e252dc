"""A plug-in score: how much of the picture is covered by lines of text.

It goes by the shape that strong edges of printed letters make when they run together: wide, dense
blobs of the height of a line. It sees titles, subtitles and captions that are set horizontally, in
light on dark or dark on light, in scripts of separate strokes, from 1/60 to 1/5 of the height of
the picture. It does not see text that is vertical, tilted by more than about 15 degrees, in
handwriting that is joined up, smaller or larger than that, or of low contrast; and it takes for
text what has the same texture: fences, blinds, rows of windows. It reads nothing. On a few frames:
a page of print scores .44, a title card .03, one line of subtitles .01 to .05; bikes.mp4 and
carphone, which have no text, up to .008, but the grass and leaves of Big Buck Bunny up to .04.

c.scores.text_area = ConfigDict({"function": "sora_jax.data.build.text_area:text_area", "max": 0.1})
"""

import numpy as np
from jaxtyping import UInt8

HEIGHT = 240  # pixels that frames are resized to; the sizes below count in these
LINE_HEIGHTS = (5, 48)
MIN_ASPECT = 2.0  # width by height of a line
MIN_FILL = 0.5  # share of a line's box that is covered by strokes run together
MIN_EDGE = 60  # of 255: strength of an edge of a letter
MIN_TWO_TONES = 0.70  # share of variance between ink and paper; 0.75 where all tones are as common
STROKES_PER_HEIGHT = 1.2  # changes from light to dark along a line, for every height of width


def text_area(frames: UInt8[np.ndarray, "k H W 3"]) -> float:
    """The median over the frames of the share of pixels in boxes around lines of text, 0 to 1."""
    return float(np.median([_share(frame) for frame in frames]))


def _share(frame: np.ndarray) -> float:
    import cv2

    width = max(16, round(frame.shape[1] * HEIGHT / frame.shape[0]))
    gray = cv2.cvtColor(cv2.resize(frame, (width, HEIGHT)), cv2.COLOR_RGB2GRAY)
    gradient = cv2.morphologyEx(gray, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    strong = (gradient >= MIN_EDGE).astype(np.uint8)
    # Gaps between letters and words are closed along the line, not across lines.
    joined = cv2.morphologyEx(strong, cv2.MORPH_CLOSE, np.ones((1, 9), np.uint8))
    joined = cv2.morphologyEx(joined, cv2.MORPH_OPEN, np.ones((3, 5), np.uint8))
    count, _, boxes, _ = cv2.connectedComponentsWithStats(joined)
    covered = 0
    for left, top, box_width, box_height, pixels in boxes[1:count]:
        if not LINE_HEIGHTS[0] <= box_height <= LINE_HEIGHTS[1]:
            continue
        if box_width < MIN_ASPECT * box_height or pixels < MIN_FILL * box_width * box_height:
            continue
        box = gray[top : top + box_height, left : left + box_width]
        enough = STROKES_PER_HEIGHT * box_width / box_height
        if _two_tones(box) >= MIN_TWO_TONES and _strokes(box) >= enough:
            covered += int(box_width) * int(box_height)
    return covered / gray.size


def _two_tones(box: np.ndarray) -> float:
    """Share of the variance that the best split into light and dark explains (Otsu)."""
    tones = np.sort(box.ravel()).astype(np.float64)
    below = np.arange(1, len(tones))
    sums = np.cumsum(tones)
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(tones) - below)
    between = below * (len(tones) - below) * (high - low) ** 2 / len(tones) ** 2
    return float(between.max() / max(tones.var(), 1e-9))


def _strokes(box: np.ndarray) -> float:
    """How often the middle rows of a box change between light and dark."""
    third = len(box) // 3
    rows = box[third : len(box) - third].astype(np.int16)
    light = rows > (int(rows.max()) + int(rows.min())) // 2
    return float(np.mean(np.count_nonzero(light[:, 1:] != light[:, :-1], axis=1)))
