"""Bars, histograms and tables of `data inspect`, drawn with rich."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from sora_jax.data.build.charts import TALLIES, titled
from sora_jax.data.build.words import count, short

KEPT, DROPPED = "cyan", "yellow"
STYLE = {"box": box.SIMPLE_HEAD, "title_justify": "left", "title_style": "bold", "pad_edge": False}
BAR = 28  # cells of a funnel's bar
ROWS = 4  # cells that a histogram is high
EIGHTHS = " ▁▂▃▄▅▆▇█"
LEFT_EIGHTHS = " ▏▎▍▌▋▊▉█"
FEW_BARS = 12  # up to so many are drawn two cells wide
TALLIED = 6


def plain(text: str) -> Text:
    """`text` as it is: no markup, and nothing that moves a terminal's cursor."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def heading(console: Console, name: str, what: str) -> None:
    console.print()
    console.print(plain(what), style="bold")
    console.print(plain(name), style="dim", overflow="fold")


def facts(console: Console, values: Mapping[str, str]) -> None:
    """Two columns; empty values are left out."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    for name, value in values.items():
        if value:
            table.add_row(Text(name, style="dim"), plain(value))
    console.print()
    console.print(table)
    console.print()


def bar(kept: float | int, dropped: float | int) -> Text:
    """Shares of one bar: what stays, and what goes."""
    eighths = round(kept * BAR * 8)
    whole, rest = divmod(eighths, 8)
    drawn = Text("█" * whole + (LEFT_EIGHTHS[rest] if rest else ""), style=KEPT)
    gone = max(round(dropped * BAR), 1) if dropped else 0
    gone = min(gone, BAR - len(drawn)) if len(drawn) < BAR else 0
    return drawn + Text("░" * gone, style=DROPPED)


def histograms(console: Console, data: Mapping[str, Mapping[str, Any]]) -> None:
    """All of them side by side, as many in a row as fit."""
    charts = [_histogram(title, data[name]) for name, title in titled(data)]
    if charts:
        if any(sum(chart["dropped"]) for chart in data.values()):
            console.print(Text("█ kept ", style=KEPT) + Text("░ dropped", style=DROPPED))
            console.print()
        console.print(Columns(charts, padding=(0, 3), equal=True))


def _histogram(title: str, data: Mapping[str, Any]) -> Group:
    kept, dropped, edges = data["kept"], data["dropped"], data["edges"]
    highest = max(map(sum, zip(kept, dropped, strict=True))) or 1
    head = Text(title, style="bold")
    if "median" in data:
        head.append(f"  median {short(data['median'])}", style="dim not bold")
    head.append(f" {data['unit']}" if len(data["unit"]) < 16 else "", style="dim not bold")
    lines = [head]
    levels = [
        (round(k / highest * ROWS * 8), round((k + d) / highest * ROWS * 8))
        for k, d in zip(kept, dropped, strict=True)
    ]
    # What is there is seen, however rare.
    levels = [(max(k, kept[i] > 0), max(t, kept[i] + dropped[i] > 0))
              for i, (k, t) in enumerate(levels)]  # fmt: skip
    for row in reversed(range(ROWS)):
        line = Text()
        for k, total in levels:
            cell, style = _cell(int(k) - 8 * row, int(total) - 8 * row)
            line.append(cell * 2 + " " if len(levels) <= FEW_BARS else cell, style)
        lines.append(line)
    width = max(len(lines[-1]), 12)
    low, high = short(edges[0]), short(edges[-1])
    lines.append(Text(f"{low}{high.rjust(width - len(low))}", style="dim"))
    outside = sum(data["below"]) + sum(data["above"])
    lines.append(Text(f"{count(outside)} outside" if outside else "", style="dim"))
    return Group(*lines)


def _cell(kept: int, total: int) -> tuple[str, str]:
    """One character of a stacked bar, whose levels are in eighths from the cell's foot.

    Dropped clips fill whole cells: they must differ where there is no colour.
    """
    if kept > 0:
        return EIGHTHS[min(kept, 8)], KEPT
    return "░" if total > 0 else " ", DROPPED


def tallies(console: Console, data: Mapping[str, Mapping[str, int]]) -> None:
    """The most frequent words of each tally, with bars."""
    tables = []
    for name, title in TALLIES.items():
        counts = data.get(name)
        if not counts:
            continue
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column()
        most = max(counts.values())
        for word, number in list(counts.items())[:TALLIED]:
            shape = Text("█" * max(round(10 * number / most), 1), style=KEPT)
            table.add_row(plain(word), shape, Text(count(number), style="dim"))
        rest = len(counts) - TALLIED
        note = Text(f"and {count(rest)} more" if rest > 0 else "", style="dim")
        tables.append(Group(Text(title, style="bold"), table, note))
    if tables:
        console.print(Columns(tables, padding=(0, 3)))


def named(
    console: Console, title: str, rows: Sequence[tuple[str, str]], number: int, *, most: int
) -> None:
    """Names with their reasons, up to `most` of them; nothing if there are none."""
    if not number:
        return
    table = Table(title=f"{title}: {count(number)}", show_header=False, **STYLE)
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for name, reason in rows[:most]:
        table.add_row(plain(name), plain(reason))
    if number > most:
        table.add_row("...", plain(f"and {count(number - most)} more"))
    console.print(table)
