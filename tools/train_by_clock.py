"""Trains the shipped Paperworld model on one accelerator, in minutes that are given.

python tools/halve_patches.py --checkpoint A --out B; python tools/widen.py --checkpoint B \
    --out C --vae --mlp 1536
python tools/train_by_clock.py --init C --vae 130 --dit 240 --out DIR

Processes draw clips and images without end while first the VAE is trained on what is there; then
all of it is encoded once, and transformer and text encoder are trained on the latents. Losses,
optimizer and step are those of `sora-jax train` with configs/paperworld_vae.py and
configs/paperworld.py:fine, but that the rate follows the clock and not the number of the step, and
that rows are put together here: a clip, or nine images. DIR gets an inference folder and log.json.
"""

import argparse
import ctypes
import dataclasses
import json
import mmap
import multiprocessing
import os
import queue
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `configs`, which is not installed

from sora_jax.data.paperworld.settings import PaperworldSettings as World
from sora_jax.data.paperworld.source import PaperworldSource

ONE = {"multi_shot": 0.0, "collisions": 0.0, "companions": 0.0}
HARD = {"turning": 0.6, "small": 0.6, **ONE}
SHOTS = {**ONE, "multi_shot": 1.0, "time_stamps": 0.5}
# Share of the clips, or of the images, and their world.
CLIPS = (
    *((1.2, World()), (0.9, World(**HARD)), (0.7, World(**SHOTS))),
    *((0.35, World(late=1.0, collisions=0.0)), (0.12, World(near=1.0))),
    (0.4, World(**ONE | {"collisions": 1.0})),
)
IMAGES = ((7, World(frames=1)), (6, World(frames=1, **HARD)))
SEED = 40  # of the first kind's world; the next kinds have the next ones
IMAGE_ROWS = 0.3  # share of the rows that hold images
# Captions kept of a record's eight: plain and worded ones, each of both once with time stamps.
KEPT = (0, 1, 4, 5)
WORDINGS, SPANS, WORDS = len(KEPT), 3, 48  # and time stamps and tokens of one
FRAMES, SIDE, LATENTS = 17, 8, 9  # of a clip; rows and columns, and frames, of its latents
IN_ROW = 9  # images
TEXT = 256  # tokens of all captions of a row
VIRTUAL = 10_000  # steps that schedules think there are


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", required=True, metavar="DIR", help="weights to start from")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vae", type=float, default=130, metavar="SECONDS")
    parser.add_argument("--dit", type=float, default=240, metavar="SECONDS")
    parser.add_argument("--vae-batch", type=int, default=32, metavar="CLIPS")
    parser.add_argument("--rows", type=int, default=64, help="of 576 tokens a step")
    parser.add_argument("--clips", type=int, default=160_000, help="drawn at most")
    parser.add_argument("--images", type=int, default=160_000)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--vae-rate", type=float, default=2e-3)
    parser.add_argument("--rate", type=float, default=3e-3)
    return parser.parse_args()


BEGUN = time.time()


def say(*what) -> None:
    print(f"[{time.time() - BEGUN:6.1f} s]", *what, flush=True)


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
        worker = rng.integers(self.workers, size=count)
        there = np.maximum(np.array(self.done[:])[worker], 1)
        return self.video[worker * self.each + (rng.random(count) * there).astype(int)]

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
    """Processes that draw until all is full or the value that is returned is set."""
    stop = multiprocessing.Value(ctypes.c_int, 0, lock=False)

    def work(worker: int) -> None:
        import cv2

        from sora_jax.convert import folder

        os.nice(5)
        cv2.setNumThreads(1)
        tokenizer = folder.open_tokenizer(init)
        running = [sort.draw(worker, tokenizer) for sort in sorts]
        while running and not stop.value:
            running = [one for one in running if next(one, "full") != "full"]

    for worker in range(sorts[0].workers):
        context = multiprocessing.get_context("fork")  # before JAX has threads
        context.Process(target=work, args=(worker,), daemon=True).start()
    return stop


