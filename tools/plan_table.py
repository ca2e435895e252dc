"""Plans the shipped configs, one compile at a time, and writes docs/plans.md from the results.

.venv-tpu/bin/python tools/plan_table.py --results DIR            compiles what DIR lacks
.venv-tpu/bin/python tools/plan_table.py --results DIR --write    docs/plans.md from what is there

A plan costs minutes of a core; its JSON in DIR is kept, so a run that was stopped goes on. Each
runs in a process of its own, which gives its memory back.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from sora_jax import chips
from sora_jax.plan import planning, report

ROOT = Path(__file__).resolve().parents[1]
# 720p of 81 frames as one row, on four chips: the shape that others published.
_ROW = ("data.batching=fixed", "data.frames=81", "data.width=1280", "data.height=720")
_FOUR = (*_ROW, "batch_size=1", "mesh.fsdp=1", "mesh.context=4", "optim.ema_decay=0.0")
_HALVES = ("optim.param_dtype=bfloat16", "optim.moment_dtype=bfloat16")
# Frozen ones, which no plan opens.
_ENCODERS = ("text_checkpoint=DIR", "image_checkpoint=DIR")
# name, config, topology, slices, overrides
PLANS = (
    ("t2v_14b", "configs/t2v_14b.py", "v5p:8x8x8", 1, ()),
    ("sora_minute_720p", "configs/sora_minute.py:720p", "v5p:8x8x16", 1, ()),
    ("t2v_5b", "configs/t2v_5b.py", "v5p:4x4x8", 1, ()),
    ("t2v_1_3b", "configs/t2v_1_3b.py", "v6e:16x16", 1, ()),
    ("sora_minute_480p", "configs/sora_minute.py:480p", "v5p:8x8x8", 1, ()),
    ("wan_14b_row", "configs/wan.py:t2v_14b", "v5p:2x2x1", 1, (*_FOUR, *_HALVES)),
    (
        *("wan_14b_row_out", "configs/wan.py:t2v_14b", "v5p:2x2x1", 1),
        (*_FOUR, *_HALVES, "dit.remat=attention_out"),
    ),
    (
        *("wan_14b_row_offload", "configs/wan.py:t2v_14b", "v5p:2x2x1", 1),
        (*_FOUR, *_HALVES, "dit.remat=offload", "optim.offload=True"),
    ),
    *(
        (f"wan_{variant}", f"configs/wan.py:{variant}", slice_, 1, overrides)
        for variant, slice_, overrides in (
            ("t2v_1.3b", "v6e:2x4", ()),
            ("ti2v_5b", "v5p:2x2x4", ()),
            ("t2v_14b", "v5p:4x4x4", ()),
            ("i2v_14b", "v5p:4x4x4", _ENCODERS),
            ("flf2v_14b", "v5p:4x4x4", _ENCODERS),
            ("t2v_a14b", "v5p:4x4x4", ()),
            ("i2v_a14b", "v5p:4x4x4", _ENCODERS),
        )
    ),
    ("t2v_14b_v7x", "configs/t2v_14b.py", "tpu7x:4x8x8", 1, ()),
    ("t2v_5b_v6e", "configs/t2v_5b.py", "v6e:16x16", 1, ("mesh.context=4",)),
    ("t2v_1_3b_v5e", "configs/t2v_1_3b.py", "v5e:16x16", 1, ()),
    *(
        (f"staged_{stage}", f"configs/staged.py:{stage}", "v5p:8x8x8", 1, ())
        for stage in ("stage1", "stage2", "stage3", "stage4")
    ),
    ("t2v_5b_two_slices", "configs/t2v_5b.py", "v5p:4x4x4", 2, ("mesh.data=2",)),
)
# Of these the sampling step and decoding, on a few chips.
_720P = ("data.width=1280", "data.height=720")
# name, config, topology, slices, overrides, lines of the video, and whether decoding is compiled
SAMPLES = (
    ("sample_t2v_1.3b_v6e", "configs/wan.py:t2v_1.3b", "v6e:2x4", 1, (), 480, True),
    ("sample_ti2v_5b_v5p", "configs/wan.py:ti2v_5b", "v5p:2x2x1", 1, (), 704, True),
    ("sample_t2v_14b_v5p", "configs/wan.py:t2v_14b", "v5p:2x2x1", 1, (), 480, False),
    ("sample_t2v_14b_v5p_720", "configs/wan.py:t2v_14b", "v5p:2x2x1", 1, _720P, 720, False),
    ("sample_i2v_14b_v5p", "configs/wan.py:i2v_14b", "v5p:2x2x1", 1, (), 480, False),
    ("sample_t2v_14b_v6e", "configs/wan.py:t2v_14b", "v6e:2x4", 1, (), 480, False),
    ("sample_t2v_14b_tpu7x", "configs/wan.py:t2v_14b", "tpu7x:2x2x1", 1, (), 480, False),
)
# Dollars of a chip for an hour, on demand in us regions in 2025; v7x's is assumed.
PRICES = {"v5e": 1.2, "v5p": 4.2, "v6e": 2.7, "v7x": 12.0}


def run(args) -> None:
    for name, config, topology, slices, overrides, *video in (*PLANS, *SAMPLES):
        out = args.results / f"{name}.json"
        if out.exists() or (args.name and name not in args.name):
            continue
        command = [sys.executable, "-m", "sora_jax.cli", "plan", "--config", config]
        only = "sample" if name.startswith("sample_") else "train"
        command += ["--topology", topology, "--slices", str(slices), "--only", only]
        chip = {"tpu7x": "v7x"}.get(topology.split(":")[0], topology.split(":")[0])
        command += ["--json", str(out)]
        command += [] if only == "sample" else ["--price", str(PRICES[chip])]
        command += ["--decode"] if video and video[-1] else []
        command += [f"--config.{o}" for o in overrides]
        print(" ".join(command), flush=True)
        done = subprocess.run(["nice", "-n", "5", *command], cwd=ROOT)
        if done.returncode:
            print(f"{name}: exit status {done.returncode}", flush=True)


def table(results: Path, off: str) -> list[str]:
    lines = [
        f"| config | slice | mesh | remat | rows | GiB of a device (share) | step ({off}) | MFU "
        "| 1,000 steps | waiting for collectives |",
        "|-|-|-|-|-|-|-|-|-|-|",
    ]
    for name, *_ in PLANS:
        file = results / f"{name}.json"
        if file.exists():
            lines.append(row(json.loads(file.read_text())))
    return lines


def moments(part: dict) -> str:
    """What tells a plan whose moments wait on hosts from one of the same config."""
    memory = part.get("memory_gib", {})
    away = memory.get("optimizer", 0.0) < 0.01 * memory.get("weights", 0.0)
    return ", moments on hosts" if away else ""


def row(plan: dict) -> str:
    part, limit = plan["train"], plan["hbm_gib"]
    slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    mesh = " ".join(f"{k} {v}" for k, v in part["mesh"].items() if v > 1)
    cells = [plan["config"] + moments(part), f"{slices}{plan['topology']}", mesh, part["remat"]]
    cells.append(str(part["batch_size"]))
    if not part["fits"]:
        cells += [f"does not fit: {part['needed_gib']:.1f} of {limit:.1f}", "", "", "", ""]
    else:
        cells.append(f"{part['memory_gib']['peak']:.1f} ({part['hbm_share']:.0%})")
        cells += [f"{part['step_s']:.2f} s", f"{part['mfu']:.1%}"]
        cells.append(f"${part['cost_1000_steps']:,.0f}")
        cells.append(f"{part['waiting_s'] / part['step_s']:.0%}")
    return f"| {' | '.join(cells)} |"


def memory(results: Path) -> list[str]:
    kinds = ("weights", "ema", "optimizer", "frozen", "batch", "activations", "gradients")
    kinds += ("temporaries",)
    lines = [
        f"| config, slice | {' | '.join(kinds)} | state that aliases |",
        "|-" * (len(kinds) + 2) + "|",
    ]
    for name, *_ in PLANS:
        file = results / f"{name}.json"
        if file.exists():
            plan = json.loads(file.read_text())
            part = plan["train"]
            found = part["memory_gib"]
            # Plans of earlier versions have activations and gradients among the temporaries.
            values = [f"{found[kind]:.2f}" if kind in found else "" for kind in kinds]
            aliased = f"{part['aliased']:.1%}" if "aliased" in part else ""
            where = f"{plan['config']}, {plan['topology']}{moments(part)}"
            lines.append(f"| {where} | {' | '.join(values)} | {aliased} |")
    return lines


def samples(results: Path, off: str) -> list[str]:
    lines = [
        f"| config | slice | mesh | GiB of a device | a step ({off}) | MFU | 50 steps | decoding |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for name, *_, lines_of_video, _ in SAMPLES:
        file = results / f"{name}.json"
        if not file.exists():
            continue
        plan = json.loads(file.read_text())
        part = plan["sample"]
        mesh = " ".join(f"{k} {v}" for k, v in part.get("mesh", {}).items() if v > 1)
        cells = [f"{plan['config']}, {lines_of_video}p", part["topology"], mesh]
        if part["fits"]:
            cells += [f"{part['memory_gib']['peak']:.1f}", f"{part['step_s']:.2f} s"]
            cells += [f"{part['mfu']:.1%}", f"{part['denoise_s']:.0f} s"]
            decode = part.get("decode")
            cells.append(
                f"{decode['step_s']:.2f} s, {decode['memory_gib']['peak']:.1f} GiB"
                if decode
                else f"{part['decode_flops'] / 1e12:,.0f} TFLOP"
            )
        else:
            limit = plan["hbm_gib"]
            cells += [f"does not fit: {part['needed_gib']:.1f} of {limit:.1f}", *[""] * 4]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def arithmetic(results: Path, off: str) -> list[str]:
    """Seconds by part of rows of 75,600 tokens through the 14B, and what they come from."""
    lines = [
        f"| slice, policy | XLA (copies among it) | attention | waiting | step ({off}) | MFU |",
        "|-|-|-|-|-|-|",
    ]
    rows = ("wan_14b_row_out", "wan_14b_row", "wan_14b_row_offload", "t2v_14b", "t2v_14b_v7x")
    for name in rows:
        file = results / f"{name}.json"
        if not file.exists():
            continue
        plan = json.loads(file.read_text())
        part = plan["train"]
        if "step_s" not in part:
            continue
        model = sum(part["flops"].values())
        peak = next(c.bf16 for c in chips.CHIPS if c.name == plan["chip"]) * plan["chips"]
        lines.append(
            f"| {plan['topology']}, {part['remat']}{moments(part)} "
            f"| {part['compute_s']:.2f} s ({part['copies_s']:.2f}) "
            f"| {part['attention_s']:.2f} s | {part['waiting_s']:.2f} s | {part['step_s']:.2f} s "
            f"| {model / 1e12:,.0f} TFLOP / ({part['step_s']:.2f} s x {peak / 1e12:,.0f} TFLOP/s) "
            f"= {part['mfu']:.1%} |"
        )
    return lines


def checks(method: dict) -> list[str]:
    lines = ["| measured step | measured | predicted | error |", "|-|-|-|-|"]
    for what, check in method["checks"].items():
        lines.append(
            f"| {what} | {check['measured_s']:.2f} s | {check['predicted_s']:.2f} s "
            f"| {check['error']:+.1%} |"
        )
    return lines


TEXT = """# Plans of the shipped configs

