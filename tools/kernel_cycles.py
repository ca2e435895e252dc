"""How many cycles attention kernels take on TPUs, by the compiler's own schedule of them.

.venv-tpu/bin/python tools/kernel_cycles.py --topology v5p:2x2x1 --kernel flash --out FILE.json

libtpu writes the final bundles (instruction words; one a cycle, where nothing waits for memory) of
a kernel. Of its loop over tiles count what runs for every tile, without the parts behind a branch
that hold no matrix product: those begin and end a row of tiles. The table that the figures went
into is sora_jax/plan/kernels.py; nothing ran on a chip.
"""

import argparse
import functools
import json
import os
import re
import tempfile
from pathlib import Path

from sora_jax.plan import topology

BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s.*?:")
BRANCH = re.compile(r"sbr\.rel \((!?)%\w+\) target = \$region(\d+)")
REGION = re.compile(r"region (\d+)")
RUNNING = {"never": False, "always": True, "auto": None}  # see flash.forward
PASSES = ("heads_forward", "heads_backward")  # of memory, without a product
HEADS = 40  # in those; their loops over heads are unrolled four times
MATRIX = ("vmatmul", "vmatpush", "vdot")
# Operations over pairs of tokens: forward 4 T^2 e a head, and the backward passes.
PRODUCTS = {
    "flash_attention_forward": 2,
    "flash_attention_backward": 5,
    "splash_mha_fwd": 2,
    "splash_mha_dq": 3,
    "splash_mha_dkv": 4,
}


def region_starts(lines: list[str]) -> dict[str, int]:
    """Region -> the line that it begins at."""
    starts: dict[str, int] = {}
    for i, line in enumerate(lines):
        comment = line[line.rfind("/*") :] if "egion" in line else ""
        for part in comment.split("::"):
            if "tart" in part and (found := REGION.search(part)):
                starts.setdefault(found.group(1), i)
    return starts


def loops(lines: list[str], starts: dict[str, int]) -> list[tuple[int, int]]:
    """(first, last) line of every loop, outer ones first."""
    found = []
    for first, line in enumerate(lines):
        if not re.match(r"^\s*\w+\s+LB:", line):
            continue
        back = [
            i
            for i in range(first, len(lines))
            if (m := BRANCH.search(lines[i])) and starts.get(m.group(2)) == first
        ]
        found.append((first, back[-1] if back else len(lines) - 1))
    return found


def steady_bundles(text: str) -> tuple[int, int]:
    """Bundles of a tile in the middle of a row, and of a grid step beside its tiles."""
    lines = [line for line in text.splitlines() if BUNDLE.match(line)]
    starts = region_starts(lines)
    spans = [span for span in loops(lines, starts) if _products(lines[span[0] : span[1]])]
    outer, inner = spans[0], spans[-1]
    if inner == outer:
        return _steady(lines, starts, outer), 0
    return _steady(lines, starts, inner), _steady(lines, starts, outer, hole=inner)


def _products(lines: list[str]) -> bool:
    return any(word in line for line in lines for word in MATRIX)


def _steady(lines, starts, span, hole=None) -> int:
    """Bundles of a loop without `hole`, and without parts behind a branch that hold no product."""
    first, end = span
    total, i = end - first + 1, first
    while i < end:
        if hole and i == hole[0]:
            total -= hole[1] - hole[0] + 1
            i = hole[1] + 1
            continue
        branch = BRANCH.search(lines[i])
        target = starts.get(branch.group(2)) if branch else None
        if target is not None and i < target <= end and not _products(lines[i + 1 : target]):
            total -= target - i - 1
            i = target
            continue
        i += 1
    return total


def words_of_a_head(text: str, *, trips: int, heads: int) -> float:
    """Bundles of a tile of tokens, for each of its heads: of a loop over tiles, and loops in it."""
    lines = [line for line in text.splitlines() if BUNDLE.match(line)]
    (first, last), *inner = loops(lines, region_starts(lines))
    bodies = sum(end - start + 1 for start, end in inner)
    return (last - first + 1 - bodies + trips * bodies) / heads


