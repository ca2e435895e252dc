"""The first pass: shots and statistics of every frame, from frames reduced to a small size.

Frames are streamed; what stays is about 40 bytes a frame, so that an hour at 25 frames a second
costs 4 MB. Statistics are taken inside the picture: rows and columns at the borders that have been
dark since the shot began do not count.
"""

import array
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from sora_jax.data.build.media import Frame, Media, stated_rate
from sora_jax.data.build.settings import BuildSettings

# OpenCV's DIS flow reads outside its images where they are smaller or longer than this: pictures
# of 24x96, 24x128 and 16x96 crashed it, and its pyramid explains them up to 2:1.
MIN_FLOW_SIDE, MAX_FLOW_ASPECT = 16, 2
HASH_SIDE = 32


class Flow(NamedTuple):
    """Optical flow between pairs of frames: their indices and the mean speed."""

    first: Int[np.ndarray, " k"]
    second: Int[np.ndarray, " k"]
    speed: Float[np.ndarray, " k"]  # % of the longer side a second


class Scan(NamedTuple):
    """What the first pass saw. Of the arrays, entry i belongs to frame i of the stretch read."""

    times: Float[np.ndarray, " n_plus_1"]  # seconds at which frames start, and the last one ends
    rate: Fraction  # frames a second; 0 for an image
    cuts: list[int]  # indices of frames that begin a new shot
    luma: Float[np.ndarray, " n"]  # mean, 0 to 255
    contrast: Float[np.ndarray, " n"]  # standard deviation of luma
    sharpness: Float[np.ndarray, " n"]  # mean squared Laplacian
    difference: Float[np.ndarray, " n"]  # mean change of luma from the frame before
    bars: Int[np.ndarray, "n 4"]  # dark rows and columns: top, bottom, left, right
    hashes: list[int]  # 64-bit perceptual hash of each frame
    flow: Flow
    size: tuple[int, int]  # height, width of the reduced frames
    damage: str | None  # where and why the file breaks off
    whole: bool  # it was read to its end


def scan(
    media: Media, settings: BuildSettings, *, start: float | None = None, end: float | None = None
) -> Scan:
    """Reads a file once, from `start` to `end` seconds.

    Raises:
      ValueError: no frame can be decoded there; one line that does not name the file.
    """
    height, width = reduced_size(media.info.height, media.info.width, settings.scan.size)
    observer = _Observer(settings, (height, width), fps=media.info.fps, still=media.info.is_image)
    whole = True
    for frame in media.frames(start or 0.0):
        # A thousandth of a second forgives times written in decimals.
        if start is not None and frame.time < start - 1e-3:
            continue
        if end is not None and frame.time >= end - 1e-3:
            whole = False
            break
        observer.see(frame)
    if not observer.times:
        why = media.damage or f"it has no frame from {start or 0:g} s on"
        raise ValueError(f"nothing can be decoded ({why}); replace or remove it.")
    return observer.result(media, end, whole=whole)


