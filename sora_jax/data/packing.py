"""Records of mixed sizes into batches of one cost: packed rows, or buckets of equal sizes.

A plan decides from lengths alone which records make batch n, before any is read: a pure function
of (lengths, seed, n), so training resumes at a number, on any number of hosts. Packing is that of
NaViT (Dehghani et al. 2023, arXiv:2307.06304, section 2.2) for video: several clips and images
share one row of a fixed budget of tokens and are told apart by segment ids.
"""

import bisect
import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

PADDING_SEGMENT = -1  # of the places in a row that hold nothing


class Pick(NamedTuple):
    """Record `index` of a source, in its `epoch`-th showing."""

    index: int
    epoch: int


Row = list[Pick]


@runtime_checkable
class Plan(Protocol):
    """Which records make each batch of a run without end."""

    def batch(self, n: int) -> list[Row]:
        """The rows of batch n; a row is the list of records that share it."""
        ...

    @property
    def num_records(self) -> int: ...


class Lengths(NamedTuple):
    """What every record of a source costs, known without reading it."""

    tokens: Int[np.ndarray, " r"]  # video tokens
    text: Int[np.ndarray, " r"]  # text tokens, of its longest caption
    texts: Int[np.ndarray, " r"] | None = None  # of the caption with most stamps; None: one each


def _order(seed: int, epoch: int, num_records: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_records)


class _Epochs:
    """What `make(epoch)` lists, one epoch after the other without end, by number.

    Reader threads ask at once, and worker processes get a copy each; the last two epochs are kept.
    """

    def __init__(self, make: Callable[[int], list]) -> None:
        self.__setstate__({"_make": make})

    def __getitem__(self, n: int) -> tuple[int, Any]:
        """The epoch of item n, and the item."""
        with self._lock:
            while not self._ends or n >= self._ends[-1]:
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before + len(self._of(len(self._ends))))
            epoch = bisect.bisect_right(self._ends, n)
            return epoch, self._of(epoch)[n - (self._ends[epoch - 1] if epoch else 0)]

    def _of(self, epoch: int) -> list:
        if epoch not in self._kept:
            self._kept = {e: items for e, items in self._kept.items() if e >= epoch - 1}
            self._kept[epoch] = self._make(epoch)
        return self._kept[epoch]

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._make: Callable[[int], list] = state["_make"]
        self._ends: list[int] = []  # number of items up to the end of each epoch seen so far
        self._kept: dict[int, list] = {}
        self._lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class PackSettings:
    """Budgets of a packed row.

    Raises:
      ValueError: a budget or count below 1.
    """

    tokens: int  # video tokens a row
    text_tokens: int  # text tokens a row
    max_segments: int  # clips and images a row, at most; one told by k texts counts as k
    look_ahead: int = 64  # rows that are open at a time: more fill better, and mix epochs less
    rows: int = 1  # rows a batch, over all devices and processes

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"data.pack.{field.name} {getattr(self, field.name)} must be 1 or more."
                )


