"""Draws docs/mesh.png: the mesh of a run, and what travels on which of its axes.

.venv/bin/python tools/draw_mesh.py --out docs/mesh.png
"""

import argparse
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

PAPER, INK, SOFT, LINE = "#fbfaf6", "#22252b", "#6a6f7a", "#cfccc3"
AXES = {"data": "#b5483a", "fsdp": "#2f6f9f", "tensor": "#8a6a14", "context": "#3c7d4b"}
TINTS = ("#dbe8f1", "#b9d3e5", "#96bdd8", "#73a7ca")  # fsdp: quarters of the weights and the batch
WIDTH, HEIGHT = 12.0, 8.5


def box(ax, x, y, w, h, *, face="white", edge=LINE, width=1.0, radius=0.08, order=1):
    patch = FancyBboxPatch(
        (x, y), w, h, boxstyle=f"round,pad=0,rounding_size={radius}",
        facecolor=face, edgecolor=edge, linewidth=width, zorder=order,
    )  # fmt: skip
    ax.add_patch(patch)


def cell(ax, x, y, w, h, face, *, edge="white"):
    ax.add_patch(Rectangle((x, y), w, h, facecolor=face, edgecolor=edge, linewidth=1, zorder=3))


def arrow(ax, start, end, color, *, both=False, curve=0.0, width=1.8, shrink=0):
    patch = FancyArrowPatch(
        start, end, arrowstyle="<|-|>" if both else "-|>", mutation_scale=12, color=color,
        linewidth=width, connectionstyle=f"arc3,rad={curve}", zorder=5,
        shrinkA=shrink, shrinkB=shrink,
    )  # fmt: skip
    ax.add_patch(patch)


def text(ax, x, y, words, *, size=9.5, color=INK, weight="normal", ha="left", va="center"):
    ax.text(
        x, y, words, fontsize=size, color=color, weight=weight, ha=ha, va=va, zorder=6,
        linespacing=1.35,
    )  # fmt: skip


def draw_slice(ax, x, y, name):
    """4 (fsdp) x 2 (tensor) x 2 (context) chips."""
    box(ax, x, y - 0.32, 4.15, 3.82, radius=0.14)
    text(ax, x + 0.2, y + 3.25, name, weight="bold", size=10.5)
    text(ax, x + 3.97, y + 3.25, "16 chips, joined by ICI", color=SOFT, size=8.5, ha="right")
    for row in range(4):
        for column in range(4):
            cx = x + 0.72 + column * 0.78 + (0.14 if column > 1 else 0)
            cy = y + 1.97 - row * 0.58
            box(ax, cx, cy, 0.64, 0.46, face=TINTS[row], edge="white", radius=0.06, order=2)
            label = f"tokens {'ab'[column // 2]}\nheads {'ab'[column % 2]}"
            text(ax, cx + 0.32, cy + 0.23, label, size=6.6, ha="center")


def draw_mesh(ax):
    top = 4.3
    left, right = 0.45, 7.4
    for x, name in ((left, "slice 0"), (right, "slice 1")):
        draw_slice(ax, x, top, name)
    middle = top + 1.5
    arrow(ax, (left + 4.2, middle), (right - 0.05, middle), AXES["data"], both=True, width=2.6)
    text(ax, 6.0, middle + 0.48, "data", color=AXES["data"], weight="bold", size=13, ha="center")
    text(ax, 6.0, middle + 0.2, "over the data centre (DCN)", size=8.5, ha="center")
    text(ax, 6.0, middle - 0.26, "gradients, once a step;", size=8.5, ha="center")
    text(ax, 6.0, middle - 0.48, "the same weights, other clips", size=8.5, ha="center")
    text(ax, 6.0, top + 0.2, "a shade is a part of the weights,", size=8, color=SOFT, ha="center")
    text(ax, 6.0, top, "and of the clips of a step", size=8, color=SOFT, ha="center")
    for x in (left, right):
        arrow(ax, (x + 0.5, top + 2.42), (x + 0.5, top + 0.25), AXES["fsdp"], both=True)
        ax.text(
            x + 0.27, top + 1.34, "fsdp 4", rotation=90, color=AXES["fsdp"], weight="bold",
            fontsize=10.5, ha="center", va="center",
        )  # fmt: skip
        low = top + 0.13
        for first in (0.72, 2.42):
            a, b = x + first + 0.32, x + first + 1.1
            arrow(ax, (a - 0.1, low), (b + 0.1, low), AXES["tensor"], both=True, width=1.4)
        for first in (0.72, 2.42):
            text(
                ax, x + first + 0.71, top - 0.14, "tensor 2", color=AXES["tensor"], weight="bold",
                ha="center",
            )  # fmt: skip
        arrow(
            ax, (x + 1.43, top + 2.45), (x + 3.13, top + 2.45), AXES["context"], both=True,
            curve=-0.16,
        )  # fmt: skip
        text(
            ax, x + 2.28, top + 2.76, "context 2", color=AXES["context"], weight="bold", ha="center"
        )


