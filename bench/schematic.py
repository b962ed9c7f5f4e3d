"""Draws what a fused loss does, alone and over ranks, to docs/figures: `python -m bench.schematic`."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from bench.files import README

FIGURES = README.with_name("docs") / "figures"
INPUT, MATRIX, FUSED, RESULT = "#dbe4ee", "#f3c6c6", "#cfe8d5", "#fbe3b5"


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, **style: object
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="0.25", linewidth=1, **style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="0.25"))


def eager(axes: Axes) -> None:
    """A B × K matrix in memory for every step of the formula."""
    axes.set_title("eager PyTorch: a B × K matrix in memory for every step", loc="left", fontsize=11)
    box(axes, 0, 2.35, 1.1, 0.5, "query\nB × D", INPUT)
    box(axes, 0, 1.55, 1.1, 0.5, "key\nB × D", INPUT)
    box(axes, 0, 0.2, 1.1, 1.1, "queue\nK × D", INPUT)
    names = ("similarities\nof queries", "similarities\nof keys", "log-softmax\nat τ", "log-softmax Q\nat τc",
             "log-softmax P\nat τc", "KL(P‖Q)\nKL(Q‖P)")  # fmt: skip
    for place, name in enumerate(names):
        box(axes, 1.75 + 1.45 * place, 0.7, 1.25, 1.7, f"{name}\n\nB × K", MATRIX)
        arrow(axes, (1.75 + 1.45 * place - (0.6 if place == 0 else 0.2), 1.55), (1.75 + 1.45 * place, 1.55))
    arrow(axes, (10.25, 1.55), (10.6, 1.55))
    box(axes, 10.6, 1.25, 1.3, 0.6, "loss", RESULT)
    axes.text(6.0, 0.25, "… and as many again in backward", ha="center", fontsize=9, style="italic")


def fused(axes: Axes) -> None:
    """A tile of the queue at a time, and a few numbers a row."""
    axes.set_title("contrastive_ops: one operator, a tile of the queue at a time", loc="left", fontsize=11)
    box(axes, 0, 2.35, 1.1, 0.5, "query\nB × D", INPUT)
    box(axes, 0, 1.55, 1.1, 0.5, "key\nB × D", INPUT)
    for tile in range(4):
        box(
            axes, 0, 0.2 + 0.275 * tile, 1.1, 0.275, "queue, K × D" if tile == 1 else "", INPUT, linestyle=":"
        )
    axes.add_patch(Rectangle((1.75, 0.1), 8.5, 2.85, facecolor=FUSED, edgecolor="0.25", linewidth=1))
    axes.text(
        1.9,
        2.72,
        "in registers and cache, never in memory",
        ha="left",
        va="center",
        fontsize=9,
        style="italic",
    )
    arrow(axes, (1.1, 2.6), (1.95, 1.9))
    arrow(axes, (1.1, 1.8), (1.95, 1.55))
    arrow(axes, (1.1, 0.6), (1.95, 1.2))
    box(axes, 1.95, 0.85, 1.9, 1.4, "normalise,\nsimilarities of a tile\ns = q̂·n, y = k̂·n", "white")
    arrow(axes, (3.85, 1.55), (4.15, 1.55))
    box(
        axes,
        4.15,
        0.85,
        2.3,
        1.4,
        "a few numbers a row:\nmaxima, three sums of\nexponentials, E_Q[d], E_P[d],\nrank of the positive",
        "white",
    )
    arrow(axes, (6.45, 1.55), (6.75, 1.55))
    box(axes, 6.75, 0.85, 1.45, 1.4, "merged\nin a fixed order\nto losses", "white")
    arrow(axes, (8.2, 1.55), (8.5, 1.55))
    box(axes, 8.5, 0.85, 1.65, 1.4, "gradients\nof a tile's similarities,\nΣ g_j n_j", "white")
    axes.text(4.2, 0.45, "first pass over the tiles", ha="center", fontsize=9)
    axes.text(9.3, 0.45, "second pass", ha="center", fontsize=9)
    arrow(axes, (10.25, 2.2), (10.6, 2.3))
    arrow(axes, (10.25, 1.55), (10.6, 1.55))
    arrow(axes, (10.25, 0.9), (10.6, 0.8))
    box(axes, 10.6, 2.0, 1.3, 0.6, "loss, B", RESULT)
    box(axes, 10.6, 1.25, 1.3, 0.6, "rank, B", RESULT)
    box(axes, 10.6, 0.5, 1.3, 0.6, "gradient\nB × D", RESULT)


EXCHANGE = "#d9c9e8"


def over_ranks(axes: Axes, title: str, steps: Sequence[tuple[str, str]]) -> None:
    """Two ranks, one above the other: what each does, and between it what they exchange."""
    axes.set_title(title, loc="left", fontsize=11)
    lanes = (("rank 0", 1.6), ("rank 1", 0.1))
    x = 0.6
    for place, (color, text) in enumerate(steps):
        width = 0.55 if color == EXCHANGE else 1.55
        if color == EXCHANGE:
            axes.add_patch(Rectangle((x, 0.1), width, 2.7, facecolor=color, edgecolor="0.25", linewidth=1))
            axes.text(x + width / 2, 1.45, text, ha="center", va="center", fontsize=9, rotation=90)
        for name, y in lanes:
            if place == 0:
                axes.text(0.25, y + 0.6, name, ha="center", va="center", fontsize=10, rotation=90)
            if color != EXCHANGE:
                box(axes, x, y, width, 1.2, text, color)
            if place:
                arrow(axes, (x - 0.18, y + 0.6), (x, y + 0.6))
        x += width + 0.18


def shards(axes: Axes) -> None:
    """A queue or a weight in shards."""
    over_ranks(axes, "co2_loss, conic_loss: keys in shards, each rank meets the rows of all with its own", (
        (INPUT, "its rows, b × D\nits keys, K/P × D"),
        (EXCHANGE, "rows, to all"),
        (FUSED, "statistics of all\nrows over its keys"),
        (EXCHANGE, "8 or 3 numbers a row,\nto its owner"),
        (RESULT, "merge of its rows:\nloss, rank,\ncoefficients"),
        (EXCHANGE, "coefficients, to all"),
        (FUSED, "gradients of all\nrows (and of its\nrows of the weight)"),
        (EXCHANGE, "gradients of rows,\nto their owners"),
        (RESULT, "gradient of\nits rows"),
    ))  # fmt: skip


def pairs(axes: Axes) -> None:
    """Rows that are each other's keys."""
    over_ranks(axes, "nt_xent_loss: rows are each other's keys, each rank meets its own with those of all", (
        (INPUT, "its views, 2 b × D"),
        (EXCHANGE, "views, to all"),
        (FUSED, "statistics of its\nrows: over its own\nwhile others arrive,\nthen over these"),
        (RESULT, "merge:\nloss, rank,\ncoefficients"),
        (EXCHANGE, "views, 6 numbers\na row, to all"),
        (FUSED, "gradient of its rows,\nas queries and\nas keys of others"),
        (RESULT, "gradient of\nits views"),
    ))  # fmt: skip


PICTURES = {"fused.png": (eager, fused), "ranks.png": (shards, pairs)}


def main() -> None:
    for name, drawings in PICTURES.items():
        figure = Figure(figsize=(11, 6), layout="constrained")
        for axes, draw in zip(figure.subplots(2, 1), drawings, strict=True):
            draw(axes)
            axes.set(xlim=(-0.1, 12), ylim=(0, 3.05))
            axes.axis("off")
        figure.savefig(FIGURES / name, dpi=130)
        print(f"Wrote {FIGURES / name}")


if __name__ == "__main__":
    main()