Everything here is **predicted**: the real training steps were compiled for these slices on a
machine without a TPU (`sora-jax plan`), and nothing ran on a chip. `tools/plan_table.py` writes
this page. Dollars are at {prices} a chip-hour; the last is assumed.

{table}

Of the time of a step, "waiting for collectives" is the share in which nothing else is done. Memory
is what XLA reserves: arguments, temporaries and the program. MFU and dollars are as far off as the
steps that they come from.

## A video on a few chips

What `sora-jax sample` runs there: steps with both branches of guidance, side by side from four
devices on, and the decoder, compiled (`--decode`) or counted. Memory is that of all weights, in
bfloat16 but for the VAE's, and of what runs.

{samples}

## Memory of a device, GiB

Activations are what the loop over blocks keeps for the backward pass, gradients those of the
blocks; temporaries are the rest.

{memory}

## Rows of 75,600 tokens through the 14B, part by part

On four chips one row, the shape whose step others published at 36.0 s: weights and moments in
bfloat16, no average. With the state in bfloat16 a published program takes 42.0 GiB; with moments
and blocks' inputs on hosts this one takes 24.6, where .8 of that, 33.6, was the goal. The largest
all-gather over `context` there makes .29 GiB, of weights; keys of the row would be .72 GiB and are
gathered nowhere, for heads change places with tokens (.14 GiB a device at most). On the larger
slices 64 rows.