def reduced_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """(height, width) in the same shape with no side above `longest`; never larger."""
    scale = min(1.0, longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


class _Observer:
    """Takes frames one by one and keeps only numbers."""

    def __init__(
        self, settings: BuildSettings, size: tuple[int, int], *, fps: float, still: bool
    ) -> None:
        self._settings, self._size, self._still = settings, size, still
        self._fps = fps if fps > 0 else 25.0
        self._detector = None
        if settings.shots and not still:
            self._detector = load_detector()(
                threshold=settings.shots.threshold,
                min_scene_len=max(1, round(settings.shots.min_seconds * self._fps)),
            )
        self._flow = _FlowMeter(settings, size)
        self._dark = settings.letterbox.max_luma if settings.letterbox else -1
        self._shot_bars = np.array(size, np.int64).repeat(2)
        self._before: np.ndarray | None = None
        self._last: Frame | None = None
        self.times = array.array("d")
        self._numbers = {
            name: array.array("f") for name in ("luma", "contrast", "sharpness", "difference")
        }
        self._bars, self._hashes, self._cuts = array.array("h"), array.array("Q"), []

    def see(self, frame: Frame) -> None:
        import cv2

        index = len(self.times)
        rgb = frame.reduced(self._size)
        gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
        new_shot = self._find_cuts(index, rgb)
        bars = dark_borders(gray, self._dark)
        self._shot_bars = bars if new_shot else np.minimum(self._shot_bars, bars)
        region = _inside(self._size, self._shot_bars)
        picture = gray[region]
        mean, deviation = cv2.meanStdDev(picture)
        laplacian = cv2.Laplacian(picture, cv2.CV_32F)
        change = 255.0
        if self._before is not None and not new_shot:
            change = cv2.norm(picture, self._before[region], cv2.NORM_L1) / picture.size
        self.times.append(frame.time)
        self._bars.extend(bars.tolist())
        self._hashes.append(perceptual_hash(picture))
        values = (float(mean[0, 0]), float(deviation[0, 0]), float(np.mean(laplacian**2)), change)
        for numbers, value in zip(self._numbers.values(), values, strict=True):
            numbers.append(value)
        if not self._still:
            self._flow.see(index, frame.time, gray, self._shot_bars, new_shot=new_shot)
        self._before, self._last = gray, frame

    def _find_cuts(self, index: int, rgb: np.ndarray) -> bool:
        """Feeds the detector; True where a shot begins at this very frame."""
        if self._detector is None:
            return index == 0
        from scenedetect import FrameTimecode

        found = self._detector.process_frame(
            FrameTimecode(index, fps=self._fps), np.ascontiguousarray(rgb[..., ::-1])
        )
        self._cuts.extend(cut.frame_num for cut in found)
        return index == 0 or any(cut.frame_num == index for cut in found)

    def result(self, media: Media, end: float | None, *, whole: bool) -> Scan:
        last_end = self._last.time + self._last.length
        if end is not None:
            last_end = max(min(last_end, end), self._last.time + 1e-3)
        times = np.array([*self.times, last_end], np.float64)
        count = len(self.times)
        return Scan(
            times=times,
            rate=Fraction(0) if self._still else stated_rate(times, media.info.fps),
            cuts=sorted({cut for cut in self._cuts if 0 < cut < count}),
            **{name: np.array(values, np.float32) for name, values in self._numbers.items()},
            bars=np.array(self._bars, np.int16).reshape(count, 4),
            hashes=list(self._hashes),
            flow=self._flow.result(),
            size=self._size,
            damage=media.damage,
            whole=whole,
        )


class _FlowMeter:
    """Mean optical flow between frames a fixed time apart, never across a cut."""

    def __init__(self, settings: BuildSettings, size: tuple[int, int]) -> None:
        import cv2

        self._apart = 1 / settings.scan.flow_fps
        self._size = height, width = reduced_size(*size, settings.scan.flow_size)
        least = max(MIN_FLOW_SIDE, -(-max(height, width) // MAX_FLOW_ASPECT))
        self._padding = max(0, least - height), max(0, least - width)
        self._scale = np.array(self._size, np.float64) / size
        self._dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self._reference: tuple[int, float, np.ndarray] | None = None
        self._first, self._second = array.array("q"), array.array("q")
        self._speed = array.array("f")

    def see(
        self, index: int, time: float, gray: np.ndarray, bars: np.ndarray, *, new_shot: bool
    ) -> None:
        import cv2

        if new_shot:
            self._reference = None
        # A hundredth of a second, so that 8 a second of 25 are every third frame, not the fourth.
        if self._reference is not None and time < self._reference[1] + self._apart - 0.01:
            return
        small = cv2.resize(gray, self._size[::-1], interpolation=cv2.INTER_AREA)
        below, beside = self._padding
        small = cv2.copyMakeBorder(small, 0, below, 0, beside, cv2.BORDER_REPLICATE)
        if self._reference is not None:
            first, since, before = self._reference
            height, width = self._size
            flow = self._dis.calc(before, small, None)[:height, :width]
            scaled = np.rint(bars * self._scale.repeat(2)).astype(np.int64)
            speed = np.linalg.norm(flow[_inside(self._size, scaled)], axis=-1).mean()
            self._first.append(first)
            self._second.append(index)
            self._speed.append(100 * float(speed) / max(self._size) / (time - since))
        self._reference = index, time, small

    def result(self) -> Flow:
        return Flow(
            np.array(self._first, np.int64),
            np.array(self._second, np.int64),
            np.array(self._speed, np.float32),
        )


def load_detector() -> type:
    """PySceneDetect's ContentDetector.

    Raises:
      ImportError: the package is missing, and how to install it; one line.
    """
    try:
        from scenedetect import ContentDetector
    except ImportError as error:
        raise ImportError(
            "finding shots needs PySceneDetect; run pip install 'sora_jax[data]', or set "
            "shots.enabled = False."
        ) from error
    return ContentDetector


def dark_borders(gray: UInt8[np.ndarray, "H W"], max_luma: int) -> Int[np.ndarray, " 4"]:
    """How many rows at the top and bottom, columns at the left and right are dark throughout.

    A picture that is dark throughout counts as all border from every side.
    """
    counts = []
    for brightest in (gray.max(axis=1), gray.max(axis=0)):
        light = np.flatnonzero(brightest > max_luma)
        if len(light):
            counts += [light[0], len(brightest) - 1 - light[-1]]
        else:
            counts += [len(brightest), len(brightest)]
    return np.array(counts, np.int64)


def _inside(size: tuple[int, int], bars: np.ndarray) -> tuple[slice, slice]:
    """The picture within the bars; all of it where they would leave too little."""
    region = []
    for side, first, last in ((size[0], bars[0], bars[1]), (size[1], bars[2], bars[3])):
        whole = side - first - last < max(4, side // 8)
        region.append(slice(None) if whole else slice(int(first), int(side - last)))
    return region[0], region[1]


def perceptual_hash(gray: UInt8[np.ndarray, "H W"]) -> int:
    """64 bits that change little with size, compression and brightness (pHash).

    The signs of the 8 x 8 lowest frequencies of a DCT of 32 x 32 pixels, around their median; the
    constant term, which is brightness, gives bit 0 always.
    """
    import cv2

    small = cv2.resize(gray, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:8, :8].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
