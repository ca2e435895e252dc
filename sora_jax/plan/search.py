"""Ranks meshes, remat policies and batch sizes by predicted tokens a second, and compiles the best.

Candidates are first judged in closed form, in milliseconds each: what cannot divide or cannot fit
is dropped, the rest ranked; only the best few are compiled, and those figures count.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from sora_jax import sharding
from sora_jax.chips import GIB
from sora_jax.dit.flops import flops as dit_flops
from sora_jax.plan import collectives, kernels, planning, published, report, steps, topology
from sora_jax.plan.policies import POLICIES, WORKING_SET
from sora_jax.progress import Progress
from sora_jax.train import program

# Bytes a second between a chip and its host (Austin et al. 2025, chapter 2: PCIe).
_HOST_LINK = 16e9
_BATCHES = (1, 2, 4, 8)  # rows of one group of devices


class Candidate(NamedTuple):
    mesh: dict[str, int]
    remat: str
    batch_size: int
    memory: float  # bytes of one device
    seconds: float
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens a second of the whole slice, predicted."""
        return self.tokens / self.seconds


class Workload(NamedTuple):
    """What a config asks for, whatever the mesh."""

    parameters: float
    depth: int
    width: int
    heads: int
    head_dim: int
    ffn: int
    tokens: int  # a row
    linear: float  # forward FLOPs of a row but for self-attention
    attention: float
    program: program.Program  # of one device; its shapes are of all that devices hold


def workload(config: Any) -> Workload:
    """Raises ValueError for a config that trains no diffusion transformer."""
    if config.stage != "dit":
        raise ValueError(f"--search is for stage 'dit', not {config.stage!r}.")
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    built = program.build(config, alone, abstract=True)
    if config.optim.offload:
        built = built._replace(shapes=built.shapes._replace(opt_state=()))
    stage = built.stage
    batch = program.abstract_batch(config, stage)
    dit = stage.dit_config
    length = batch["text_emb" if stage.text.is_cached else "ids"].shape[1]
    tokens = stage.tokens_per_clip(batch)
    places = stage.image_places(batch)
    counted = dit_flops(dit, tokens=tokens, text_tokens=length, image_rows=places)
    d = dit.width
    parameters = dit.depth * (8 * d * d + 2 * d * dit.ffn_dim) + 7 * d * d
    return Workload(
        *(float(parameters), dit.depth, d, dit.num_heads, dit.head_dim, dit.ffn_dim, tokens),
        linear=counted.total - counted.attention,
        attention=counted.attention,
        program=built,
    )


def held(work: Workload, mesh: dict[str, int], slice_: topology.Slice) -> float:
    """Bytes of a device whatever the batch: state, frozen weights, gradients as large as weights.

    In the types and places of `config.optim`, cut as training cuts them.
    """
    axes = Mesh(np.array(slice_.devices).reshape(tuple(mesh.values())), tuple(mesh))
    built = work.program._replace(mesh=axes)
    built = built._replace(placement=sharding.tree_shardings(built.shapes, axes))
    state, frozen, *_ = program.abstract_arguments(built, {})
    return steps.device_bytes((state, frozen, state.params))


def meshes(devices: int, slices: int, heads: int) -> Iterator[dict[str, int]]:
    """Every mesh of powers of two that heads divide over; `data` joins the slices alone."""
    inside = devices // slices
    sizes = [n for n in range(1, inside + 1) if inside % n == 0]
    for tensor, context in itertools.product(sizes, sizes):
        if inside % (tensor * context) or heads % tensor or tensor > 8:
            continue
        fsdp = inside // (tensor * context)
        yield {"data": slices, "fsdp": fsdp, "tensor": tensor, "context": context}


def candidates(config: Any, slice_: topology.Slice) -> list[Candidate]:
    """Those that fit by the closed form, best first."""
    work, found = workload(config), []
    for mesh in meshes(len(slice_.devices), slice_.slices, work.heads):
        if work.tokens % mesh["context"] and config.data.batching == "pack":
            continue
        whatever = held(work, mesh, slice_)
        for remat, rows in itertools.product(POLICIES, _BATCHES):
            one = judge(work, mesh, remat, rows, slice_, held=whatever)
            if one.memory <= planning.SHARE_OF_HBM * slice_.chip.device_hbm:
                found.append(one)
    return sorted(found, key=lambda c: c.rate, reverse=True)