class PackPlan:
    """Best fit with bounded look-ahead: a record goes into the fullest open row that takes it.

    Where none does, a row is opened; with `look_ahead` rows open, the fullest is closed first. At
    the end of an epoch, which has an order of its own, all are closed. With `max_segments` 1 this
    is padding every record to the budget.

    Raises:
      ValueError: a record that fits into no row, or no records.
    """

    def __init__(self, lengths: Lengths, settings: PackSettings, *, seed: int) -> None:
        self.settings, self.seed = settings, seed
        if not len(lengths.tokens):
            raise ValueError("there are no records to pack; give more data.")
        texts = np.ones_like(lengths.tokens) if lengths.texts is None else lengths.texts
        self.lengths = lengths = lengths._replace(texts=texts)
        for name, what, have, most in (
            ("tokens", "video tokens", lengths.tokens, settings.tokens),
            ("text_tokens", "text tokens", lengths.text, settings.text_tokens),
            ("max_segments", "sentences with time stamps", texts, settings.max_segments),
        ):
            if have.max() > most:
                worst = int(have.argmax())
                raise ValueError(
                    f"record {worst} has {have[worst]} {what}, a row takes {most}; raise "
                    f"config.data.pack.{name} or make the clips shorter or smaller."
                )
        self._rows = _Epochs(self._pack)

    @property
    def num_records(self) -> int:
        return len(self.lengths.tokens)

    def __repr__(self) -> str:
        return f"packing by {self.settings}"

    def batch(self, n: int) -> list[Row]:
        first = n * self.settings.rows
        return [self.row(first + i) for i in range(self.settings.rows)]

    def row(self, n: int) -> Row:
        """Row n of all epochs in one sequence."""
        epoch, members = self._rows[n]
        return [Pick(index, epoch) for index in members]

    def fill(self, epoch: int = 0) -> float:
        """Share of the token budget that holds tokens, over the rows of an epoch."""
        rows = self._pack(epoch)
        return float(self.lengths.tokens.sum() / (len(rows) * self.settings.tokens))

    def _pack(self, epoch: int) -> list[list[int]]:
        settings = self.settings
        closed: list[list[int]] = []
        # Open rows in order of the room they have left, the fullest first: (room, number).
        rooms: list[tuple[int, int]] = []
        rows: dict[int, list[int]] = {}
        text_room: dict[int, int] = {}
        segment_room: dict[int, int] = {}
        for count, index in enumerate(_order(self.seed, epoch, self.num_records).tolist()):
            tokens, text, texts = (int(lengths[index]) for lengths in self.lengths)
            at = bisect.bisect_left(rooms, (tokens, -1))
            while at < len(rooms) and (
                text_room[rooms[at][1]] < text or segment_room[rooms[at][1]] < texts
            ):
                at += 1
            if at == len(rooms):
                if len(rooms) == settings.look_ahead:
                    closed.append(rows.pop(rooms.pop(0)[1]))
                room, row = settings.tokens, count
                rows[row], text_room[row] = [], settings.text_tokens
                segment_room[row] = settings.max_segments
            else:
                room, row = rooms.pop(at)
            rows[row].append(index)
            text_room[row] -= text
            segment_room[row] -= texts
            if room == tokens or not segment_room[row]:
                closed.append(rows.pop(row))
            else:
                bisect.insort(rooms, (room - tokens, row))
        return closed + [rows[row] for _, row in rooms]