def ahead(make, *, depth: int, threads: int):
    """What make(rng) gives, without end, made in threads meanwhile."""
    ready: queue.Queue = queue.Queue(depth)

    def go(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while True:
            ready.put(make(rng))

    for seed in range(threads):
        threading.Thread(target=go, args=(seed,), daemon=True).start()
    while True:
        yield ready.get()


class Rows:
    """Packed rows as sora_jax/data/packing.py has them, without their tokens."""

    def __init__(self, clips: Records, images: Records, rows: int) -> None:
        self.sorts, self.rows = (clips, images), rows
        self.at = tuple(sort.available() for sort in self.sorts)
        grids = [np.indices((f, SIDE, SIDE), np.int32).reshape(3, -1).T for f in (LATENTS, 1)]
        self.positions = grids[0], np.tile(grids[1], (IN_ROW, 1))
        self.segments = np.zeros(LATENTS * SIDE**2, np.int32), np.repeat(np.arange(IN_ROW), SIDE**2)

    def __call__(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        b = self.rows
        sort = (rng.random(b) < IMAGE_ROWS).astype(int)  # 0: a clip
        clip = rng.integers(len(self.at[0]), size=b)
        images = rng.integers(len(self.at[1]), size=(b, IN_ROW))
        texts = [
            self._texts(self.at[1][images[i]] if sort[i] else self.at[0][clip[i : i + 1]], s, rng)
            for i, s in enumerate(sort.tolist())
        ]
        return {
            "sort": sort,
            "clip": clip,
            "images": images,
            "positions": np.stack([self.positions[s] for s in sort]).astype(np.int32),
            "segment_ids": np.stack([self.segments[s] for s in sort]).astype(np.int32),
            **{name: np.stack([text[name] for text in texts]) for name in texts[0]},
        }

    def _texts(self, records, sort: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        source, v = self.sorts[sort], rng.integers(WORDINGS, size=len(records))
        if sort:
            if source.lengths[records, v, 0].sum() > TEXT:
                v = source.lengths[records, :, 0].argmin(axis=1)
            ids, lengths = source.ids[records, v, 0], source.lengths[records, v, 0]
            lengths, follow = np.minimum(lengths, TEXT // IN_ROW), self.segments[1]
        else:
            ids, lengths = source.ids[records[0], v[0]], source.lengths[records[0], v[0]]
            spans = max(1, int((lengths > 0).sum()))
            ids, lengths = ids[:spans], lengths[:spans]
            follow = np.repeat(source.texts[records[0], v[0]], SIDE**2)
        real = np.arange(WORDS) < lengths[:, None]
        n = int(real.sum())
        out = {name: np.zeros(TEXT, np.int32) for name in ("ids", "text_positions")}
        out |= {"text_segment_ids": np.full(TEXT, -1, np.int32)}
        out["ids"][:n] = ids[real]
        out["text_segment_ids"][:n] = np.repeat(np.arange(len(lengths)), lengths)
        out["text_positions"][:n] = np.broadcast_to(np.arange(WORDS), real.shape)[real]
        return out | {"text_of_tokens": follow.astype(np.int32)}


def begin(config, mesh):
    """The program of `config`, its first state, and its step with the count that rates follow."""
    import jax
    import optax

    from sora_jax.train import program, start

    built = program.build(config, mesh)
    of_rate = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    whole = built.step.__wrapped__

    def step(state, frozen, batch, key, count):
        told = jax.tree.map(
            lambda s: s._replace(count=count) if of_rate(s) else s, state.opt_state, is_leaf=of_rate
        )
        return whole(state._replace(opt_state=told), frozen, batch, key)

    return built, start.first_state(config, built), jax.jit(step, donate_argnums=0)


def train(name: str, begun, batches, *, seconds: float, log: list, every: int = 50):
    """The state after `seconds`, which count from the end of the first step, and its steps."""
    import jax
    import jax.numpy as jnp

    (built, state, step), key = begun, jax.random.key(7)
    first, before, done, last = None, None, 0, time.time()
    while first is None or time.time() - first < seconds:
        share = 0.0 if first is None else (time.time() - first) / seconds
        count = jnp.int32(share * VIRTUAL)
        state, metrics = step(state, built.stage.frozen, next(batches), key, count)
        jax.block_until_ready(before)  # at most a step ahead of the clock
        before, done = metrics["train/loss"], done + 1
        if first is None:
            jax.block_until_ready(before)
            first = time.time()
        if done % every == 0:
            values = {k: float(v) for k, v in metrics.items() if not k.startswith("param")}
            log.append({"stage": name, "step": done, "seconds": time.time() - first, **values})
            speed, last = every / (time.time() - last), time.time()
            shown = {k[6:]: v for k, v in values.items() if k in ("train/loss", "train/psnr")}
            say(name, done, f"{speed:.1f}/s", *(f"{k} {v:.4f}" for k, v in shown.items()))
    jax.block_until_ready(state)
    say(name, "has made", done, "steps")
    return state, done


def train_vae(args, clips: Records, mesh, log: list):
    """Settings with the statistics of the latents, parameters, and steps."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from configs import paperworld_vae
    from sora_jax.train.vae_stage import to_float

    config = paperworld_vae.get_config("wide").unlock()
    config.init_from, config.batch_size, config.num_steps = args.init, args.vae_batch, VIRTUAL
    config.optim.peak_lr = args.vae_rate
    begun = begin(config, mesh)
    batches = ahead(lambda rng: {"video": clips.drawn(rng, args.vae_batch)}, depth=4, threads=3)
    state, steps = train("vae", begun, batches, seconds=args.vae, log=log)
    stage, params = begun[0].stage, state.ema["vae"]

    @jax.jit
    def moments(params, video):
        mean, logvar = nnx.merge(stage.graphdef, params).encode_moments(to_float(video))
        axes = (0, 1, 2, 3)
        return jnp.mean(mean, axes), jnp.mean(jnp.square(mean) + jnp.exp(logvar), axes)

    # As `convert export` measures them.
    rng = np.random.default_rng(0)
    sums = [moments(params, clips.drawn(rng, args.vae_batch)) for _ in range(12)]
    mean, square = (np.mean([np.asarray(s[i], np.float64) for s in sums], 0) for i in (0, 1))
    settings = dataclasses.replace(
        stage.config,
        latents_mean=mean.tolist(),
        latents_std=np.sqrt(square - mean**2).tolist(),
    )
    return settings, params, steps


def encode(records: Records, at: np.ndarray, settings, params, *, size: int):
    """Normalised latents (n, tokens, channels) of the records `at`, `size` at a time."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from sora_jax.train.vae_stage import to_float
    from sora_jax.vae.model import VideoVAE

    graph = nnx.split(nnx.eval_shape(lambda: VideoVAE(settings, rngs=nnx.Rngs(0))), nnx.Param)[0]

    @jax.jit
    def latents(params, video):
        found = nnx.merge(graph, params).encode(to_float(video)).astype(jnp.bfloat16)
        return found.reshape(len(video), -1, settings.z_dim)

    size = min(size, len(at))
    filled = np.concatenate([at, np.repeat(at[:1], -len(at) % size)])
    parts = np.split(filled, len(filled) // size)
    with ThreadPoolExecutor(6) as readers:
        waiting = [readers.submit(records.video.__getitem__, part) for part in parts[:8]]
        found = []
        for i in range(len(parts)):
            found.append(latents(params, waiting[i].result()))
            waiting[i] = None
            if i + 8 < len(parts):
                waiting.append(readers.submit(records.video.__getitem__, parts[i + 8]))
    return jnp.concatenate(found)[: len(at)]


def train_dit(args, rows: Rows, latents, mesh, log: list):
    """(program, state, steps) of transformer and text encoder."""
    import jax
    import jax.numpy as jnp

    from configs import paperworld

    config = paperworld.get_config("fine").unlock()
    config.init_from, config.vae_checkpoint = args.init, str(args.out)
    config.batch_size, config.num_steps = args.rows, VIRTUAL
    config.data.parts = type(config.data.parts)()
    config.dit.remat, config.text.remat = "none", False
    config.optim.update(peak_lr=args.rate, warmup_steps=200, final_lr=0.0, ema_decay=0.999)
    begun = begin(config, mesh)

    @jax.jit
    def tokens(clips, images, sort, clip, chosen):
        several = images[chosen].reshape(len(clip), -1, images.shape[-1])
        return jnp.where(sort[:, None, None] == 1, several, clips[clip]).astype(jnp.float32)

    def batches():
        for row in ahead(rows, depth=8, threads=4):
            which = [row.pop(name) for name in ("sort", "clip", "images")]
            yield row | {"tokens": tokens(*latents, *which)}

    state, steps = train("dit", begun, batches(), seconds=args.dit, log=log, every=100)
    return begun[0], state, steps


def main() -> None:
    args = parse()
    clips = Records(CLIPS, FRAMES, count=args.clips, workers=args.workers)
    images = Records(IMAGES, 1, count=args.images, workers=args.workers)
    stop = start_drawing((clips, images), args.init)

    import jax

    from sora_jax import sharding
    from sora_jax.convert import rewrite

    mesh, log = sharding.make_mesh(devices=jax.devices()[:1]), []
    while len(clips.available()) < 4 * args.vae_batch:
        time.sleep(0.1)
    say("on", jax.devices()[0].device_kind)
    settings, params, vae_steps = train_vae(args, clips, mesh, log)
    args.out.mkdir(parents=True, exist_ok=True)
    rewrite.copy_companions(Path(args.init), args.out)
    part = rewrite.from_params("vae", settings, params)
    rewrite.write_diffusers(args.out, {"vae": part}, dtype="bfloat16")
    rows = Rows(clips, images, args.rows)
    latents = [
        encode(sort, at, settings, params, size=size)
        for sort, at, size in zip((clips, images), rows.at, (64, 256), strict=True)
    ]
    say("encoded", *(len(x) for x in latents))
    built, state, dit_steps = train_dit(args, rows, latents, mesh, log)
    stop.value = 1
    parts = {
        "dit": rewrite.from_params("dit", built.stage.dit_config, state.ema["dit"]),
        "text": rewrite.from_params("text", built.stage.text.config, state.ema["text"]),
    }
    rewrite.write_diffusers(args.out, parts, dtype="bfloat16")
    log.append({"vae_steps": vae_steps, "dit_steps": dit_steps, "drawn": [len(a) for a in rows.at]})
    (args.out / "log.json").write_text(json.dumps(log) + "\n")
    say("wrote", args.out)


if __name__ == "__main__":
    main()
