"""Draws the layers of the package, from what its modules import: `python -m bench.layers`.

A module may import from its own layer and from those below. One that imports anything above is an error here,
and in tests/test_layers.py.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from bench.files import README
from contrastive_ops._backends import BACKENDS

ROOT = README.parent
PICTURE = ROOT / "docs" / "figures" / "layers.png"
COLORS = ("#f3dfe3", "#dbe4ee", "#dbe4ee", "#dbe4ee", "#fbe3b5", "#fbe3b5", "#cfe8d5", "#cfe8d5", "#eeeeee")


@dataclass(frozen=True)
class Layer:
    """Modules of the package, without its name and their folders' files, and what they do."""

    task: str
    modules: tuple[str, ...]


# From top to bottom: a call goes this way.
LAYERS = (
    Layer("other projects' names\nand signatures", ("adapters",)),
    Layer("what holds state", ("modules", "queue", "classifier")),
    Layer("a loss: check the arguments,\ncall one operator, reduce", ("functional",)),
    Layer("what ranks exchange,\naround the steps of a loss", ("distributed",)),
    Layer("operators: schemas, checks,\nfake kernels, autograd", ("_ops", "_checks")),
    Layer("which implementation serves", ("_backends",)),
    Layer(
        "implementations:\nstatistics, merge, gradient", ("reference", "_cpu", "kernels", "cuda", "compile")
    ),
    Layer("kernels of GPUs:\nplanned, launched, replayed", ("gpu",)),
    Layer(
        "what all of them share",
        ("_contract", "_calls", "_ranks", "_store", "_installation", "_eager", "_state"),
    ),
)
LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer.modules}


def sources() -> Iterator[tuple[str, Path]]:
    """Each module's name within the package, such as "classifier.disk", and its file."""
    for folder, prefix in ((ROOT / "contrastive_ops", ()), (ROOT / "kernels", ("kernels",))):
        for file in sorted(folder.rglob("*.py")):
            parts = (*prefix, *file.relative_to(folder).with_suffix("").parts)
            if parts != ("__init__",):
                yield ".".join(part for part in parts if part != "__init__"), file


def imported(module: str, file: Path) -> Iterator[str]:
    """The modules of the package that one of them imports, in functions too, or names to be loaded."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join([*start, name]) for name in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("contrastive_ops."):
            yield str(node.module).removeprefix("contrastive_ops.")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("contrastive_ops."):
                    yield alias.name.removeprefix("contrastive_ops.")


def imports() -> Counter[tuple[str, str]]:
    """How often the modules of the package import each other, each named by its first part."""
    found = (
        (module.split(".")[0], other.split(".")[0])
        for module, file in sources()
        for other in imported(module, file)
    )
    return Counter(pair for pair in found if pair[0] != pair[1])


def upward() -> list[tuple[str, str]]:
    """Imports of something above; none is allowed."""
    return [(one, other) for one, other in imports() if LAYER_OF[other] < LAYER_OF[one]]


def unplaced() -> set[str]:
    """Modules that stand in no layer."""
    return {module.split(".")[0] for module, _ in sources()} - LAYER_OF.keys()


def draw(axes: Axes) -> None:
    """A row of boxes for each layer, and an arrow for each two modules of which one imports the other.

    All may use the last layer: arrows to it would hide the rest. The choice of a backend loads by name.
    """
    places = {}
    for number, layer in enumerate(LAYERS):
        y = len(LAYERS) - number
        axes.text(0, y, layer.task, fontsize=10, style="italic", va="center")
        for column, module in enumerate(layer.modules):
            x = 3.2 + 1.6 * column
            axes.add_patch(
                Rectangle((x, y - 0.22), 1.4, 0.44, facecolor=COLORS[number], edgecolor="0.25", zorder=2)
            )
            axes.text(x + 0.7, y, module, ha="center", va="center", fontsize=10, zorder=3)
            places[module] = x + 0.7, y
    loaded = {("_backends", path.removeprefix("contrastive_ops.")) for path in BACKENDS.values()}
    for one, other in imports().keys() | loaded:
        (x, y), (to_x, to_y) = places[one], places[other]
        if to_y < y and to_y > 1:
            arrow = {"arrowstyle": "-|>", "mutation_scale": 11, "color": "0.35", "zorder": 1}
            axes.add_patch(FancyArrowPatch((x, y - 0.22), (to_x, to_y + 0.22), shrinkA=0, shrinkB=0, **arrow))
    columns = max(len(layer.modules) for layer in LAYERS)
    axes.set(xlim=(-0.1, 3.2 + 1.6 * columns), ylim=(0.6, len(LAYERS) + 0.4))
    axes.axis("off")


def main() -> None:
    for one, other in upward():
        raise SystemExit(f"{one} imports {other}, which is above it")
    figure = Figure(figsize=(11, 6), layout="constrained")
    draw(figure.subplots())
    figure.savefig(PICTURE, dpi=120)
    print(f"Wrote {PICTURE}")


if __name__ == "__main__":
    main()