{arithmetic}

## What a search finds

`sora-jax plan --config configs/t2v_1_3b.py --topology v6e:16x16 --search` judged 490 candidates in
closed form, ranked `fsdp 256`, `attention_out`, 256 rows among the first and compiled it: 2.95 s a
step ({off}), 32.4 % MFU, 16.7 GiB (53 %), 11,093 tokens/s a chip, $567 for 1,000 steps; the closed
form had said 3.78 s and 14.7 GiB. Row for row that is .86 of the time of the mesh that is shipped
(1.72 s for 128), with twice the rows a step. The first of the ranking, `attention_out_offload` with
2,048 rows, did not fit (58.9 GiB, where 23.1 were thought); the closed form has been mended since
and drops it.

## How the times are predicted

- What XLA compiles: the compiler's own estimated cycles times the runs of the loops around them,
  over the clock at which the matrix units reach the data sheet's FLOP/s.
- Attention kernels, for which XLA estimates nothing: the instruction words that libtpu schedules
  for a tile, or what its products keep the matrix units busy for if that is longer, and .35 us a
  grid step (`tools/kernel_cycles.py`, `sora_jax/plan/kernels.py`). That is for heads that need no
  running maximum (`sora_jax/flash/forward.py`: the longest query times the longest key, which no
  logit exceeds, is at most 69); the forward pass of others takes up to twice the words: with a
  maximum everywhere the 14B on tpu7x:4x8x8 has 36 % MFU and not 40.9 %. On v5p a device's two cores
  share out whole heads in the backward pass. The kernels that make queries and keys: their
  instruction words, or their bytes at the full bandwidth if that is longer.
