"""Speed of the data path: packing against padding and buckets, cached latents against encoding.

    python tools/bench_data.py packing [--ratio 1 2] [--steps 120] [--lengths octaves]
    python tools/bench_data.py cache [--clips 64]
    python tools/bench_data.py draw [--clips 256] [--workers 2]
    python tools/bench_data.py loader --videos DIR

`loader` needs torch: run it in the environment of `make parity`.
Alternates what it compares and prints medians; docs/benchmarks.md has the table.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `configs`, which is not installed

# Latent rows and columns (square to 2:1 both ways), and latent frames of a 4x VAE (1 to 33 frames):
# "every" length, as clips of native length have them, or "octaves", where clips were cut to a few.
SIDES = ((8, 8), (8, 12), (12, 8), (8, 16), (16, 8))
LENGTHS = {"every": tuple(range(1, 10)), "octaves": (1, 2, 3, 5, 9)}
RECORDS = 2000


def mixed_cache(path: Path, z_dim: int, vae_hash: str, lengths: tuple[int, ...]) -> None:
    """A cache of noise of every size, as `sora-jax data cache` writes it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from sora_jax.data import latents

    rng = np.random.default_rng(0)
    path.mkdir()
    writer = ArrayRecordWriter(str(path / "latents-00000-of-00001.array_record"), "group_size:1")
    sizes = [(rng.choice(lengths), *SIDES[rng.integers(len(SIDES))]) for _ in range(RECORDS)]
    for size in sizes:
        mean = rng.standard_normal((*size, z_dim), np.float32).astype(ml_dtypes.bfloat16)
        writer.write(latents.to_bytes(latents.Encoded(mean, mean, ["a red ball rolls"], 8.0)))
    writer.close()
    (path / latents.META).write_text(json.dumps({"vae_hash": vae_hash}))
    (path / latents.CAPTIONS).write_text('["a red ball rolls left in the meadow"]\n' * RECORDS)
    fps = np.full(RECORDS, 8.0, np.float32)
    np.savez(path / latents.INDEX, sizes=np.array(sizes, np.int32), fps=fps)


def packing(args) -> None:
    """Useful tokens a second of whole training steps, over the same records and budget."""
    import jax

    from configs import paperworld
    from sora_jax import sharding
    from sora_jax.data import loader as loaders
    from sora_jax.train.batches import make_loader
    from sora_jax.train.dit_stage import DiTStage
    from sora_jax.train.encode import vae_hash
    from sora_jax.train.optimizer import OptimConfig, make_optimizer
    from sora_jax.train.state import make_init
    from sora_jax.train.step import make_train_step

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    lengths = LENGTHS[args.lengths]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "latents"
        weights = vae_hash(Path("sora_jax/weights/paperworld"))
        mixed_cache(cache, 16, weights, lengths)
        for ratio in args.ratio:
            largest = max(lengths) * max(a * b for a, b in SIDES) // 4
            budget = int(ratio * largest)
            ways = {
                "packed": {"batching": "pack", "tokens": budget, "max_segments": 8},
                "padded": {"batching": "pack", "tokens": largest, "max_segments": 1},
                "buckets": {"batching": "bucket", "bucket_tokens": budget},
            }
            runs = {}
            for name, way in ways.items():
                config = paperworld.get_config("full").unlock()
                config.data.update(kind="latents", path=str(cache), cache="")
                config.dit.depth, config.batch_size = args.depth, 1
                config.data.batching = way["batching"]
                config.data.bucket_tokens = way.get("bucket_tokens", budget)
                segments = way.get("max_segments", 1)
                config.data.pack.update(
                    tokens=way.get("tokens", budget),
                    max_segments=segments,
                    text_tokens=12 * segments,  # captions of 10 or 11
                )
                stage = DiTStage(config)
                optim = OptimConfig(**config.optim)
                optimizer = make_optimizer(optim, 100)
                state = jax.jit(make_init(stage.init, optimizer))(jax.random.key(0))
                step = jax.jit(make_train_step(stage.loss, optimizer, optim))
                batches, found = make_loader(config, stage, mesh), []
                for _ in range(args.steps):
                    batch = loaders.to_global(next(batches), mesh)
                    found.append((batch, useful(batch, stage)))
                batches.close()
                key = jax.random.key(1)
                for batch, _ in found:  # compiles every shape
                    jax.block_until_ready(step(state, stage.frozen, batch, key))
                runs[name] = (step, state, stage.frozen, found, key)
            speeds = {name: [] for name in runs}
            for _ in range(args.rounds):
                for name, (step, state, frozen, found, key) in runs.items():
                    begun = time.perf_counter()
                    for batch, _ in found:
                        jax.block_until_ready(step(state, frozen, batch, key))
                    tokens = sum(count for _, count in found)
                    speeds[name].append(tokens / (time.perf_counter() - begun))
            print(
                f"lengths {args.lengths}: budget {budget} tokens a batch, {ratio:g} x the largest "
                "clip"
            )
            fastest = statistics.median(speeds["packed"])
            for name, values in speeds.items():
                found = runs[name][3]
                places = sum(stage_places(batch) for batch, _ in found)
                fill = sum(count for _, count in found) / places
                median = statistics.median(values)
                print(
                    f"  {name:8} fill {fill:.3f}, {median:8.0f} useful tokens a second; packed is "
                    f"{fastest / median:.2f}x"
                )


