"""Measures the MFU of a config's real training step on one device, in bfloat16.

python tools/bench_mfu.py [--config configs/t2v_1_3b.py] [--config.optim.ema_decay=0.0]
    [--tokens 8192 32768] [--rows N] [--remat full attention_out] [--steps 2] [--out FILE.json]
python tools/bench_mfu.py --check-attention [cudnn]

Weights, tokens and embeddings of captions are random; a row is one clip that fills it. FLOPs are
the model's as `stage.flops` counts them: three forward passes, nothing that is computed again.
They are divided by the data sheet's peak, and by a product of two bfloat16 matrices that is timed
before and after every measurement (the faster counts). What does not fit is told, and the next is
tried. With --check-attention a kernel is compared with "xla" and "reference" instead; exit status
1 says that a relative error is above 2e-2.
"""

import argparse
import functools
import gc
import importlib.metadata
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FRACTION = "XLA_CLIENT_MEM_FRACTION"  # of a GPU's memory; by default JAX takes three quarters
if not {FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
    os.environ[FRACTION] = "0.93"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from sora_jax import attention, config_file, sharding  # noqa: E402
from sora_jax.dit import heads  # noqa: E402
from sora_jax.dit.config import REMAT  # noqa: E402
from sora_jax.train import metrics, program  # noqa: E402

GIB = 2**30
PEAK = 989.0  # TFLOP/s of an H100 or H200: dense bfloat16
GROUPS = 3  # their median is reported
WARM_UP = 2  # steps
PRODUCTS = 200  # matrix products in a group
SIDE = 32  # patches, of a clip's frames
LIMIT = 2e-2  # relative error of attention
LENGTHS = ((256, 256), (255, 255), (256, 77), (255, 512))  # queries, keys


def settings(args, row: dict):
    """The config with one clip that fills each row."""
    config, tokens = config_file.load(args.config, args.overrides).unlock(), row["tokens"]
    config.batch_size = row["rows"]
    config.dit.update(dtype="bfloat16", remat=row["remat"], attention=args.attention)
    config.data.update(kind="latents", batching=args.batching, text_embeddings=True)
    config.data.pack.update(tokens=tokens, max_segments=1, text_tokens=config.text_tokens)
    if args.batching == "fixed":
        if tokens % SIDE**2:
            raise SystemExit(f"--tokens {tokens}: with --batching fixed, multiples of {SIDE**2}.")
        config.data.update(frames=1, height=1, width=1)  # `batch_shapes` has the real size
    return config.lock()


def batch_shapes(config, stage, tokens: int):
    batch = program.abstract_batch(config, stage)
    if "latents" in batch:
        frames, rows, columns = stage.dit_config.patch_size
        size = (tokens // SIDE**2 * frames, SIDE * rows, SIDE * columns)
        for name in {"latents", "given"} & batch.keys():
            shape = (config.batch_size, *size, batch[name].shape[-1])
            batch[name] = jax.ShapeDtypeStruct(shape, batch[name].dtype)
    return batch


def batch_of(shapes, mesh):
    """Noise for tokens and texts; every token of segment 0, at places of a clip."""
    rng = np.random.default_rng(0)

    def one(name, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)
        if name == "positions":
            places = np.arange(leaf.shape[1])
            grid = (places // SIDE**2, places // SIDE % SIDE, places % SIDE)
            return np.broadcast_to(np.stack(grid, -1), leaf.shape).astype(leaf.dtype)
        if name == "text_positions":
            return np.broadcast_to(np.arange(leaf.shape[1]), leaf.shape).astype(leaf.dtype)
        return np.full(leaf.shape, leaf.dtype == bool, leaf.dtype)

    where = sharding.named(mesh, "batch")
    return {name: jax.device_put(one(name, leaf), where) for name, leaf in shapes.items()}


def compiled_init(built):
    """key -> (state, frozen), compiled: small random weights, as cheap to compile as can be."""
    paths, structure = jax.tree_util.tree_flatten_with_path(built.shapes.params)
    frozen = built.stage.frozen

    def zeros(tree):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    def init(key):
        leaves = []
        for (path, leaf), leaf_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
            about = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0  # of norms
            drawn = about + 0.02 * jax.random.normal(leaf_key, leaf.shape)
            leaves.append(drawn.astype(leaf.dtype))
        params = jax.tree.unflatten(structure, leaves)
        return zeros(built.shapes)._replace(params=params), zeros(frozen)

    places = (built.placement, built.stage.frozen_shardings(built.mesh))
    return jax.jit(init, out_shardings=places).lower(random_key(0)).compile()


def random_key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl="rbg")  # less to compile than threefry


@functools.cache
def operands(size: int):
    draw = jax.jit(lambda key: jax.random.normal(key, (2, size, size), jnp.bfloat16))
    return jax.device_get(draw(random_key(1)))  # not on the device while steps are measured


_product = jax.jit(jnp.matmul)


def matmul_tflops(size: int) -> float:
    """Of a product of two square bfloat16 matrices."""
    a, b = (jax.device_put(x) for x in operands(size))

    def group(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            out = _product(a, b)
        jax.block_until_ready(out)
        return (time.perf_counter() - begun) / count

    group(PRODUCTS // 10)
    return 2 * size**3 / statistics.median(group(PRODUCTS) for _ in range(GROUPS)) / 1e12


def prepare(args, mesh, row: dict):
    """(program, shapes of its batch, the traced step) of `row`, into which goes what is known."""
    tokens = row["tokens"]
    config = settings(args, row)
    built = program.build(config, mesh, abstract=True)
    stage = built.stage
    shapes = batch_shapes(config, stage, tokens)
    row["flops"], row["tokens_per_step"] = stage.flops(shapes), stage.tokens(shapes)
    dit = stage.dit_config
    kernel = functools.partial(
        attention.select, dit.attention, dit.dtype, platform=jax.default_backend(), q_len=tokens
    )
    row["attention"] = kernel(head_dim=dit.head_dim, kv_bias=False)
    with sharding.use_mesh(mesh):
        whole = "text_emb" in shapes and heads.takes_whole_text(
            dit, tokens, shapes["text_emb"].shape[1]
        )
    biased = args.batching == "pack" or not whole
    row["cross_attention"] = kernel(head_dim=dit.head_dim, kv_bias=biased)
    begun = time.perf_counter()
    with sharding.use_mesh(mesh):
        lowered = built.step.lower(*program.abstract_arguments(built, shapes))
    row["trace_seconds"] = time.perf_counter() - begun
    return built, shapes, lowered


def compiled(lowered, row: dict):
    """The step; with others at the same time, so that its seconds are not those it takes alone."""
    begun = time.perf_counter()
    step = lowered.compile()
    row["compile_seconds"] = time.perf_counter() - begun
    if stats := step.memory_analysis():
        parts = (stats.argument_size_in_bytes, stats.output_size_in_bytes)
        needed = sum(parts) - stats.alias_size_in_bytes + stats.temp_size_in_bytes
        row["program_gib"] = needed / GIB
    return step


def measure(built, shapes, step, init, *, steps: int, row: dict) -> None:
    """Puts what is measured of `step` into `row`."""
    mesh = built.mesh
    state, frozen = init(random_key(0))
    batch = batch_of(shapes, mesh)
    key = jax.device_put(jax.random.key(1), sharding.named(mesh))

    def group(state, count: int):
        begun = time.perf_counter()
        for _ in range(count):
            state, told = step(state, frozen, batch, key)
        jax.block_until_ready((state, told))
        return state, told, (time.perf_counter() - begun) / count

    state, told, _ = group(state, WARM_UP)
    seconds = []
    for _ in range(GROUPS):
        state, told, each = group(state, steps)
        seconds.append(each)
    row["group_seconds"], row["step_seconds"] = seconds, statistics.median(seconds)
    row["loss"], row["skipped"] = float(told["train/loss"]), float(told["train/skipped"])
    stats = mesh.devices.flat[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        row["process_peak_gib"] = stats["peak_bytes_in_use"] / GIB


def describe(row: dict) -> str:
    head = f"{row['tokens']:7} tokens x {row['rows']}, remat {row['remat']}: "
    program_memory = f"{row['program_gib']:.1f} GiB" if "program_gib" in row else "unknown memory"
    if "error" in row:
        return head + f"{row['error']} (the program: {program_memory})"
    peak = f", process peak {row['process_peak_gib']:.1f}" if "process_peak_gib" in row else ""
    skipped = ", LAST STEP SKIPPED" if row["skipped"] else ""
    return head + (
        f"{row['step_seconds']:.4g} s a step, {row['tokens_per_second']:.0f} tokens/s, "
        f"{row['tflops']:.4g} TFLOP/s: {row['mfu']:.1%} of the data sheet, "
        f"{row['share_of_matmul']:.1%} of a product's {row['matmul_tflops']:.4g}; "
        f"attention {row['attention']}, cross {row['cross_attention']}; {program_memory}{peak}; "
        f"trace {row['trace_seconds']:.1f} s, compile {row['compile_seconds']:.1f} s; "
        f"loss {row['loss']:.3g}{skipped}"
    )


def failure(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or "ut of memory" in text:
        return f"out of memory: {text[:160]}"
    return f"failed: {type(error).__name__}: {text[:300]}"


def mfu(args) -> int:
    """The number of rows that failed otherwise than for want of memory."""
    device = jax.devices()[0]
    mesh = sharding.make_mesh(devices=[device])
    sheet = metrics.peak_flops(device)
    peak = args.peak or (PEAK if sheet is None else sheet / 1e12)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    report = {"device": device.device_kind, "versions": versions, "peak_tflops": peak}
    report |= {"config": args.config, "overrides": args.overrides, "batching": args.batching}
    report |= {"steps": args.steps, "matmul": args.matmul, "matmul_tflops": [], "rows": []}
    rows = [
        {"tokens": tokens, "rows": args.rows or max(args.tokens) // tokens, "remat": remat}
        for tokens in args.tokens
        for remat in args.remat
    ]
    # All before there is a state: the compiler times kernels on the device, and takes memory there.
    prepared = {}
    for i, row in enumerate(rows):
        try:
            prepared[i] = prepare(args, mesh, row)
        except (RuntimeError, ValueError) as error:  # of what kernels do not take
            row["error"] = failure(error)
    with ThreadPoolExecutor(len(rows) + 1) as compilers:
        init = [compilers.submit(compiled_init, one[0]) for one in [*prepared.values()][:1]]
        made = {i: compilers.submit(compiled, one[2], rows[i]) for i, one in prepared.items()}
    before = matmul_tflops(args.matmul)
    print(
        f"{device.device_kind}, jax {versions['jax']}; {args.config} {' '.join(args.overrides)}\n"
        f"data sheet {peak:.4g} TFLOP/s, a product of {args.matmul}^3 {before:.4g}",
        flush=True,
    )
    report["matmul_tflops"].append(before)
    for i, row in enumerate(rows):
        try:
            if i in prepared:
                built, shapes, _ = prepared[i]
                step, state = made[i].result(), init[0].result()
                measure(built, shapes, step, state, steps=args.steps, row=row)
        except (RuntimeError, ValueError) as error:  # XLA's
            row["error"] = failure(error)
        gc.collect()  # the error's traceback held the state
        after = matmul_tflops(args.matmul)
        if "error" not in row:
            row["tflops"] = row["flops"] / row["step_seconds"] / 1e12
            row["tokens_per_second"] = row["tokens_per_step"] / row["step_seconds"]
            row["mfu"] = row["tflops"] / peak
            row["matmul_tflops"] = max(before, after)
            row["share_of_matmul"] = row["tflops"] / row["matmul_tflops"]
        report["matmul_tflops"].append(after)
        report["rows"].append(row)
        print(describe(row), flush=True)
        before = after
        if args.out:  # what is known, should the next be cut off
            Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    print(f"a product afterwards: {before:.4g} TFLOP/s")
    return sum(row.get("error", "").startswith("failed") for row in report["rows"])


def attention_case(kernel: str, head_dim: int, lengths: tuple[int, int], segments: bool):
    """Lowered: () -> {kernel: [output, gradients of q, k and v]}."""

    def ids(length: int):
        return jnp.tile(jnp.arange(length) * 3 // length, (2, 1)) if segments else None

    def run(key):
        keys = jax.random.split(key, 4)
        n, s = lengths
        q, k, v, cotangent = (
            jax.random.normal(one, (2, length, 3, head_dim), jnp.bfloat16)
            for one, length in zip(keys, (n, s, s, n), strict=True)
        )

        def attend(q, k, v, *, name):
            return attention.attention(
                *(q, k, v),
                q_segment_ids=ids(n),
                kv_segment_ids=ids(s),
                implementation=name,
                dtype="bfloat16",
            )

        results = {}
        for name in (kernel, "xla", "reference"):
            out, pull = jax.vjp(functools.partial(attend, name=name), q, k, v)
            results[name] = [out, *pull(cotangent.astype(out.dtype))]
        return results

    return jax.jit(run).lower(random_key(2))


def check_attention(kernel: str) -> int:
    """The number of cases that are wrong, after a line for each."""
    if kernel == "cudnn" and jax.default_backend() not in ("gpu", "cuda"):
        print(f"attention: cudnn cannot run on {jax.default_backend()}; skipped.")
        return 0
    cases = [(e, n, ids) for e in (64, 128) for n in LENGTHS for ids in (False, True)]

    def compile_case(case):
        try:
            return attention_case(kernel, *case).compile()
        except (RuntimeError, ValueError) as error:
            return error

    wrong = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (head_dim, (n, s), ids), made in zip(cases, pool.map(compile_case, cases), strict=True):
            label = f"head_dim {head_dim:3}, {n} x {s}, segments {'yes' if ids else 'no '}: "
            try:
                if isinstance(made, Exception):
                    raise made
                found = jax.device_get(made(random_key(2)))
            except (RuntimeError, ValueError) as error:
                print(label + failure(error), flush=True)
                wrong += 1
                continue
            parts, bad = [], False
            for other in ("xla", "reference"):
                pairs = zip(found[kernel], found[other], strict=True)
                errors = [relative_error(x, y) for x, y in pairs]
                bad |= not max(errors) <= LIMIT or any(map(np.isnan, errors))
                told = " ".join(f"{error:.1e}" for error in errors)
                parts.append(f"against {other} {told}")
            print(label + "; ".join(parts) + (" WRONG" if bad else ""), flush=True)
            wrong += bad
    print(f"attention {kernel}: {wrong} of {len(cases)} wrong (errors: output, q, k, v)")
    return wrong


def relative_error(x, y) -> float:
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/t2v_1_3b.py", metavar="FILE[:VARIANT]")
    parser.add_argument(
        "--override", nargs="+", default=[], metavar="KEY=VALUE", help="or --config.KEY=VALUE"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of a row")
    parser.add_argument(
        "--rows", type=int, help="of a step (default: as many as have the tokens of the longest)"
    )
    parser.add_argument("--remat", nargs="+", choices=REMAT, default=["full"], metavar="POLICY")
    parser.add_argument("--attention", choices=attention.IMPLEMENTATIONS, default="auto")
    parser.add_argument(
        "--batching",
        choices=("pack", "fixed"),
        default="pack",
        help="fixed: clips of one size, whose attention has no segment ids to look at",
    )
    parser.add_argument("--steps", type=int, default=2, help=f"timed, in each of {GROUPS} groups")
    parser.add_argument("--peak", type=float, help="TFLOP/s (default: the chip's, or 989)")
    parser.add_argument("--matmul", type=int, default=8192, metavar="N")
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument(
        "--check-attention",
        nargs="?",
        const="cudnn",
        choices=attention.IMPLEMENTATIONS,
        help="compare this kernel (cudnn) with others, and measure nothing",
    )
    given = [arg for arg in argv if arg.startswith("--config.")]
    args = parser.parse_args([arg for arg in argv if arg not in given])
    args.overrides = [arg.removeprefix("--config.") for arg in [*given, *args.override]]
    return args


def main() -> int:
    args = parse(sys.argv[1:])
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    if args.check_attention:
        return int(check_attention(args.check_attention) > 0)
    try:
        return int(mfu(args) > 0)
    except ValueError as error:  # no such config
        print(f"bench_mfu: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