def compile_kernels(args, folder: str) -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    place = SingleDeviceSharding(devices[0])
    shape = (1, args.tokens, 2, args.head_dim)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    if args.kernel == "flash":
        from sora_jax import flash
        from sora_jax.blocked_attention import Keys

        def forward(q, k, v):
            keys = Keys(k, v, None, None)
            how = {"dtype": "bfloat16", "out_dtype": "bfloat16"}
            return flash.forward(q, None, keys, running=RUNNING[args.running], **how)

        def backward(q, k, v, log_sum, pull, d_out):
            keys = Keys(k, v, None, None)
            how = {"dtype": "bfloat16", "out_dtype": "bfloat16"}
            return flash.backward(q, None, keys, log_sum, pull, d_out, **how)

        jax.jit(forward).lower(x, x, x).compile()
        sums = jax.ShapeDtypeStruct((1, 2, args.tokens), jnp.float32, sharding=place)
        jax.jit(backward).lower(x, x, x, sums, sums, x).compile()
        return
    if args.kernel == "heads":
        from sora_jax.flash import heads

        y = jax.ShapeDtypeStruct((1, args.tokens, HEADS * 128), jnp.float32, sharding=place)
        scale = jax.ShapeDtypeStruct((HEADS * 128,), jnp.float32, sharding=place)
        turn = jax.ShapeDtypeStruct((1, args.tokens, 64), jnp.float32, sharding=place)
        pull = jax.ShapeDtypeStruct((1, HEADS, args.tokens, 128), jnp.bfloat16, sharding=place)
        forward = functools.partial(heads.forward, eps=1e-6, dtype="bfloat16")
        jax.jit(forward).lower(y, scale, turn, turn).compile()
        backward = functools.partial(heads.backward, eps=1e-6)
        jax.jit(backward).lower(y, scale, turn, turn, pull).compile()
        return
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    n, (bq, bkv) = args.tokens, args.blocks
    sizes = splash.BlockSizes(
        block_q=bq, block_kv=bkv, block_kv_compute=min(bkv, 1024), block_q_dkv=bq,
        block_kv_dkv=bkv, block_kv_dkv_compute=min(bkv, 1024), block_q_dq=bq, block_kv_dq=bkv,
    )  # fmt: skip
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((n, n))] * 2),
        block_sizes=sizes, head_shards=1, q_seq_shards=1,
    )  # fmt: skip
    loss = lambda q, k, v: jnp.sum(kernel(q, k, v).astype(jnp.float32))  # noqa: E731
    x = jax.ShapeDtypeStruct((2, n, args.head_dim), jnp.bfloat16, sharding=place)
    jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", required=True)
    parser.add_argument("--kernel", default="flash", choices=("flash", "splash", "heads"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--blocks", type=int, nargs=2, default=(512, 512), metavar=("Q", "KV"))
    parser.add_argument(
        "--running",
        choices=RUNNING,
        default="never",
        help="maximum; 'auto' counts both ways' words",
    )
    parser.add_argument("--keep", metavar="DIR", help="folder for the dumped bundles")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args()
    chip, _ = topology.parse(args.topology)
    topology.prepare()
    with tempfile.TemporaryDirectory() as folder:
        folder = args.keep or folder
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        compile_kernels(args, folder)
        results = []
        for file in sorted(Path(folder).glob("*final_bundles.txt")):
            name = next((n for n in (*PRODUCTS, *PASSES) if n in file.name), None)
            if name is None or "schedule-analysis" in file.name or "gap" in file.name:
                continue
            if name in PASSES:
                words = words_of_a_head(file.read_text(), trips=HEADS // 4, heads=HEADS)
                print(json.dumps({"kernel": name, "chip": chip.name, "words": words}))
                continue
            tile, beside = steady_bundles(file.read_text())
            results.append({"kernel": name, "tile": tile, "beside": beside})
    cores = 2 if chip.name in ("v4", "v5p") else 1  # in one device; each has its own heads
    for result in results:
        result |= {"chip": chip.name, "head_dim": args.head_dim}
        result["products"] = PRODUCTS[result["kernel"]]
        result["flops_per_cycle"] = chip.flops_per_cycle / cores
        print(json.dumps(result))
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
