"""Trains the shipped Paperworld model on one accelerator, in minutes that are given.

python tools/halve_patches.py --checkpoint A --out B; python tools/widen.py --checkpoint B \
    --out C --vae --mlp 1536
python tools/train_by_clock.py --init C --vae 130 --dit 240 --out DIR
python tools/train_by_clock.py --init paperworld --vae 0 --dit 300 --out DIR

Processes draw clips and images without end while first the VAE is trained on what is there; then
all of it is encoded, and transformer and text encoder are trained on the latents, to which later
ones are added. Losses, optimizer and step are those of `sora-jax train` with
configs/paperworld_vae.py and configs/paperworld.py:fine, but that the rate follows the clock and
not the number of the step, and that rows are put together here: a step has rows of one clip, or
rows of nine images. Several ways to run the blocks are compiled side by side and the fastest is
taken. DIR gets an inference folder, log.json and loss.png. On a GPU, with
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false
it compiles in a quarter of the time and runs as fast.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `configs`, which is not installed

from sora_jax import checkpoint_path
from tools.drawn_rows import (
    CLIPS,
    FRAMES,
    IMAGE_TEXT,
    IMAGES,
    IN_ROW,
    TURNED_CLIPS,
    TURNED_IMAGES,
    WORDS,
    Records,
    Rows,
    ahead,
    start_drawing,
)

IMAGE_STEPS = 0.12  # share of the steps that are made on images
VIRTUAL = 10_000  # steps that schedules think there are
MORE = 1.6  # times what is encoded have to be drawn before more is encoded
# Ways to run the blocks, of which the fastest is taken: `dit.remat` and `dit.unroll`.
WAYS = (("none", True), ("full", False), ("none", False))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", required=True, metavar="DIR", help="weights to start from")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--vae", type=float, default=130, metavar="SECONDS", help="0 keeps the VAE of --init"
    )
    parser.add_argument("--dit", type=float, default=240, metavar="SECONDS")
    parser.add_argument("--vae-batch", type=int, default=32, metavar="CLIPS")
    parser.add_argument("--rows", type=int, default=64, help="of 576 tokens a step")
    parser.add_argument("--clips", type=int, default=160_000, help="drawn at most")
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument(
        "--turned", action="store_true", help="half of the clips lean, tumble or are scraps"
    )
    parser.add_argument("--vae-rate", type=float, default=2e-3)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--shift", type=float, default=4.0, help="of times towards noise")
    args = parser.parse_args()
    args.init = str(checkpoint_path(args.init))
    return args


BEGUN = time.time()


def say(*what) -> None:
    print(f"[{time.time() - BEGUN:6.1f} s]", *what, flush=True)


def of_count(built):
    """The step of `built`, with the count that its rates follow as its last argument."""
    import jax
    import optax

    of_rate = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    whole = built.step.__wrapped__

    def step(state, frozen, batch, key, count):
        told = jax.tree.map(
            lambda s: s._replace(count=count) if of_rate(s) else s, state.opt_state, is_leaf=of_rate
        )
        return whole(state._replace(opt_state=told), frozen, batch, key)

    return jax.jit(step, donate_argnums=0)


def lowered(config, built):
    import jax
    import jax.numpy as jnp

    from sora_jax import sharding
    from sora_jax.train import program

    batch = program.abstract_batch(config, built.stage)
    with sharding.use_mesh(built.mesh):
        args = program.abstract_arguments(built, batch)
        return of_count(built).lower(*args, jax.ShapeDtypeStruct((), jnp.int32))


def train(name: str, state, frozen, steps, batches, *, seconds: float, log: list, every: int = 50):
    """The state after `seconds`, which count from the end of the first step, and its steps.

    Args:
      steps: of each kind of batch, the compiled step.
      batches: (kind, batch) without end.
    """
    import jax
    import jax.numpy as jnp

    key = jax.random.key(7)
    first, before, done, last = None, None, 0, time.time()
    while first is None or time.time() - first < seconds:
        share = 0.0 if first is None else (time.time() - first) / seconds
        kind, batch = next(batches)
        state, metrics = steps[kind](state, frozen, batch, key, jnp.int32(share * VIRTUAL))
        jax.block_until_ready(before)  # at most a step ahead of the clock
        before, done = metrics["train/loss"], done + 1
        if first is None:
            jax.block_until_ready(before)
            first = time.time()
        if done % every == 0:
            values = {k: float(v) for k, v in metrics.items() if not k.startswith("param")}
            log.append(
                {
                    "stage": name,
                    "kind": kind,
                    "step": done,
                    "seconds": time.time() - first,
                    **values,
                }
            )
            speed, last = every / (time.time() - last), time.time()
            shown = {k[6:]: v for k, v in values.items() if k in ("train/loss", "train/psnr")}
            say(name, done, f"{speed:.1f}/s", kind, *(f"{k} {v:.4f}" for k, v in shown.items()))
    jax.block_until_ready(state)
    say(name, "has made", done, "steps")
    return state, done


def fastest(ways: dict, state, frozen, batch) -> tuple[str, object, object]:
    """Name and step of the fastest of compiled steps, and the state after trying them.

    The count is 0, at which the rate is 0.
    """
    import jax
    import jax.numpy as jnp

    key, took = jax.random.key(8), {}
    for name, step in ways.items():
        for count in (3, 10):
            begun = time.time()
            for _ in range(count):
                state, _ = step(state, frozen, batch, key, jnp.int32(0))
            jax.block_until_ready(state)
            took[name] = (time.time() - begun) / count
    say("seconds a step:", *(f"{name} {x:.4f}" for name, x in took.items()))
    best = min(took, key=took.get)
    return best, ways[best], state


def train_vae(args, clips: Records, mesh, log: list):
    """Settings with the statistics of the latents, parameters, and steps."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from configs import paperworld_vae
    from sora_jax.train import program, start
    from sora_jax.train.vae_stage import to_float

    config = paperworld_vae.get_config("wide").unlock()
    config.init_from, config.batch_size, config.num_steps = args.init, args.vae_batch, VIRTUAL
    config.optim.peak_lr = args.vae_rate
    built = program.build(config, mesh)
    steps = {"clips": lowered(config, built).compile()}
    batches = (
        ("clips", batch)
        for batch in ahead(lambda rng: {"video": clips.drawn(rng, args.vae_batch)}, depth=4)
    )
    state, stage = start.first_state(config, built), built.stage
    state, count = train("vae", state, stage.frozen, steps, batches, seconds=args.vae, log=log)
    params = state.ema["vae"]

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
    return settings, params, count