- Collectives: bytes over links at 90 % of their bandwidth (`sora_jax/plan/collectives.py`). Those
  with work between start and end are taken as hidden; the rest adds up.
- MFU counts three forward passes of the transformer, and nothing that is computed again.

No figure is fitted to a measured step. The same method, in closed form, against steps that others
measured:

{checks}

The third's seconds are those of the 65 % MFU that it is published with. So a time here is good to
about ten percent where the program is like theirs. What the checks do not cover: how well
collectives hide (the video transformers' are all waited for, the language model's taken as hidden),
and our own kernels, of which no chip has run any. They assume the tiles that the other project's
public configurations name; with tiles of 512 x 512 on v7x as well, the second would be +56 %.
"""


def write(args) -> None:
    found = [args.results / f"{name}.json" for name, *_ in PLANS]
    found = [json.loads(file.read_text()) for file in found if file.exists()]
    method = planning.method()  # of now, whatever the plans were made with
    off = report.checked(method)
    if not found:
        sys.exit(f"{args.results} holds no plan; run without --write first.")
    text = TEXT.format(
        off=off,
        prices=", ".join(f"${price:g} ({chip})" for chip, price in PRICES.items()),
        table="\n".join(table(args.results, off)),
        samples="\n".join(samples(args.results, off)),
        memory="\n".join(memory(args.results)),
        arithmetic="\n".join(arithmetic(args.results, off)),
        checks="\n".join(checks(method)),
    )
    (ROOT / "docs" / "plans.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", required=True, type=Path, help="folder of the plans' JSON")
    parser.add_argument("--name", nargs="*", help="of PLANS: these alone")
    parser.add_argument("--write", action="store_true", help="docs/plans.md from what is there")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    write(args) if args.write else run(args)


if __name__ == "__main__":
    main()
