"""Compiles a config's training step for an H200, without one, and counts what its kernels move.

python tools/gpu_step.py [--config configs/t2v_1_3b.py] [--config.optim.ema_decay=0.0]
    [--tokens 32768] [--rows 1] [--remat attention_out] [--top 12] [--out STEP.txt]

Wants JAX's CUDA packages (`pip install '.[gpu]'`) and no GPU; the step is that of bench_mfu.py.
Matrix products take their FLOPs at the rate of a large product measured on an H200, or their bytes
at .85 of the memory's bandwidth where that is longer, and all other kernels their bytes; attention
takes what cuDNN's took there. Times are predicted: nothing runs.
"""

import argparse
import os
import re
from pathlib import Path

# With a GPU's platform asked for, JAX would look for its driver.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0")

import bench_mfu
import jax
from jax._src import xla_bridge
from jax.experimental import topologies

from sora_jax import sharding
from sora_jax.plan import hlo

# NVIDIA's data sheet and CUDA's tables of compute capability 9.0.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  registers_per_core_limit: 65536
  registers_per_block_limit: 65536  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 151397597184  cuda_compute_capability { major: 9 }
  runtime_version: "12.8.0"  driver_version: "13.0.0"  dnn_version: "9.10.0"
  compile_time_toolkit_version: "12.8.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 10  patch: 0 }
device_description_str: "NVIDIA H200"
"""
PRODUCT = 689e12  # FLOP/s of a product of two 8192x8192 bfloat16 matrices, measured (bench_mfu.py)
BANDWIDTH = 0.85 * 4.8e12  # bytes a second
# Attention of 12 heads of 128 channels, 32,768 tokens, measured: 41.8 ms forward and back. Of its
# FLOPs two parts are forward, and five back.
ATTENTION = 3.5 * 4 * 32768**2 * 12 * 128 / 41.8e-3
NO_KERNEL = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
)


def device() -> jax.Device:
    """An H200 to compile for."""
    known = xla_bridge.canonicalize_platform

    def canonical(platform: str) -> str:
        try:
            return known(platform)
        except RuntimeError:  # JAX knows only the platforms whose devices are here
            return "cuda"

    xla_bridge.canonicalize_platform = canonical
    topology = topologies.get_topology_desc("", "cuda", target_config=H200, topology="1x1x1")
    return topology.devices[0]


def moved(program: hlo.Program, inside: dict[str, hlo.Instruction], i: hlo.Instruction) -> float:
    """Bytes that one run of `i` reads and writes; of arrays that are sliced, the slices."""
    if i.opcode in ("slice", "dynamic-slice"):
        return 2 * hlo.shape_bytes(i.type)
    if i.opcode == "dynamic-update-slice":
        return 2 * hlo.shape_bytes(inside[i.operands[1]].type)
    if i.opcode != "fusion":
        read = sum(hlo.shape_bytes(inside[name].type) for name in i.operands if name in inside)
        return hlo.shape_bytes(i.type) + read
    body = {part.name: part for part in program.computations[i.called[0]]}
    parameters = [part for part in body.values() if part.opcode == "parameter"]
    root = next(part for part in body.values() if part.is_root)
    return sum(_read(body, part) for part in parameters) + _written(body, root)


def _read(body, parameter: hlo.Instruction) -> float:
    users = [part for part in body.values() if parameter.name in part.operands]
    if len(users) == 1 and users[0].opcode == "bitcast":
        return _read(body, users[0])
    slices = ("slice", "dynamic-slice", "dynamic-update-slice")
    if users and all(u.opcode in slices and u.operands[0] == parameter.name for u in users):
        return sum(hlo.shape_bytes(u.type) for u in users if u.opcode != slices[-1])
    return hlo.shape_bytes(parameter.type)


def _written(body, result: hlo.Instruction) -> float:
    if result.opcode == "tuple":
        return sum(_written(body, body[name]) for name in result.operands)
    if result.opcode == "bitcast":
        return _written(body, body[result.operands[0]])
    if result.opcode == "dynamic-update-slice":
        return hlo.shape_bytes(body[result.operands[1]].type)
    return hlo.shape_bytes(result.type)


def product_flops(inside: dict[str, hlo.Instruction], i: hlo.Instruction) -> float:
    contracted = re.search(r'"lhs_contracting_dimensions":\s*\[([\d", ]*)\]', i.rest)
    sizes = hlo.dimensions(inside[i.operands[0]].type)
    flops = 2.0 * hlo.first_size(i.type)
    for dimension in re.findall(r"\d+", contracted[1]):
        flops *= sizes[int(dimension)]
    return flops


def attention_flops(inside: dict[str, hlo.Instruction], i: hlo.Instruction) -> float:
    """Of one run: two products forward, and five back, one of them the logits' again."""
    rows, q_len, heads, channels = hlo.dimensions(inside[i.operands[0]].type)
    _, kv_len, *_ = hlo.dimensions(inside[i.operands[1]].type)
    products = 5 if "SoftmaxBackward" in i.rest else 2
    return 2.0 * products * rows * heads * q_len * kv_len * channels


