"""Near-duplicates among 64-bit perceptual hashes, found without comparing every two."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

BITS, BANDS = 64, 4
WIDTH = BITS // BANDS
MOST_FLIPS = 2  # bits of a band; beyond, 1 + 16 + 120 + 560 places to look at cost more than a scan


def first_alike(phashes: Sequence[str], max_distance: int) -> dict[int, int]:
    """Index of every hash that is like an earlier one that stays, with the index of that one.

    Hashes are taken in order. One that differs in at most `max_distance` bits from any that has
    stayed so far goes, for the first such; else it stays. One that goes takes nothing with it, so
    a chain of small changes is not swallowed whole. An empty hash is like none.

    Of two hashes at distance D, some quarter (a band of 16 bits) differs in at most D // 4: each
    is looked up in four tables, under its bands with up to so many bits flipped.
    """
    flips = max_distance // BANDS
    if flips > MOST_FLIPS:
        return _by_scan(phashes, max_distance)
    masks = [
        sum(1 << bit for bit in bits)
        for count in range(flips + 1)
        for bits in itertools.combinations(range(WIDTH), count)
    ]
    tables: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]
    values: dict[int, int] = {}  # of those that stay
    gone: dict[int, int] = {}
    for index, text in enumerate(phashes):
        if not text:
            continue
        value = int(text, 16)
        candidates = (
            other
            for table, band in zip(tables, _bands(value), strict=True)
            for mask in masks
            for other in table.get(band ^ mask, ())
        )
        near = min(
            (o for o in candidates if (values[o] ^ value).bit_count() <= max_distance),
            default=None,
        )
        if near is not None:
            gone[index] = near
            continue
        values[index] = value
        for table, band in zip(tables, _bands(value), strict=True):
            table.setdefault(band, []).append(index)
    return gone


def _bands(value: int) -> Iterator[int]:
    return ((value >> (WIDTH * band)) & ((1 << WIDTH) - 1) for band in range(BANDS))


def _by_scan(phashes: Sequence[str], max_distance: int) -> dict[int, int]:
    """The same, comparing each with all that stay; for distances at which bands find too much."""
    values = np.zeros(len(phashes), np.uint64)
    places = np.zeros(len(phashes), np.int64)
    count, gone = 0, {}
    for index, text in enumerate(phashes):
        if not text:
            continue
        value = np.uint64(int(text, 16))
        near = np.flatnonzero(np.bitwise_count(values[:count] ^ value) <= max_distance)
        if near.size:
            gone[index] = int(places[near[0]])
            continue
        values[count], places[count] = value, index
        count += 1
    return gone