def card(ax, x, name, title, words):
    box(ax, x, 0.3, 2.62, 3.4, radius=0.12)
    ax.add_patch(Rectangle((x + 0.18, 3.38), 0.13, 0.13, facecolor=AXES[name], zorder=3))
    text(ax, x + 0.4, 3.45, name, weight="bold", color=AXES[name], size=12)
    text(ax, x + 0.18, 3.13, title, weight="bold", size=8.9)
    text(ax, x + 0.18, 0.93, textwrap.fill(words, 32, break_on_hyphens=False), size=8.1)


def draw_data(ax, x):
    words = (
        "Each replica takes its share of the clips. Gradients are all-reduced once a step: "
        "little enough for the network between slices, and it can hide behind the backward pass."
    )
    card(ax, x, "data", "replicas of the weights", words)
    for i, label in enumerate(("replica 0", "replica 1")):
        cx = x + 0.28 + i * 1.16
        for j in range(4):
            cell(ax, cx, 2.06 + j * 0.17, 0.9, 0.17, TINTS[3 - j])
        text(ax, cx + 0.45, 2.88, label, size=7.6, ha="center", color=SOFT)
    arrow(ax, (x + 0.73, 2.02), (x + 1.89, 2.02), AXES["data"], both=True, curve=0.3)
    text(ax, x + 1.31, 1.68, "gradients", size=7.6, color=AXES["data"], ha="center")


def draw_fsdp(ax, x):
    words = (
        "A chip keeps 1/n of weights, moments and EMA. Block by block, weights are all-"
        "gathered before use and let go; gradients are reduce-scattered to their owners. "
        "Clips are split too."
    )
    card(ax, x, "fsdp", "all state, and the clips", words)
    for j in range(4):
        cell(ax, x + 0.26, 1.8 + j * 0.25, 0.5, 0.17, TINTS[3 - j])
        cell(ax, x + 1.86, 1.87 + j * 0.2, 0.5, 0.2, TINTS[3 - j])
    text(ax, x + 0.51, 2.88, "each its part", size=7.6, ha="center", color=SOFT)
    text(ax, x + 2.11, 2.88, "a whole block", size=7.6, ha="center", color=SOFT)
    arrow(ax, (x + 0.88, 2.42), (x + 1.76, 2.42), AXES["fsdp"])
    text(ax, x + 1.31, 2.56, "weights", size=7.6, color=AXES["fsdp"], ha="center")
    arrow(ax, (x + 1.76, 2.1), (x + 0.88, 2.1), AXES["fsdp"])
    text(ax, x + 1.31, 1.95, "gradients", size=7.6, color=AXES["fsdp"], ha="center")