def stage_places(batch) -> int:
    """Places for tokens in a batch, whatever way it is batched."""
    if "tokens" in batch:
        return int(np.prod(batch["tokens"].shape[:2]))
    return int(np.prod(batch["latents"].shape[:4])) // 4


def useful(batch, stage) -> int:
    if "segment_ids" in batch:
        return int((np.asarray(batch["segment_ids"]) >= 0).sum())
    return stage.tokens(batch)


def cache(args) -> None:
    """Clips a second from cached latents, against drawing and encoding them on the way."""
    import jax

    from configs import paperworld
    from sora_jax import sharding
    from sora_jax.train import latent_cache
    from sora_jax.train.batches import make_loader
    from sora_jax.train.dit_stage import DiTStage
    from sora_jax.train.encode import ClipEncoder

    config = paperworld.get_config("full").unlock()
    config.data.cache = ""
    stage, vae = DiTStage(config), config.vae_checkpoint
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    encode = ClipEncoder(vae)
    with tempfile.TemporaryDirectory() as folder:
        pixels = make_loader(config, stage, mesh)
        source = pixels_source(config)
        latent_cache.build(source, vae, Path(folder) / "latents", clips=256)
        config.data.update(kind="latents", path=str(Path(folder) / "latents"))
        cached = make_loader(config, stage, mesh)
        rates = {"online": [], "cached": []}
        next(cached), encode(list(next(pixels)["video"]))
        for _ in range(args.rounds):
            begun = time.perf_counter()
            for _ in range(args.clips // config.batch_size):
                encode(list(next(pixels)["video"]))
            rates["online"].append(args.clips / (time.perf_counter() - begun))
            begun = time.perf_counter()
            for _ in range(16 * args.clips // config.batch_size):
                next(cached)
            rates["cached"].append(16 * args.clips / (time.perf_counter() - begun))
        pixels.close()
        cached.close()
    online, read = (statistics.median(rates[name]) for name in ("online", "cached"))
    print(
        f"encoded on the way {online:.0f} clips a second, from the cache {read:.0f}: "
        f"{read / online:.0f}x"
    )


def pixels_source(config):
    from sora_jax.data import sources

    return sources.make_source(config.data)


def draw(args) -> None:
    """Clips of Paperworld, 17 frames of 64x64, drawn a second by so many processes."""
    from configs import paperworld

    source = pixels_source(paperworld.get_config("full"))
    rates, indices = [], iter(range(10**9))
    with ProcessPoolExecutor(args.workers) as pool:
        list(pool.map(source.__getitem__, (next(indices) for _ in range(args.workers))))
        for _ in range(args.rounds):
            round_ = [next(indices) for _ in range(args.clips)]
            begun = time.perf_counter()
            for _ in pool.map(source.__getitem__, round_, chunksize=8):
                pass
            rates.append(args.clips / (time.perf_counter() - begun))
    rate = statistics.median(rates)
    print(f"drawn {rate:.0f} clips a second by {args.workers} processes")


def loader(args) -> None:
    """Decoded clips a second of our loader and a torch DataLoader with PyAV, two workers each."""
    import av
    import torch

    from sora_jax.data.loader import make_loader
    from sora_jax.data.sources import FolderSettings, FolderSource

    settings = FolderSettings(height=args.side, width=args.side, num_frames=17, fps=8.0, stride=0.5)
    source = FolderSource(args.videos, settings)
    files = [source.clip(i) for i in range(len(source))]

    class Clips(torch.utils.data.Dataset):
        """What its users write: open, seek, decode, resize."""

        def __len__(self):
            return len(files)

        def __getitem__(self, index):
            path, start = files[index]
            frames, times = [], [start + k / 8.0 for k in range(17)]
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                container.seek(int(start / stream.time_base), stream=stream, backward=True)
                for frame in container.decode(stream):
                    while len(frames) < 17 and frame.time >= times[len(frames)] - 1e-3:
                        frames.append(frame.to_ndarray(format="rgb24"))
                    if len(frames) == 17:
                        break
            frames += frames[-1:] * (17 - len(frames))
            x = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
            scale = args.side / min(x.shape[-2:])
            x = torch.nn.functional.interpolate(
                x.float(), scale_factor=scale, mode="bilinear", antialias=True
            )
            top, left = ((n - args.side) // 2 for n in x.shape[-2:])
            return x[..., top : top + args.side, left : left + args.side].round().to(torch.uint8)

    def ours():
        batches = make_loader(source, batch_size=4, seed=0, num_threads=1, num_workers=2)
        next(batches)
        begun = time.perf_counter()
        for _ in range(args.batches):
            next(batches)
        rate = 4 * args.batches / (time.perf_counter() - begun)
        batches.close()
        return rate

    def theirs():
        order = torch.utils.data.RandomSampler(Clips(), replacement=True, num_samples=10**6)
        batches = iter(torch.utils.data.DataLoader(Clips(), 4, sampler=order, num_workers=2))
        next(batches)
        begun = time.perf_counter()
        for _ in range(args.batches):
            next(batches)
        return 4 * args.batches / (time.perf_counter() - begun)

    rates = [(ours(), theirs()) for _ in range(args.rounds)]
    mine, other = (statistics.median(column) for column in zip(*rates, strict=True))
    print(
        f"{len(files)} clips of 17 frames: ours {mine:.1f} a second, DataLoader {other:.1f}: "
        f"{mine / other:.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(required=True)
    runs = {"packing": packing, "cache": cache, "draw": draw, "loader": loader}
    for name, run in runs.items():
        command = what.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--rounds", type=int, default=3)
        if name == "packing":
            command.add_argument("--ratio", type=float, nargs="+", default=[1.0, 2.0])
            command.add_argument("--steps", type=int, default=120)
            command.add_argument("--lengths", choices=LENGTHS, default="every")
            command.add_argument("--depth", type=int, default=4)
        elif name == "cache":
            command.add_argument("--clips", type=int, default=64)
        elif name == "draw":
            command.add_argument("--clips", type=int, default=256)
            command.add_argument("--workers", type=int, default=2)
        else:
            command.add_argument("--videos", required=True, metavar="DIR")
            command.add_argument("--side", type=int, default=64)
            command.add_argument("--batches", type=int, default=16)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
