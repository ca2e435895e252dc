"""Clips and images of Paperworld drawn without end by processes, and packed rows of them.

For tools/train_by_clock.py, which trains on what there is while more is drawn.
"""

import ctypes
import mmap
import multiprocessing
import os
import queue
import threading

import numpy as np

from sora_jax.data.paperworld.settings import PaperworldSettings as World
from sora_jax.data.paperworld.source import PaperworldSource

ONE = {"multi_shot": 0.0, "collisions": 0.0, "companions": 0.0}
HARD = {"turning": 0.55, "falling": 0.45, "small": 0.5, **ONE}
SHOTS = {**ONE, "multi_shot": 1.0, "time_stamps": 0.5}
# Share of the clips, or of the images, and their world.
CLIPS = (
    *((1.0, World()), (1.3, World(**HARD)), (0.5, World(**SHOTS))),
    *((0.3, World(late=1.0, collisions=0.0)), (0.12, World(near=1.0))),
    (0.35, World(**ONE | {"collisions": 1.0})),
)
IMAGES = ((7, World(frames=1)), (6, World(frames=1, **HARD)))
# Beside those where asked: what turns or leans in every verb, while the camera moves, and cut at
# random. What is shipped recalls turned outlines by the word, and has none of unseen pairs.
TURNED_CLIPS = (
    (1.2, World(tilted=1.0, turning=0.15, moving_camera=0.12, small=0.35, **ONE)),
    (0.6, World(turning=0.9, moving_camera=0.35, small=0.4, **ONE)),
    (1.5, World(scraps=1.0, turning=0.75, tilted=0.4, moving_camera=0.2, small=0.3, **ONE)),
)
TURNED_IMAGES = (
    (5, World(frames=1, tilted=0.8, **ONE)),
    (2, World(frames=1, scraps=1.0, turning=0.5, **ONE)),
)
SEED = 60  # of the first kind's world; the next kinds have the next ones
# Captions kept of a record's eight: plain and worded ones, each of both once with time stamps.
KEPT = (0, 1, 4, 5)
WORDINGS, SPANS, WORDS = len(KEPT), 3, 48  # and time stamps and tokens of one
FRAMES, SIDE, LATENTS = 17, 8, 9  # of a clip; rows and columns, and frames, of its latents
IN_ROW = 9  # images
IMAGE_TEXT = 128  # tokens of all captions of nine images