def encoder(settings, params):
    """pixels (n, F, H, W, 3) -> normalised latents (n, tokens, channels), for `encode`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from sora_jax.train.vae_stage import to_float
    from sora_jax.vae.model import VideoVAE

    settings = dataclasses.replace(settings, dtype="bfloat16")  # as latents are kept
    graph = nnx.split(nnx.eval_shape(lambda: VideoVAE(settings, rngs=nnx.Rngs(0))), nnx.Param)[0]

    @jax.jit
    def latents(params, video):
        found = nnx.merge(graph, params).encode(to_float(video)).astype(jnp.bfloat16)
        return found.reshape(len(video), -1, settings.z_dim)

    return functools.partial(latents, params)


def encode(encoder, records: Records, at: np.ndarray, *, size: int):
    """Latents of the records `at`, `size` at a time."""
    import jax.numpy as jnp

    filled = np.concatenate([at, np.repeat(at[:1], -len(at) % size)])
    parts = np.split(filled, len(filled) // size)
    with ThreadPoolExecutor(6) as readers:
        waiting = [readers.submit(records.video.__getitem__, part) for part in parts[:8]]
        found = []
        for i in range(len(parts)):
            found.append(encoder(waiting[i].result()))
            waiting[i] = None
            if i + 8 < len(parts):
                waiting.append(readers.submit(records.video.__getitem__, parts[i + 8]))
    return jnp.concatenate(found)[: len(at)]


class Latents:
    """Rows of both kinds whose tokens are looked up on the device, and more from time to time."""

    def __init__(self, rows: dict[str, Rows], encoder, mesh) -> None:
        import jax

        from sora_jax import sharding

        self.rows, self.encoder = rows, encoder
        self.where = sharding.named(mesh, "batch")
        self.found = dict.fromkeys(rows)
        self._look_up = jax.jit(
            lambda latents, chosen: (
                latents[chosen].reshape(len(chosen), -1, latents.shape[-1]).astype("float32")
            ),
            out_shardings=self.where,
        )

    def renew(self) -> None:
        """Encodes what was drawn since, where that is much."""
        import jax.numpy as jnp

        for kind, rows in self.rows.items():
            old, there = self.found[kind], rows.records.available()
            if len(there) < min(MORE * len(rows.encoded), len(rows.records.video)):
                continue
            new = np.setdiff1d(there, rows.encoded)
            if len(new):
                latents = encode(
                    self.encoder, rows.records, new, size=64 if rows.in_row == 1 else 256
                )
                self.found[kind] = latents if old is None else jnp.concatenate([old, latents])
                # Threads may be choosing: places must never be more than latents.
                rows.encoded = np.concatenate([rows.encoded, new])
                say("encoded", kind, len(rows.encoded))

    def batch(self, kind: str, row: dict[str, np.ndarray]) -> dict:
        import jax

        tokens = self._look_up(self.found[kind], row.pop("chosen"))
        return jax.device_put(row, self.where) | {"tokens": tokens}

    def batches(self, *, every: float = 10.0):
        """(kind, batch) without end."""
        ready = {kind: ahead(rows, depth=8, threads=3) for kind, rows in self.rows.items()}
        rng, looked = np.random.default_rng(1), time.time()
        while True:
            if time.time() - looked > every:
                self.renew()
                looked = time.time()
            kind = "images" if rng.random() < IMAGE_STEPS else "clips"
            yield kind, self.batch(kind, next(ready[kind]))


def dit_config(args, rows: Rows, *, remat: str, unroll: bool):
    from configs import paperworld

    config = paperworld.get_config("fine").unlock()
    config.init_from = config.vae_checkpoint = args.init
    config.batch_size, config.num_steps = args.rows, VIRTUAL
    config.data.parts = type(config.data.parts)()
    config.data.pack.update(max_segments=rows.max_segments, text_tokens=rows.text)
    config.dit.remat, config.dit.unroll, config.text.remat = remat, unroll, False
    config.diffusion.shift.update(shift_lo=args.shift, shift_hi=args.shift)
    config.optim.update(peak_lr=args.rate, warmup_steps=200, final_lr=0.0, ema_decay=0.999)
    return config.lock()


def begin_dit(args, rows: dict[str, Rows], mesh):
    """(program, first state, {kind: {way: step}}), all compiled side by side."""
    from sora_jax.train import program, start

    jobs, main = {}, None
    for kind, ways in (("clips", WAYS), ("images", WAYS[1:2])):
        for remat, unroll in ways:
            config = dit_config(args, rows[kind], remat=remat, unroll=unroll)
            built = program.build(config, mesh)
            main = main or (config, built)
            name = f"remat {remat}" + (", unrolled" if unroll else "")
            jobs[kind, name] = lowered(config, built)
    with ThreadPoolExecutor(len(jobs) + 1) as compilers:
        first = compilers.submit(start.first_state, *main)
        steps = {job: compilers.submit(low.compile) for job, low in jobs.items()}
    kinds = {kind: {} for kind in rows}
    for (kind, name), step in steps.items():
        if error := step.exception():  # such as too little memory for what keeps most
            say(kind, name, "does not compile:", str(error)[:200])
        else:
            kinds[kind][name] = step.result()
    if not all(kinds.values()):
        raise SystemExit("train_by_clock: no way to run the blocks compiles; use fewer --rows.")
    return main[1], first.result(), kinds


def train_dit(args, latents: Latents, begun, log: list):
    """(program, state, steps) of transformer and text encoder."""
    built, state, kinds = begun
    frozen, steps, batches = built.stage.frozen, {}, latents.batches()
    for kind, ways in kinds.items():
        if len(ways) > 1:
            batch = next(batch for k, batch in batches if k == kind)
            way, steps[kind], state = fastest(ways, state, frozen, batch)
            log.append({"stage": "dit", "kind": kind, "way": way})
        else:
            steps[kind] = next(iter(ways.values()))
    state, count = train("dit", state, frozen, steps, batches, seconds=args.dit, log=log, every=100)
    return built, state, count


def draw(log: list[dict], path: Path) -> None:
    """Curves of the batches in `log`: a panel for each stage and kind of batch."""
    from matplotlib.figure import Figure

    rows = [row for row in log if "step" in row]
    panels = list(dict.fromkeys((row["stage"], row["kind"]) for row in rows))
    if not panels:
        return
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        mine = [row for row in rows if (row["stage"], row["kind"]) == panel]
        name = "train/psnr" if "train/psnr" in mine[0] else "train/loss"
        steps, values = ([row[key] for row in mine] for key in ("step", name))
        count = max(1, min(5, len(values) // 3))
        means = np.convolve(values, np.ones(count) / count, "valid")
        axes.plot(steps, values, ".", color="tab:blue", alpha=0.5, label="a batch")
        axes.plot(steps[count - 1 :], means, color="tab:orange", label=f"mean of {count}")
        axes.set(title=f"{panel[0]}, {panel[1]}: {name.removeprefix('train/')}", xlabel="step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    args = parse()
    clip_kinds, image_kinds = CLIPS, IMAGES
    if args.turned:
        clip_kinds, image_kinds = CLIPS + TURNED_CLIPS, IMAGES + TURNED_IMAGES
    clips = Records(clip_kinds, FRAMES, count=args.clips, workers=args.workers)
    images = Records(image_kinds, 1, count=args.images, workers=args.workers)
    processes, stop = start_drawing((clips, images), args.init)

    import jax

    from sora_jax import sharding
    from sora_jax.convert import folder, replace, rewrite

    try:  # before the work; as early as JAX may have threads
        replace.check(args.out, rewrite.parts_of(args.init), official=False)
    except ValueError as error:
        print(f"train_by_clock: {error}", file=sys.stderr)
        sys.exit(2)
    mesh, log, vae_steps = sharding.make_mesh(devices=jax.devices()[:1]), [], 0
    while len(clips.available()) < min(4 * args.vae_batch, len(clips.video)):
        time.sleep(0.1)
        if any(process.exitcode for process in processes):
            raise SystemExit("train_by_clock: a process that draws has ended; its error is above.")
    say("on", jax.devices()[0].device_kind)
    if args.vae:
        settings, params, vae_steps = train_vae(args, clips, mesh, log)
    else:
        settings, _, params = folder.load_component(args.init, "vae", mesh=mesh)
    rows = {
        "clips": Rows(clips, args.rows, in_row=1, text=WORDS),
        "images": Rows(images, args.rows, in_row=IN_ROW, text=IMAGE_TEXT),
    }
    begun = begin_dit(args, rows, mesh)
    say("compiled")
    latents = Latents(rows, encoder(settings, params), mesh)
    latents.renew()
    built, state, dit_steps = train_dit(args, latents, begun, log)
    stop.value = 1
    parts = {
        "vae": rewrite.from_params("vae", settings, params),
        "dit": rewrite.from_params("dit", built.stage.dit_config, state.ema["dit"]),
        "text": rewrite.from_params("text", built.stage.text.config, state.ema["text"]),
    }
    replace.write_changed(Path(args.init), args.out, parts, dtype="bfloat16")
    drawn = [len(rows.encoded) for rows in latents.rows.values()]
    log.append({"vae_steps": vae_steps, "dit_steps": dit_steps, "encoded": drawn})
    (args.out / "log.json").write_text(json.dumps(log) + "\n")
    draw(log, args.out / "loss.png")
    say("wrote", args.out)


if __name__ == "__main__":
    main()