def judge(
    work: Workload,
    mesh: dict[str, int],
    remat: str,
    rows: int,
    slice_: topology.Slice,
    *,
    held: float,
) -> Candidate:
    """Memory and time in closed form, by the rates of `published`.

    Args:
      held: bytes of a device, as the function of that name has them.
    """
    chip = slice_.chip
    kept, sent, again, attention_again = POLICIES[remat]
    shard = mesh["tensor"] * mesh["context"]
    storage = mesh["fsdp"] * shard
    token_bytes = rows * work.tokens / shard * work.width
    memory = held + token_bytes * (kept * work.depth + WORKING_SET)
    linear = rows * work.linear * (3 + again) / shard
    seconds = linear / (published.MATMUL * chip.device_flops)
    for way, times in (("forward", 1 + attention_again), ("backward", 2.5)):
        name = f"flash_attention_{way}"
        rate = chip.device_flops * kernels.share_of_peak(name, chip, head_dim=work.head_dim)
        seconds += times * rows * work.attention / shard / rate
    seconds += published.ELEMENTWISE * token_bytes * work.depth * 0.75 / chip.device_hbm_bandwidth
    busy = seconds
    link = 2 * chip.ici_link * collectives.LINK_EFFICIENCY / chip.devices
    cut = lambda n: (n - 1) / n  # noqa: E731
    # Weights gathered for both passes, gradients scattered in float32; heads exchanged.
    weights = work.parameters / mesh["tensor"] * (2 + 2 + 4)
    moved = weights * cut(mesh["fsdp"] * mesh["context"]) / link
    exchange = 16 * 2 * token_bytes * work.depth
    if mesh["context"] > 1:
        moved += exchange * cut(mesh["context"]) / link
    if mesh["tensor"] > 1:
        moved += 1.5 * exchange * cut(mesh["tensor"]) / link
    if mesh["data"] > 1:
        per_device = chip.dcn_host / (chip.chips_per_host * chip.devices)
        moved += 2 * 4 * work.parameters / storage * cut(mesh["data"]) / per_device
    # Half of it is taken as hidden; what goes to the host and back, as long as there is work.
    seconds = busy + max(0.5 * moved, moved - busy)
    to_host = 2 * sent * token_bytes * work.depth * chip.devices / _HOST_LINK
    seconds = max(seconds, to_host)
    batch = rows * mesh["data"] * mesh["fsdp"]
    return Candidate(mesh, remat, batch, memory, seconds, batch * work.tokens)


def search(
    config: Any,
    *,
    name: str,
    topology_name: str,
    slices: int = 1,
    top: int = 2,
    price: float | None = None,
) -> dict[str, Any]:
    """The ranking, and the plans of the best `top`, compiled.

    Args:
      price: of one chip for an hour.

    Raises:
      ValueError: nothing fits, or a topology that does not exist.
    """
    slice_ = topology.describe(topology_name, slices)
    ranked = candidates(config, slice_)
    if not ranked:
        raise ValueError(
            f"{name} does not fit {topology_name} with any mesh, remat policy or batch size; take "
            "a larger slice."
        )
    chosen = _different(ranked, top)
    plans = []
    with Progress("compiling", total=len(chosen), unit="plans", alone=True) as progress:
        for i, candidate in enumerate(chosen):
            plans.append(
                planning.plan(
                    configured(config, candidate),
                    name=name,
                    topology_name=topology_name,
                    slices=slices,
                    only="train",
                    price=price,
                )
            )
            progress.update(i + 1, remat=candidate.remat)
    fitting = [p for p in plans if p["train"]["fits"]]
    fitting.sort(key=lambda p: p["train"]["tokens_per_s_per_chip"], reverse=True)
    return {
        "ranked": [c._asdict() | {"tokens_per_s": c.rate} for c in ranked[:20]],
        "judged": len(ranked),
        "plans": fitting + [p for p in plans if p not in fitting],
    }


def _different(ranked: list[Candidate], top: int) -> list[Candidate]:
    """The best of every mesh and policy: batch sizes of one differ little."""
    seen, chosen = set(), []
    for candidate in ranked:
        key = (tuple(candidate.mesh.values()), candidate.remat)
        if key not in seen and len(chosen) < top:
            seen.add(key)
            chosen.append(candidate)
    return chosen


def configured(config: Any, candidate: Candidate) -> Any:
    """`config` with the candidate's mesh, policy and batch size."""
    changed = ConfigDict(config.to_dict())
    changed.mesh.update(candidate.mesh)
    changed.dit.remat = candidate.remat
    changed.batch_size = candidate.batch_size * changed.optim.accumulate
    return changed.lock()


def show(result: dict[str, Any]) -> None:
    """Prints the ranking and the compiled plans."""
    console = Console()
    off = report.checked(result["plans"][0]["method"])
    table = Table(
        title=f"best of {result['judged']} that fit by the closed form, predicted ({off})"
    )
    for column in ("mesh", "remat", "batch"):
        table.add_column(column)
    for column in ("GiB a device", "s a step", "tokens/s"):
        table.add_column(column, justify="right")
    for row in result["ranked"]:
        mesh = " ".join(f"{k} {v}" for k, v in row["mesh"].items() if v > 1)
        table.add_row(
            *(mesh, row["remat"], str(row["batch_size"]), f"{row['memory'] / GIB:.3g}"),
            *(f"{row['seconds']:.3g}", f"{row['tokens_per_s']:,.0f}"),
        )
    console.print(table)
    report.compare(result["plans"], console)
