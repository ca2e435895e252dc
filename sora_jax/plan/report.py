"""A plan as tables, for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sora_jax.plan.planning import SHARE_OF_HBM

_ORDER = ("weights", "ema", "optimizer", "frozen", "batch", "activations", "gradients")
_ORDER += ("temporaries", "program", "peak")


def show(plan: dict[str, Any], console: Console | None = None) -> None:
    """Prints the tables of one plan."""
    console = console or Console()
    for kind in ("train", "sample"):
        if kind in plan:
            console.print(summary([plan], kind))
            if "step_s" in plan[kind]:
                for table in (flops(plan[kind]), collectives(plan[kind])):
                    console.print(table)
    for line in footnotes(plan):
        console.print(line, style="dim", highlight=False)


def compare(plans: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Prints several plans side by side."""
    console = console or Console()
    for kind in ("train", "sample"):
        if all(kind in plan for plan in plans):
            console.print(summary(plans, kind))
    for line in footnotes(plans[0]):
        console.print(line, style="dim", highlight=False)


def summary(plans: Sequence[dict[str, Any]], kind: str) -> Table:
    """Does it fit, memory by kind, predicted time; a column a plan."""
    table = Table(title=f"{kind} step, predicted: nothing ran on a chip")
    table.add_column("")
    for plan in plans:
        slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
        where = plan[kind].get("topology", f"{slices}{plan['topology']}")
        table.add_column(f"{plan['config']}\n{where}", justify="right")
    table.caption = f"of times, MFU and cost {checked(plans[0]['method'])}"
    columns = [rows(plan, kind) for plan in plans]
    names = list(dict.fromkeys(name for column in columns for name in column))
    for name in names:
        table.add_row(name, *(column.get(name, "") for column in columns))
    return table


def seconds(value: float) -> str:
    """In a unit that shows three digits."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.3g} ms"


def checked(method: dict[str, Any]) -> str:
    """How far off the method was of steps that others measured: "checks: -5% to +8%"."""
    errors = [check["error"] for check in method["checks"].values()]
    return f"checks: {min(errors):+.0%} to {max(errors):+.0%}"


def rows(plan: dict[str, Any], kind: str) -> dict[str, str]:
    """What the summary says of one plan: name -> value."""
    part, limit = plan[kind], plan["hbm_gib"]
    found: dict[str, str] = {}
    if "mesh" in part:
        found["mesh"] = " ".join(f"{k} {v}" for k, v in part["mesh"].items() if v > 1) or "1"
    for name in ("batch_size", "remat"):
        if part.get(name):
            found[name] = str(part[name])
    if not part["fits"]:
        found["fits"] = f"NO: needs {part['needed_gib']:.1f} of {limit:.1f} GiB"
        found["short of"] = f"{part['short_gib']:.1f} GiB"
        found["what helps most"] = f"{part['knob']} (about {part['knob_gib']:.1f} GiB)"
    else:
        over = "" if part["hbm_share"] <= SHARE_OF_HBM else f", above {SHARE_OF_HBM:.0%}"
        found["fits"] = f"yes: {part['hbm_share']:.0%} of {limit:.1f} GiB a device{over}"
    memory = part.get("memory_gib", {})
    kinds = [k for k in _ORDER if k in memory] + [k for k in memory if k not in _ORDER]
    for name in kinds:
        if memory[name] >= 0.005 or name == "peak":
            found[f"GiB, {name}"] = f"{memory[name]:.2f}"
    if "largest_batch" in part:
        most = part["largest_batch"]["batch_size"]
        found[f"largest batch within {SHARE_OF_HBM:.0%}"] = f"about {most}" if most else "none"
    if "step_s" not in part:
        return found
    if kind == "train":  # sampling keeps the latents before a step, for previews
        found["state that aliases"] = f"{part['aliased']:.1%}"
    found["step, predicted"] = f"{seconds(part['step_s'])} ({checked(plan['method'])})"
    for name, key in (
        ("  compiled by XLA", "compute_s"),
        ("    copies among it", "copies_s"),
        ("  attention kernels", "attention_s"),
        ("  waiting for collectives", "waiting_s"),
        ("  (collectives hidden)", "hidden_s"),
    ):
        found[name] = seconds(part[key])
    found["MFU, predicted"] = f"{part['mfu']:.1%}"
    found["tokens/s a chip"] = f"{part['tokens_per_s_per_chip']:,.0f}"
    if "denoise_s" in part:
        found[f"{part['steps']} steps"] = seconds(part["denoise_s"])
    if "decode_flops" in part:
        found["VAE decoding, TFLOP"] = f"{part['decode_flops'] / 1e12:,.4g}"
    decode = part.get("decode", {})
    if "step_s" in decode:
        found["VAE decoding, GiB at its peak"] = f"{decode['memory_gib']['peak']:.2f}"
        found["VAE decoding, predicted"] = seconds(decode["step_s"])
    if "video_s" in part:
        found["a video, predicted"] = seconds(part["video_s"])
    if "cost_1000_steps" in part:
        found[f"1,000 steps at ${part['price']:g} a chip-hour"] = f"${part['cost_1000_steps']:,.0f}"
    spent = part["trace_compile_s"]
    found["traced, compiled here"] = f"{spent['trace']:.0f} s, {spent['compile']:.0f} s"
    return found


def flops(part: dict[str, Any]) -> Table:
    """The model's arithmetic by part, and what is executed."""
    table = Table(title="FLOPs of a step, counted")
    table.add_column("part")
    table.add_column("TFLOP", justify="right")
    table.add_column("share", justify="right")
    total = sum(part["flops"].values())
    for name, value in part["flops"].items():
        table.add_row(name, f"{value / 1e12:,.4g}", f"{value / total:.1%}")
    table.add_row("model, in all", f"{total / 1e12:,.4g}", "", style="bold")
    for name, value in part["executed_flops"].items():
        table.add_row(f"executed, {name}", f"{value / 1e12:,.4g}", "")
    table.add_row("computed again", "", f"{part['recomputed']:.1%}")
    return table


def collectives(part: dict[str, Any]) -> Table:
    """Collectives by kind and mesh axes."""
    table = Table(title="collectives of a step, from the compiled program")
    for name in ("kind", "over"):
        table.add_column(name)
    for name in ("number", "GiB a device sends", "asynchronous", "time, predicted"):
        table.add_column(name, justify="right")
    for row in part["collectives"]:
        table.add_row(
            row["kind"],
            ", ".join(row["axes"]),
            f"{row['count']:.0f}",
            f"{row['bytes'] / 2**30:.3g}",
            f"{row['overlapped']:.0%}",
            seconds(row["seconds"]),
        )
    return table


def footnotes(plan: dict[str, Any]) -> list[str]:
    """How the times came about, and the method's error."""
    checks = plan["method"]["checks"]
    errors = ", ".join(
        f"{what}: {c['predicted_s']:.1f} s for {c['measured_s']:.1f} ({c['error']:+.0%})"
        for what, c in checks.items()
    )
    return [
        "Times: cycles that the compiler estimates, and of attention kernels those that it "
        "schedules; collectives by bytes over links, those with work beside them taken as hidden.",
        f"The same method against published measured steps: {errors}.",
        "The largest batch is by the linear model of one compile.",
    ]
