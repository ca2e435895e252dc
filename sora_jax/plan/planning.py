"""One plan: compiles the steps, and puts all that is known of them into plain values for JSON."""

from typing import Any

from sora_jax.chips import GIB
from sora_jax.plan import policies, published, roofline, sampling, steps, topology

SHARE_OF_HBM = 0.9  # that a plan should stay below
# Kinds of a compiled step's memory that are no arguments.
_OF_COMPILER = ("activations", "gradients", "temporaries", "program", "on hosts", "peak")


def plan(
    config: Any,
    *,
    name: str,
    topology_name: str,
    slices: int = 1,
    only: str | None = None,
    decode: bool = False,
    price: float | None = None,
) -> dict[str, Any]:
    """The plan of `config` on a slice, as JSON takes it. Times are predicted.

    Args:
      name: of the config.
      only: "train" or "sample"; None is both.
      decode: compiles the VAE's decoder too, which takes minutes; else its work is counted.
      price: of one chip for an hour.

    Raises:
      ValueError: a topology that does not exist, or a config that does not divide over it.
    """
    slice_ = topology.describe(topology_name, slices)
    result = {
        "config": name,
        "topology": topology_name,
        "slices": slices,
        "chips": slice_.chips,
        "chip": slice_.chip.name,
        "devices": len(slice_.devices),
        "hbm_gib": slice_.chip.device_hbm / GIB,
        "method": method(),
    }
    if only == "sample" and config.stage != "dit":
        raise ValueError(f"--only sample is for stage 'dit', not {config.stage!r}.")
    if only != "sample":
        result["train"] = _train(config, slice_, price)
    if only != "train" and config.stage == "dit":
        # What trains on a pod makes videos on one of its hosts, unless sampling alone is asked for.
        alone = only == "sample" and slices == 1
        host = slice_ if alone else topology.describe(topology.one_host(slice_.chip))
        result["sample"] = _sample(config, host, decode)
    return result


def method() -> dict[str, Any]:
    """How the times are predicted, and how far off that was of steps that others measured."""
    checks = {}
    for step in published.STEPS:
        check = published.predict(step)
        checks[step.what] = {
            "measured_s": step.seconds,
            "predicted_s": check.predicted,
            "error": check.error,
            "parts_s": check.parts,
        }
    return {
        "checks": checks,
        "note": "predicted: nothing ran on a chip",
    }


def _train(config: Any, slice_: topology.Slice, price: float | None) -> dict[str, Any]:
    mesh = dict(steps.mesh_of(config, slice_).shape)
    base = {
        "mesh": mesh,
        "batch_size": config.batch_size,
        "remat": config.dit.remat if config.stage == "dit" else "",
    }
    try:
        step = steps.train(config, slice_)
    except steps.TooLarge as error:
        largest = largest_batch(config, mesh, error.memory, peak=error.needed, limit=error.limit)
        found = {"memory_gib": _memory_gib(error), "largest_batch": largest}
        return base | found | too_large(error, config, mesh)
    found = base | _step(step, slice_)
    found["largest_batch"] = largest_batch(
        config, mesh, step.memory, peak=step.memory["peak"], limit=slice_.chip.device_hbm
    )
    if not found["fits"]:
        found |= too_large(_shortage(step, slice_), config, mesh)
    if price is not None:
        hours = 1000 * found["step_s"] / 3600
        found["price"] = price
        found["cost_1000_steps"] = hours * price * slice_.chips
    return found


def _sample(config: Any, host: topology.Slice, decode: bool) -> dict[str, Any]:
    base = {"topology": host.name, "steps": config.sample.steps}
    try:
        step = sampling.denoise(config, host)
    except steps.TooLarge as error:
        found = {"part": "denoising", "memory_gib": _memory_gib(error)}
        return base | found | no_video(error, config)
    found = base | {"mesh": dict(step.mesh.shape)} | _step(step, host)
    found["denoise_s"] = found["step_s"] * config.sample.steps
    found["decode_flops"] = sampling.decode_flops(config)
    if not found["fits"]:
        return found | {"part": "denoising"} | no_video(_shortage(step, host), config)
    if not decode:
        return found
    try:
        step = sampling.decode(config, host)
        error = _shortage(step, host)
        found["decode"] = _step(step, host)
    except steps.TooLarge as refused:
        error = refused
        found["decode"] = {"fits": False, "needed_gib": error.needed / GIB}
    if not found["decode"]["fits"]:
        return found | {"part": "decoding"} | no_video(error, config)
    return found | {"video_s": found["denoise_s"] + found["decode"]["step_s"]}


def _shortage(step: steps.Step, slice_: topology.Slice) -> steps.TooLarge:
    """What a program lacks that the compiler takes, but that has no room beside all else."""
    memory = {kind: value for kind, value in step.memory.items() if kind not in _OF_COMPILER}
    return steps.TooLarge(step.memory["peak"], slice_.chip.device_hbm, memory)


