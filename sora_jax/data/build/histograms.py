"""Summaries of any number of values in bounded memory: histograms, counters, samples.

None depends on the order in which values come, so that workers may finish in any order and a
report is the same, byte for byte. A histogram fills fine fixed bins and joins them when it is
shown: `as_dict` gives `edges` (n + 1 of them), `kept` and `dropped` (n each), what lies outside
(`below`, `above`: [kept, dropped] each), `min`, `max` and `median` of the kept values, `scale`
("linear" or "log").
"""

import hashlib
import heapq
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

FEWEST_BARS, MOST_BARS = 8, 24  # as many as values fill: about twice their root
TAIL = 0.002  # share of all values that the bars may leave out on either side
OTHER = "other"


def stable_hash(text: str) -> int:
    """64 bits that depend on `text` alone: not on the process, its seed or the machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_number(value: Any) -> bool:
    """Whether `value` can be put in a bin: finite, and neither None nor a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class _Histogram:
    """Fine bins of kept and dropped values; subclasses say which bin a value falls into."""

    scale = "linear"

    def __init__(self, bins: int, unit: str) -> None:
        self.unit = unit
        self._fine = np.zeros((2, bins + 2), np.int64)  # the first and the last are outside
        self._min, self._max = math.inf, -math.inf

    def add(self, value: float | int, *, dropped: bool = False) -> None:
        """Counts `value`, which must be finite (`is_number`)."""
        bins = self._fine.shape[1] - 2
        self._fine[int(dropped), min(max(self._bin(value), -1), bins) + 1] += 1
        if not dropped:
            self._min, self._max = min(self._min, value), max(self._max, value)

    def __bool__(self) -> bool:
        return bool(self._fine.any())

    def as_dict(self) -> dict[str, Any]:
        both = self._fine.sum(0)
        inside = both[1:-1]
        first, last = self._shown(inside)
        most = min(max(FEWEST_BARS, round(2 * math.sqrt(both.sum()))), MOST_BARS)
        joined = self._joined(first, last, most)
        first, outside = first // joined * joined, self._fine.shape[1] - 1
        bars = max(1, -(-(last + 1 - first) // joined))
        kept, dropped = (self._bars(row, first, joined, bars) for row in self._fine)
        shown = {
            "unit": self.unit,
            "scale": self.scale,
            "edges": [self._edge(first + i * joined) for i in range(bars + 1)],
            "kept": kept,
            "dropped": dropped,
            "below": self._fine[:, : first + 1].sum(1).tolist(),
            "above": self._fine[:, min(1 + first + bars * joined, outside) :].sum(1).tolist(),
        }
        if self._fine[0].any():
            shown |= {"min": _short(self._min), "max": _short(self._max)}
            shown["median"] = self._median()
        return shown

    def _shown(self, inside: np.ndarray) -> tuple[int, int]:
        """The first and last fine bin that bars are drawn for."""
        occupied = np.flatnonzero(inside)
        if not len(occupied):
            return 0, 0
        total = np.cumsum(inside)
        first = int(np.searchsorted(total, TAIL * total[-1], side="right"))
        last = int(np.searchsorted(total, (1 - TAIL) * total[-1], side="left"))
        # A far tail is left out only where it makes the rest too narrow to see.
        if occupied[-1] - occupied[0] <= 2 * (last - first + 1):
            first, last = int(occupied[0]), int(occupied[-1])
        return first, last

    @staticmethod
    def _bars(row: np.ndarray, first: int, joined: int, bars: int) -> list[int]:
        part = row[1 + first : min(1 + first + bars * joined, len(row) - 1)]
        padded = np.pad(part, (0, bars * joined - len(part)))
        return padded.reshape(bars, joined).sum(1).tolist()

    def _median(self) -> float | int:
        total = np.cumsum(self._fine[0])
        middle = int(np.searchsorted(total, (total[-1] + 1) // 2)) - 1
        value = self._middle(middle) if 0 <= middle < self._fine.shape[1] - 2 else math.inf
        # Exact where all values are alike.
        return _short(min(max(value, self._min), self._max))

    def _bin(self, value: float | int) -> int:
        raise NotImplementedError

    def _edge(self, fine: int) -> float | int:
        raise NotImplementedError

    def _middle(self, fine: int) -> float | int:
        raise NotImplementedError

    def _joined(self, first: int, last: int, most: int) -> int:
        """How many fine bins make one bar, so that there are about `most` at most."""
        raise NotImplementedError


class Linear(_Histogram):
    """Bins of equal width from `low`; bars are 1, 2 or 5 times a power of ten of them wide."""

    def __init__(
        self, width: float | int, bins: int, unit: str = "", *, low: float | int = 0
    ) -> None:
        super().__init__(bins, unit)
        self._width, self._low = width, low

    def _bin(self, value):
        # A hair more, because 0.3 / 0.1 is below 3.
        return math.floor((value - self._low) / self._width + 1e-6)

    def _edge(self, fine):
        return _short(self._low + fine * self._width)

    def _middle(self, fine):
        return self._low + (fine + 0.5) * self._width

    def _joined(self, first, last, most):
        steps = (m * 10**p for p in range(9) for m in (1, 2, 5))
        return next(step for step in steps if (last + 1 - first // step * step) <= most * step)


class Counts(Linear):
    """Whole numbers from 0, one a bin; a bar ends before the next begins."""

    def __init__(self, most: int, unit: str = "") -> None:
        super().__init__(1, most + 1, unit)

    def _middle(self, fine):
        return fine


class Log(_Histogram):
    """Bins of equal ratio from 2**low to 2**high, `per_octave` of them each time value doubles.

    Args:
      centred: 1 is the middle of a bin instead of an edge (for ratios).
    """

    scale = "log"

    def __init__(
        self, low: int, high: int, unit: str = "", *, per_octave: int = 8, centred: bool = False
    ) -> None:
        super().__init__((high - low) * per_octave, unit)
        self._low, self._per_octave, self._centred = low, per_octave, centred

    def _at(self, value: float | int) -> float | int:
        return (math.log2(value) - self._low) * self._per_octave + 0.5 * self._centred

    def _bin(self, value):
        return math.floor(self._at(value) + 1e-9) if value > 0 else -1

    def _value(self, fine: float | int) -> float | int:
        return 2.0 ** ((fine - 0.5 * self._centred) / self._per_octave + self._low)

    def _edge(self, fine):
        return _short(self._value(fine))

    def _middle(self, fine):
        return self._value(fine + 0.5)

    def _joined(self, first, last, most):
        if self._centred:
            return 1
        steps = [step for step in (1, 2, 4, 8) if self._per_octave % step == 0]
        fits = (s for s in steps if last + 1 - first // s * s <= most * s)
        return next(fits, steps[-1])


class Score:
    """A score of any range: several histograms at once, of which the narrowest that fits shows."""

    def __init__(self, unit: str = "") -> None:
        self._linear = [(top, Linear(top / 100, 100, unit)) for top in (1, 10, 100, 256)]
        self._log = Log(-20, 40, unit, per_octave=8)
        self._low, self._high = math.inf, -math.inf

    def add(self, value: float | int, *, dropped: bool = False) -> None:
        """Counts `value`, which must be finite."""
        self._low, self._high = min(self._low, value), max(self._high, value)
        for top, histogram in self._linear:
            # The top itself belongs into the last bin.
            histogram.add(math.nextafter(top, 0) if value == top else value, dropped=dropped)
        self._log.add(value, dropped=dropped)

    def __bool__(self) -> bool:
        return bool(self._log)

    def as_dict(self) -> dict[str, Any]:
        fits = (h for top, h in self._linear if self._low >= 0 and self._high <= top)
        return next(fits, self._log).as_dict()


class Tally:
    """How often each of a few words came; beyond `most` different ones, the rest is "other"."""

    def __init__(self, most: int = 512) -> None:
        self._most, self._counts = most, {}

    def add(self, word: str) -> None:
        if word not in self._counts and len(self._counts) >= self._most:
            word = OTHER
        self._counts[word] = self._counts.get(word, 0) + 1

    def as_dict(self) -> dict[str, int]:
        """The most frequent first, "other" last."""
        return dict(sorted(self._counts.items(), key=lambda i: (i[0] == OTHER, -i[1], i[0])))


class Sample:
    """A random sample of at most `size` items: those whose keys have the smallest hashes."""

    def __init__(self, size: int) -> None:
        self._size, self._heap = size, []  # of (-hash, key, item): the largest hash on top

    def add(self, key: str, item: Any) -> None:
        """`item` as the one of `key`; a key is to come once."""
        entry = (-stable_hash(key), key, id(item), item)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        elif self._heap and entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def __iter__(self) -> Iterator[Any]:
        """The items by key."""
        return (entry[3] for entry in sorted(self._heap, key=lambda e: e[1]))


def _short(value: float | int) -> float | int:
    """Six digits are enough for a reader, and the same wherever the last bit differs."""
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() else rounded