def kernels(program: hlo.Program):
    """(kind, seconds and bytes in a step, how often, instruction) of each kernel."""
    for name, times in program.runs.items():
        inside = {i.name: i for i in program.computations[name]}
        for i in inside.values():
            if i.opcode in NO_KERNEL:
                continue
            size = moved(program, inside, i)
            if "__cudnn$fmha" in i.rest:
                kind, each = "attention", attention_flops(inside, i) / ATTENTION
            elif "__cublas" in i.rest:
                each = max(product_flops(inside, i) / PRODUCT, size / BANDWIDTH)
                kind = "products"
            else:
                kind, each = "passes", size / BANDWIDTH
            yield kind, times * each, times * size, int(times), i


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/t2v_1_3b.py")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--remat", default="attention_out")
    parser.add_argument("--top", type=int, default=12, help="kernels to list")
    parser.add_argument("--out", type=Path, help="writes the compiled program")
    args, overrides = parser.parse_known_args()
    args.overrides = [item.removeprefix("--config.") for item in overrides]
    args.attention, args.batching = "auto", "fixed"

    mesh = sharding.make_mesh(data=1, devices=[device()])
    row = {"tokens": args.tokens, "rows": args.rows, "remat": args.remat}
    _, _, lowered = bench_mfu.prepare(args, mesh, row)
    compiled = bench_mfu.compiled(lowered, row)
    if args.out:
        args.out.write_text(compiled.as_text())
    found = sorted(kernels(hlo.parse(compiled.as_text())), key=lambda k: -k[1])
    seconds = dict.fromkeys(("attention", "products", "passes"), 0.0)
    for kind, took, *_ in found:
        seconds[kind] += took
    step = sum(seconds.values())
    parts = ", ".join(f"{kind} {value:.3f}" for kind, value in seconds.items())
    passed = sum(size for kind, _, size, *_ in found if kind == "passes")
    print(f"{args.tokens:,} x {args.rows}, {args.remat}: predicted {step:.2f} s a step ({parts})")
    rate = row["flops"] / step / 1e12
    print(f"{rate:.0f} TFLOP/s, {rate / bench_mfu.PEAK:.1%} of {bench_mfu.PEAK:.0f}; passes over")
    print(f"memory {passed / 1e9:,.0f} GB; program {row['program_gib']:.1f} GiB")
    for kind, took, size, times, i in found[: args.top]:
        told = re.search(r'op_name="([^"]*)"', i.rest)
        where = told[1].rsplit("/", 1)[-1] if told else ""
        each = f"{1e3 * took:6.1f} ms, {times} x {size / times / 1e6:,.0f} MB"
        print(f"  {kind:9} {each:28} {i.name} ({where})")


if __name__ == "__main__":
    main()