def shared(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Memory that forked processes write and this one reads."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)


class Records:
    """Pixels and tokenized captions of one sort, drawn by processes, each in its own stretch."""

    def __init__(self, kinds, frames: int, *, count: int, workers: int) -> None:
        self.kinds, self.each, self.workers = kinds, count // workers, workers
        n = self.each * workers
        self.video = shared((n, frames, 64, 64, 3), np.uint8)
        self.ids = shared((n, WORDINGS, SPANS, WORDS), np.int16)
        self.lengths = shared((n, WORDINGS, SPANS), np.int16)
        self.texts = shared((n, WORDINGS, LATENTS), np.int8)  # the span that a latent frame follows
        self.done = multiprocessing.Array(ctypes.c_int64, workers, lock=False)

    def available(self) -> np.ndarray:
        starts = self.each * np.arange(self.workers)
        return np.concatenate(
            [np.arange(s, s + d) for s, d in zip(starts, self.done, strict=True)]
        ).astype(int)

    def drawn(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """The pixels of `count` records out of those there are."""
        done = np.array(self.done[:])
        worker = rng.choice(np.flatnonzero(done), size=count)
        return self.video[worker * self.each + (rng.random(count) * done[worker]).astype(int)]

    def draw(self, worker: int, tokenizer):
        """Draws the next of `worker`'s records whenever it is asked."""
        shares = np.array([share for share, _ in self.kinds], float)
        order = np.random.default_rng([SEED, worker, len(self.kinds)]).choice(
            len(shares), self.each, p=shares / shares.sum()
        )
        sources = [PaperworldSource(SEED + i, world) for i, (_, world) in enumerate(self.kinds)]
        for n, kind in enumerate(order):
            at = worker * self.each + n
            self._write(at, sources[kind], tokenizer)
            self.done[worker] = n + 1
            yield

    def _write(self, at: int, source, tokenizer) -> None:
        from sora_jax.prompts import timed

        record = source[at]
        self.video[at] = record["video"]
        frames = len(record["video"])
        captions = source.captions(at, 8)
        for v, caption in enumerate(captions[i] for i in KEPT):
            words, follow = [timed.as_one(caption)], np.zeros(1 + (frames - 1) // 2, int)
            if timed.is_timed(caption):
                spans = timed.latent_texts(caption, frames=frames, fps=record["fps"], temporal=2)
                if len(spans[0]) <= SPANS:
                    words, follow = spans
            ids, mask = tokenizer.batch(list(words), length=WORDS, max_length=WORDS)
            self.ids[at, v, : len(words)] = ids
            self.lengths[at, v, : len(words)] = np.asarray(mask).sum(axis=1)
            self.texts[at, v, : len(follow)] = follow


def start_drawing(sorts: tuple[Records, ...], init: str):
    """Processes that draw until all is full or the value is set that comes with them."""
    stop = multiprocessing.Value(ctypes.c_int, 0, lock=False)

    def work(worker: int) -> None:
        import cv2

        from sora_jax.convert import folder

        os.nice(15)
        cv2.setNumThreads(1)
        tokenizer = folder.open_tokenizer(init)
        running = [sort.draw(worker, tokenizer) for sort in sorts]
        while running and not stop.value:
            running = [one for one in running if next(one, "full") != "full"]

    context = multiprocessing.get_context("fork")  # before JAX has threads
    processes = [
        context.Process(target=work, args=(worker,), daemon=True)
        for worker in range(sorts[0].workers)
    ]
    for process in processes:
        process.start()
    return processes, stop


def ahead(make, *, depth: int, threads: int = 3):
    """What make(rng) gives, without end, made in threads meanwhile."""
    ready: queue.Queue = queue.Queue(depth)

    def go(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            while True:
                ready.put(make(rng))
        except BaseException as error:  # for the thread that waits for it
            ready.put(error)

    for seed in range(threads):
        threading.Thread(target=go, args=(seed,), daemon=True).start()
    while True:
        made = ready.get()
        if isinstance(made, BaseException):
            raise made
        yield made


class Rows:
    """Packed rows as sora_jax/data/packing.py has them, their tokens as places in `encoded`.

    Args:
      in_row: records of a row; of one, captions may have several spans.
      text: tokens of all captions of a row.
    """

    def __init__(self, records: Records, rows: int, *, in_row: int, text: int) -> None:
        self.records, self.rows, self.in_row, self.text = records, rows, in_row, text
        self.encoded = np.zeros(0, int)  # records whose latents there are, in that order
        frames = LATENTS if in_row == 1 else 1
        grid = np.indices((frames, SIDE, SIDE), np.int32).reshape(3, -1).T
        self.positions = np.tile(grid, (in_row, 1)).astype(np.int32)
        self.segments = np.repeat(np.arange(in_row, dtype=np.int32), len(grid))

    @property
    def max_segments(self) -> int:
        return SPANS if self.in_row == 1 else self.in_row

    def __call__(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        chosen = rng.integers(len(self.encoded), size=(self.rows, self.in_row))
        texts = [self._texts(self.encoded[places], rng) for places in chosen]
        same = {"positions": self.positions, "segment_ids": self.segments}
        return {
            "chosen": chosen,
            **{k: np.broadcast_to(x, (self.rows, *x.shape)) for k, x in same.items()},
            **{name: np.stack([text[name] for text in texts]) for name in texts[0]},
        }

    def _texts(self, records, rng: np.random.Generator) -> dict[str, np.ndarray]:
        source, v = self.records, rng.integers(WORDINGS, size=len(records))
        if len(records) > 1:
            if source.lengths[records, v, 0].sum() > self.text:
                v = source.lengths[records, :, 0].argmin(axis=1)
            ids, lengths = source.ids[records, v, 0], source.lengths[records, v, 0]
            if lengths.sum() > self.text:
                lengths = np.minimum(lengths, self.text // len(records))
            follow = self.segments
        else:
            ids, lengths = source.ids[records[0], v[0]], source.lengths[records[0], v[0]]
            spans = max(1, int((lengths > 0).sum()))
            ids, lengths = ids[:spans], lengths[:spans]
            follow = np.repeat(source.texts[records[0], v[0]], SIDE**2)
        real = np.arange(WORDS) < lengths[:, None]
        n = int(real.sum())
        out = {name: np.zeros(self.text, np.int32) for name in ("ids", "text_positions")}
        out |= {"text_segment_ids": np.full(self.text, -1, np.int32)}
        out["ids"][:n] = ids[real]
        out["text_segment_ids"][:n] = np.repeat(np.arange(len(lengths)), lengths)
        out["text_positions"][:n] = np.broadcast_to(np.arange(WORDS), real.shape)[real]
        return out | {"text_of_tokens": follow.astype(np.int32)}