def _step(step: steps.Step, slice_: topology.Slice) -> dict[str, Any]:
    found = roofline.predict(step, slice_)
    limit = slice_.chip.device_hbm
    executed = sum(step.counts.values())
    model = sum(step.flops.values())
    return {
        "fits": step.memory["peak"] <= limit,
        "needed_gib": step.memory["peak"] / GIB,
        "hbm_share": step.memory["peak"] / limit,
        "memory_gib": {kind: value / GIB for kind, value in step.memory.items()},
        "aliased": step.aliased,
        "flops": step.flops,
        "executed_flops": dict(step.counts),
        "recomputed": max(0.0, executed / model - 1) if model else 0.0,
        "step_s": found.step,
        "compute_s": found.compute,
        "copies_s": found.largest_copies,
        "attention_s": found.kernels,
        "waiting_s": found.waiting,
        "hidden_s": found.hidden,
        "mfu": found.mfu,
        "tokens_per_s_per_chip": step.tokens / found.step / slice_.chips,
        "collectives": [c._asdict() for c in found.collectives],
        "trace_compile_s": step.seconds,
    }


def largest_batch(
    config: Any, mesh: dict[str, int], memory: dict[str, float], *, peak: float, limit: float
) -> dict[str, Any]:
    """By the linear model of one compile: all but state and gradients grows with the batch.

    Args:
      memory: bytes of one device by kind; gradients that are not told apart are as the weights.
      limit: bytes of one device, of which SHARE_OF_HBM may be taken.
    """
    rows = mesh["data"] * mesh["fsdp"] * config.optim.accumulate
    fixed = sum(memory.get(kind, 0.0) for kind in ("weights", "ema", "optimizer", "frozen"))
    fixed += memory.get("gradients") or memory["weights"]
    each = max(peak - fixed, 0.0) / max(1, config.batch_size // rows)
    most = int((SHARE_OF_HBM * limit - fixed) / each) * rows if each else config.batch_size
    return {"batch_size": max(most, 0), "by": "the linear model of one compile"}


def too_large(error: steps.TooLarge, config: Any, mesh: dict[str, int]) -> dict[str, Any]:
    """What a training step lacks, and the knob that gives most by the kinds of memory."""
    held = {kind: error.memory.get(kind, 0.0) for kind in ("weights", "ema", "optimizer")}
    state, rest = sum(held.values()), error.needed - sum(error.memory.values())
    knobs = {}
    if rest > 0:
        rows = config.batch_size // max(1, mesh["data"] * mesh["fsdp"] * config.optim.accumulate)
        if rows > 1:
            half = "config.optim.accumulate" if rows % 2 == 0 else "config.batch_size (smaller)"
            value = f"={2 * config.optim.accumulate}" if rows % 2 == 0 else ""
            knobs[half + value] = rest / 2
        if config.stage == "dit":
            dit = config.dit
            better = "full" if policies.kept(dit.remat) > policies.kept("full") else "offload"
            share = policies.freed(dit.remat, better, depth=dit.depth)
            knobs[f"config.dit.remat={better}"] = max(rest - held["weights"], 0.0) * share
        knobs["config.mesh.context twice as large (on as many devices: fsdp half)"] = rest / 2
    if mesh["data"] > 1:
        knobs["config.mesh.data=1 with a larger fsdp"] = state * (1 - 1 / mesh["data"])
    if config.optim.moment_dtype == "float32":
        knobs["config.optim.moment_dtype=bfloat16"] = held["optimizer"] / 2
    if config.optim.name == "adamw":  # Muon fetches all moments at once
        knobs["config.optim.offload=True"] = held["optimizer"]
    knobs["config.optim.ema_decay=0.0"] = held["ema"]
    if config.optim.param_dtype == "float32":  # and gradients
        knobs["config.optim.param_dtype=bfloat16"] = held["weights"]
    knobs["a slice of twice as many chips"] = state / 2
    return _short(error, knobs)


def no_video(error: steps.TooLarge, config: Any) -> dict[str, Any]:
    """What denoising or decoding lacks, and the knob that gives most by the kinds of memory.

    Weights and activations are cut over `context`, which takes the devices of a larger slice.
    """
    weights, rest = error.memory["weights"], error.needed - sum(error.memory.values())
    knobs = {"config.data.frames half as many": rest / 2}
    if config.dit.dtype == "float32":
        knobs["config.dit.dtype=bfloat16"] = weights / 2
    knobs["a slice of twice as many chips"] = (weights + rest) / 2
    return _short(error, knobs)


def _short(error: steps.TooLarge, knobs: dict[str, float]) -> dict[str, Any]:
    """Of knobs that give as much, by what is shown, the first."""
    best = max(knobs, key=lambda knob: round(knobs[knob] / GIB, 1))
    return {
        "fits": False,
        "needed_gib": error.needed / GIB,
        "short_gib": (error.needed - error.limit) / GIB,
        "knob": best,
        "knob_gib": knobs[best] / GIB,
    }


def _memory_gib(error: steps.TooLarge) -> dict[str, float]:
    rest = error.needed - sum(error.memory.values())
    return {kind: value / GIB for kind, value in (error.memory | {"temporaries": rest}).items()}