class BucketPlan:
    """Batches of records of one size each, as many as fit into a budget of tokens.

    A record waits until its bucket fills a batch; what is left at the end of an epoch is filled
    up with the first records of the same bucket. Every size is a shape to compile for.

    Args:
      buckets: the bucket of every record, its size for instance.
      tokens: video tokens a batch, over all devices and processes.
      multiple: batches have a multiple of so many records: the shards of a batch.

    Raises:
      ValueError: a record of more than `tokens / multiple` tokens, or no records.
    """

    def __init__(
        self,
        lengths: Lengths,
        buckets: Sequence[Hashable],
        *,
        tokens: int,
        seed: int,
        multiple: int = 1,
    ) -> None:
        if not len(lengths.tokens):
            raise ValueError("there are no records to batch; give more data.")
        worst = int(lengths.tokens.argmax())
        if lengths.tokens[worst] * multiple > tokens:
            raise ValueError(
                f"record {worst} has {lengths.tokens[worst]} tokens, {multiple} of them do not fit "
                f"into a batch of {tokens}; raise config.data.bucket_tokens."
            )
        self.lengths, self.buckets, self.seed = lengths, list(buckets), seed
        self.tokens, self.multiple = tokens, multiple
        self._size = {
            bucket: tokens // int(lengths.tokens[i]) // multiple * multiple
            for i, bucket in enumerate(self.buckets)
        }
        self._batches = _Epochs(self._fill)

    @property
    def num_records(self) -> int:
        return len(self.buckets)

    def __repr__(self) -> str:
        # Which records a batch has depends on it, and so what is left of an epoch does.
        shared = f", batches of a multiple of {self.multiple}" if self.multiple > 1 else ""
        return f"buckets of {self.tokens} tokens{shared}"

    def batch(self, n: int) -> list[Row]:
        epoch, members = self._batches[n]
        return [[Pick(index, epoch)] for index in members]

    def _fill(self, epoch: int) -> list[list[int]]:
        batches: list[list[int]] = []
        waiting: dict[Hashable, list[int]] = {}
        seen: dict[Hashable, list[int]] = {}
        for index in _order(self.seed, epoch, self.num_records).tolist():
            bucket = self.buckets[index]
            seen.setdefault(bucket, []).append(index)
            waiting.setdefault(bucket, []).append(index)
            if len(waiting[bucket]) == self._size[bucket]:
                batches.append(waiting.pop(bucket))
        for bucket, rest in waiting.items():
            missing = self._size[bucket] - len(rest)
            again = seen[bucket] * -(-missing // len(seen[bucket]))
            batches.append(rest + again[:missing])
        return batches


class Segment(NamedTuple):
    """One clip or image of a row, as tokens."""

    tokens: np.ndarray  # (n, p): patches of latents
    positions: Int[np.ndarray, "n 3"]  # time, row and column within its own video
    texts: list[np.ndarray]  # of each text (l,) ids of its tokens, or (l, d) their embeddings
    text_of_tokens: Int[np.ndarray, " n"] | None = None  # which of them each follows; None: one
    given: np.ndarray | None = None  # (n, q): patches of what a model sees beside the noise
    image_emb: np.ndarray | None = None  # (i, d): image features of the segment


def pack(segments: Sequence[Segment], settings: PackSettings) -> dict[str, np.ndarray]:
    """One row of fixed shapes.

    Returns:
      `tokens` (N, p), `positions` (N, 3), `segment_ids` (N,), `text_of_tokens` (N,), the text that
      each follows, and of these texts `ids` (L,) or `text_emb` (L, d), `text_segment_ids` (L,),
      the text that each belongs to, and `text_positions` (L,), each token's place in it. Where
      segments have them, `given` (N, q), and `image_emb` (max_segments, i, d) by segment.
      Segments and texts count from 0; the rest of a row is PADDING_SEGMENT, and zeros.

    Raises:
      ValueError: segments over the budget, or none.
    """
    if not segments:
        raise ValueError("a row of no segments was to be packed.")
    texts = [text for s in segments for text in s.texts]
    if len(texts) > settings.max_segments:
        raise ValueError(
            f"{len(segments)} segments of {len(texts)} texts do not fit a row of "
            f"{settings.max_segments}; raise config.data.pack.max_segments."
        )
    counts = [len(s.tokens) for s in segments]
    text_counts = [len(text) for text in texts]
    numbers = np.arange(len(texts), dtype=np.int32)
    firsts = np.cumsum([0, *(len(s.texts) for s in segments)])
    followed = [
        np.full(len(s.tokens), first) if s.text_of_tokens is None else first + s.text_of_tokens
        for s, first in zip(segments, firsts.tolist(), strict=False)
    ]
    columns: dict[str, tuple[np.ndarray, int, int]] = {
        "tokens": (np.concatenate([s.tokens for s in segments]), settings.tokens, 0),
        "positions": (np.concatenate([s.positions for s in segments]), settings.tokens, 0),
        "segment_ids": (
            np.repeat(numbers[: len(segments)], counts),
            settings.tokens,
            PADDING_SEGMENT,
        ),
        "text_of_tokens": (
            np.concatenate(followed).astype(np.int32),
            settings.tokens,
            PADDING_SEGMENT,
        ),
        "ids" if texts[0].ndim == 1 else "text_emb": (
            np.concatenate(texts),
            settings.text_tokens,
            0,
        ),
        "text_segment_ids": (
            np.repeat(numbers, text_counts),
            settings.text_tokens,
            PADDING_SEGMENT,
        ),
        "text_positions": (
            np.concatenate([np.arange(n, dtype=np.int32) for n in text_counts]),
            settings.text_tokens,
            0,
        ),
    }
    if segments[0].given is not None:
        given = np.concatenate([s.given for s in segments])
        columns["given"] = (given, settings.tokens, 0)
    if segments[0].image_emb is not None:
        features = np.stack([s.image_emb for s in segments])
        columns["image_emb"] = (features, settings.max_segments, 0)
    return {name: _padded(*column, name=name) for name, column in columns.items()}


def _padded(values: np.ndarray, length: int, fill: int, *, name: str) -> np.ndarray:
    if len(values) > length:
        raise ValueError(f"a row holds {len(values)} {name}, {length} fit; the plan was wrong.")
    padding = np.full((length - len(values), *values.shape[1:]), fill, values.dtype)
    return np.concatenate([values, padding])