def draw_tensor(ax, x):
    words = (
        "A chip computes some heads and some channels of the MLP. What attention and MLP give "
        "is the sum over chips: activations, several times a block, so only between "
        "neighbours."
    )
    card(ax, x, "tensor", "heads and MLP channels", words)
    for i, (tint, label) in enumerate((("#f0e3bd", "a"), ("#dcc47c", "b"))):
        y = 2.36 - i * 0.56
        text(ax, x + 0.2, y + 0.2, label, size=7.6, color=SOFT)
        cell(ax, x + 0.36, y, 0.34, 0.42, tint)
        text(ax, x + 0.53, y + 0.21, "in", size=7, ha="center")
        cell(ax, x + 0.94, y, 0.42, 0.42, tint)
        text(ax, x + 1.15, y + 0.21, "out", size=7, ha="center")
        arrow(ax, (x + 0.7, y + 0.21), (x + 0.94, y + 0.21), SOFT, width=1.0)
        arrow(ax, (x + 1.39, y + 0.21), (x + 1.72, 2.35 - i * 0.12), AXES["tensor"], width=1.4)
    circle = Circle((x + 1.98, 2.29), 0.25, facecolor="white", edgecolor=AXES["tensor"], zorder=4)
    ax.add_patch(circle)
    text(ax, x + 1.98, 2.29, "sum", size=8, ha="center", color=AXES["tensor"])
    text(ax, x + 1.98, 1.88, "activations", size=7.6, ha="center", color=AXES["tensor"])
    text(ax, x + 0.36, 2.89, "heads and channels", size=7.6, color=SOFT)


def draw_context(ax, x):
    words = (
        "For attention, from some tokens of all heads to all tokens of some heads (Ulysses). "
        "Where heads run out, keys and values go round a ring, and queries stay. Or both at "
        "once."
    )
    card(ax, x, "context", "video tokens", words)
    shades = ("#cfe3d3", "#8fbf9b")
    for i in range(4):
        for j in range(4):
            cell(ax, x + 0.36 + j * 0.15, 2.76 - i * 0.15, 0.15, 0.15, shades[i // 2])
            cell(ax, x + 1.76 + j * 0.15, 2.76 - i * 0.15, 0.15, 0.15, shades[j // 2])
    arrow(ax, (x + 1.04, 2.66), (x + 1.68, 2.66), AXES["context"], width=1.5)
    arrow(ax, (x + 1.68, 2.51), (x + 1.04, 2.51), AXES["context"], width=1.5)
    text(ax, x + 1.36, 2.81, "all-to-all", size=7.4, color=AXES["context"], ha="center")
    rotated = {"rotation": 90, "fontsize": 6.6, "color": SOFT, "ha": "center", "va": "center"}
    ax.text(x + 0.25, 2.61, "tokens", **rotated)
    text(ax, x + 0.66, 2.22, "heads", size=6.6, color=SOFT, ha="center")
    places = [x + 0.72 + 0.46 * i for i in range(4)]
    text(ax, x + 0.24, 1.93, "k, v", size=7.4, color=AXES["context"])
    for i, px in enumerate(places):
        box(ax, px - 0.15, 1.81, 0.3, 0.24, face=shades[i % 2], edge="white", radius=0.05)
        if i:
            arrow(ax, (places[i - 1] + 0.15, 1.93), (px - 0.15, 1.93), AXES["context"], width=1.2)
    arrow(ax, (places[3], 1.8), (places[0], 1.8), AXES["context"], curve=-0.13, width=1.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/mesh.png")
    args = parser.parse_args()
    plt.rcParams["font.family"] = "DejaVu Sans"
    figure, ax = plt.subplots(figsize=(WIDTH, HEIGHT), facecolor=PAPER)
    ax.set_position((0, 0, 1, 1))
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(0, HEIGHT)
    ax.axis("off")
    text(ax, 0.45, 8.15, "The mesh, and what travels on its axes", size=15, weight="bold")
    draw_mesh(ax)
    for i, draw in enumerate((draw_data, draw_fsdp, draw_tensor, draw_context)):
        draw(ax, 0.45 + i * 2.827)
    figure.savefig(args.out, dpi=150, facecolor=PAPER)


if __name__ == "__main__":
    main()
