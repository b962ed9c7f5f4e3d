"""One picture of a run: its curves, and what test images are near to before and after the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch.utils.data import Dataset, Subset

from .colours import denormalized
from .evaluation import Features, Score, nearest
from .figures import save

QUERIES, NEIGHBOURS = 6, 5
CANDIDATES = 1000  # test images that are chosen from
PIXELS = 96  # of a thumbnail's side, at most

# Okabe and Ito's colours, which the colour-blind can tell apart. A value has the same in every run.
STYLES = {
    "loss": {"color": "#222222"},
    "instance_loss": {"color": "#0072B2", "linestyle": "--"},
    "classification_loss": {"color": "#0072B2", "linestyle": "--"},
    "consistency_loss": {"color": "#E69F00", "linestyle": "-."},
    "top1": {"color": "#0072B2"},
    "top5": {"color": "#56B4E9", "linestyle": "--"},
    "knn_accuracy": {"color": "#009E73", "marker": "o", "markersize": 3},
    "probe_accuracy": {"color": "#CC79A7", "marker": "o", "markersize": 3},
    "probe_top1": {"color": "#CC79A7", "linestyle": ":"},
}
# Of labels, what is known while training goes on, as the legend has it.
ONLINE = {
    "knn_accuracy": "nearest neighbours",
    "probe_accuracy": "linear probe",
    "probe_top1": "linear probe, on the views",
}
SAME, OTHER, UNKNOWN = "#009E73", "#D55E00", "#999999"


class Row(NamedTuple):
    """A test image, and the training images nearest to it by the features of each network.

    Attributes:
        label: of the test image; nothing where there are no labels.
        image: (H, W, 3) from 0 to 1.
        neighbours: of each network, nearest first, images and whether their label is the test image's; None
            where there are no labels.
    """

    label: str
    image: np.ndarray
    neighbours: dict[str, list[tuple[np.ndarray, bool | None]]]


class Gallery(NamedTuple):
    """What the picture shows of the features.

    Attributes:
        titles: of each network, lines of what it is worth.
        rows: test images.
        caption: how they were chosen.
    """

    titles: dict[str, list[str]]
    rows: list[Row]
    caption: str


def gallery(
    images: tuple[Dataset, Dataset],
    features: Mapping[str, tuple[Features, Features]],
    measures: Sequence[Mapping[str, Any]],
) -> Gallery:
    """Test images and their nearest training images, by every network.

    Args:
        images: training and test images, items (image, label), as the evaluation has them.
        features: of each network, the untrained first and the trained last, of these images.
        measures: rows of `evaluate`; the first two are told. Without any, labels are not looked at.
    """
    train, test = images
    labels, truth = (part.labels for part in next(iter(features.values())))
    candidates = np.random.default_rng(0).permutation(len(test))[:CANDIDATES]
    near = {
        name: nearest(known, Features(asked.features[candidates], truth[candidates]), NEIGHBOURS)
        for name, (known, asked) in features.items()
    }  # (candidates, NEIGHBOURS) each
    same = {name: labels[indices] == truth[candidates, None] for name, indices in near.items()}
    before, *_, after = same.values() if measures else near.values()
    # With labels, more or fewer of the neighbours share the image's; without, they are others.
    changed = before.sum(1) != after.sum(1)
    if not measures:
        changed = (before.sort(1).values != after.sort(1).values).any(1)
    chosen = choose(changed.numpy(), truth[candidates].numpy())

    def shown(dataset: Dataset, index: int) -> np.ndarray:
        return thumbnail(dataset[int(index)][0])

    rows = [
        Row(
            class_name(test, int(truth[candidates[i]])) if measures else "",
            shown(test, candidates[i]),
            {
                name: [
                    (shown(train, index), bool(is_same) if measures else None)
                    for index, is_same in zip(near[name][i], same[name][i], strict=True)
                ]
                for name in near
            },
        )
        for i in chosen
    ]
    titles = {name: [f"{Score(**row[name])} %: {row['measure']}" for row in measures[:2]] for name in near}
    caption = f"{len(rows)} of {len(test):,} test images, drawn at random"
    if count := min(int(changed.sum()), QUERIES // 2):
        what = "how many neighbours have its label" if measures else "a neighbour"
        caption += f", {count} of them from those where the training changed {what}"
    return Gallery(titles, rows, caption)


def choose(changed: np.ndarray, labels: np.ndarray, count: int = QUERIES) -> list[int]:
    """Places of images to show, from images in random order: half of those that have changed, then any; and
    of every label at most one, as long as there are others. Sorted by label.

    Args:
        changed: (M,) booleans.
        labels: (M,).
    """
    chosen: list[int] = []

    def take(places: np.ndarray, until: int) -> None:
        for unseen_labels_only in (True, False):
            for place in places:
                seen = labels[place] in labels[chosen]
                if len(chosen) < until and place not in chosen and not (unseen_labels_only and seen):
                    chosen.append(int(place))

    take(np.flatnonzero(changed), count // 2)
    take(np.arange(len(labels)), count)
    return sorted(chosen, key=lambda place: (labels[place], place))


def class_name(images: Dataset, label: int) -> str:
    """A label as its dataset calls it, or its number; cut where it is long."""
    while isinstance(images, Subset):
        images = images.dataset
    names = getattr(images, "classes", None)
    name = names[label].replace("_", " ") if names else str(label)
    return name if len(name) <= 12 else name[:11].rstrip() + "…"


def thumbnail(image: torch.Tensor) -> np.ndarray:
    """A normalised image (3, H, W) as it can be drawn: (H, W, 3) from 0 to 1, no larger than `PIXELS`."""
    image = denormalized(image)
    scale = PIXELS / max(image.shape[1:])
    if scale < 1:
        image = F.interpolate(image[None], scale_factor=scale, mode="bilinear", antialias=True)[0]
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def overview(epochs: Sequence[Mapping[str, float]], shown: Gallery | None, path: Path) -> None:
    """Draw curves and, beside them, a gallery if there is one.

    Args:
        epochs: the mean values of each epoch, and its number under "epoch".
        shown: beside the curves.
        path: of the file.
    """
    online = any(name in epoch for epoch in epochs for name in ONLINE)
    panels = 3 if online else 2
    if shown is None:
        figure = Figure(figsize=(5 * panels, 4), layout="constrained")
        curves(figure.subplots(1, panels), epochs)
    else:
        figure = Figure(figsize=(15, 7), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 2.2))
        curves(left.subplots(panels, 1), epochs)
        draw_gallery(right.subplots(), shown)
    save(figure, path, dpi=110)


def curves(panels: Sequence[Axes], epochs: Sequence[Mapping[str, float]]) -> None:
    """Losses in the first panel, contrast accuracy in the second; in a third, where there is one, accuracy on
    labels."""
    losses, *accuracies = panels
    names = dict.fromkeys(name for epoch in epochs for name in epoch)
    marker = {"marker": "o"} if len(epochs) == 1 else {}
    drawn = (
        [name for name in names if name.endswith("loss") and name != "probe_loss"],
        [name for name in names if name.startswith("top")],
        [name for name in names if name in ONLINE],
    )
    for axes, chosen in zip(panels, drawn, strict=False):
        for name in sorted(chosen, key=[*STYLES, *sorted(names)].index):
            label = ONLINE.get(name, name.replace("_", " ").replace("top", "top "))
            unit = 100 if "top" in name else 1
            known = [epoch for epoch in epochs if name in epoch]  # not after every epoch, perhaps
            values = [unit * epoch[name] for epoch in known]
            axes.plot(
                [epoch["epoch"] for epoch in known], values, label=label, **STYLES.get(name, {}) | marker
            )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if chosen:
            axes.legend(frameon=False)
    losses.set_title("loss and its terms", loc="left")
    losses.set_ylim(bottom=0)
    titles = ("contrast accuracy, %", "accuracy on labels, %")
    for axes, title in zip(accuracies, titles, strict=False):
        axes.set_title(title, loc="left")
        axes.set_ylim(0, 100)


def draw_gallery(axes: Axes, shown: Gallery) -> None:
    """A row a test image, a block of columns a network; frames and marks tell whether labels are the same."""
    pitch, gap = 1.14, 0.55  # from image to image, and between blocks
    axes.set_axis_off()

    def place(image: np.ndarray, x: float, y: float) -> None:
        # A digit of eight pixels is easier to recognise without their edges.
        axes.imshow(image, extent=(x, x + 1, y, y + 1), interpolation="bicubic" if len(image) <= 32 else None)

    for number, row in enumerate(shown.rows):
        y = -pitch * number
        place(row.image, 0, y)
        turned = 0 if len(row.label) < 3 else 90
        axes.text(-0.1, y + 0.5, row.label, fontsize=9, ha="right", va="center", rotation=turned)
        x = 1 + gap
        for name, neighbours in row.neighbours.items():
            if number == 0:
                told = shown.titles[name]
                axes.text(x, 1.15, "\n".join(told), fontsize=9, va="bottom", linespacing=1.5)
                axes.text(x, 1.25 + 0.27 * len(told), f"{name} network", fontsize=11, weight="bold")
            for image, same in neighbours:
                place(image, x, y)
                color = {True: SAME, False: OTHER, None: UNKNOWN}[same]
                axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=color, linewidth=3))
                if same is not None:
                    mark = {"boxstyle": "circle,pad=0.15", "facecolor": color, "edgecolor": "white"}
                    axes.text(
                        x + 0.94, y + 0.06, "✓" if same else "✗", color="white", fontsize=8, weight="bold",
                        ha="center", va="center", bbox=mark,
                    )  # fmt: skip
                x += pitch
            x += gap - (pitch - 1)
    axes.text(0, 1.15, "test\nimage", fontsize=9, va="bottom", linespacing=1.5)
    labelled = any(
        same is not None for row in shown.rows for near in row.neighbours.values() for _, same in near
    )
    legend = "✓ green: the test image's label; ✗ orange: another.  " if labelled else ""
    bottom = -pitch * (len(shown.rows) - 1) - 0.15
    most = max((len(near) for row in shown.rows for near in row.neighbours.values()), default=0)
    axes.text(0, bottom, f"The {most} nearest training images.  {legend}\n{shown.caption}.",
              fontsize=9, va="top", color="0.3", linespacing=1.5)  # fmt: skip
    axes.set(xlim=(-0.4, x), ylim=(bottom - 0.6, 2.2))
    axes.set_aspect("equal")
