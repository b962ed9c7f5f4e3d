"""ConIC's toy (figure 2, appendix D): eight images, features of two dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.neighbors import KernelDensity
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..data import finished_together
from ..figures import WIDTH
from ..methods import ConIC, Method
from ..parsing import NonNegativeFinite, PositiveFinite, PositiveLossWeight
from .common import MethodStudy, Row, Run, Runs, SharedViews, Study, Variant, command, differences, table

IMAGES, VIEWS = 8, 20
BANDWIDTH = 0.04  # the kernel's standard deviation; features have norm 1
WITHIN, BETWEEN = "angle within an image, °", "angle between images, °"
NEAREST = "nearest view is of the same image, %"
MEASURES = (WITHIN, BETWEEN, NEAREST)
CLASSIFICATION, CONSISTENCY = "classification loss", "consistency loss"
COLORS = colormaps["tab10"].colors  # of the images
DIRECTIONS = "directions of the views, °"  # (IMAGES, VIEWS)


class EightImages(SharedViews):
    """Views of eight training images, which the seed chooses."""

    def __init__(self, seed: int, epochs: int) -> None:
        super().__init__(seed, epochs, batch_size=IMAGES)

    def _dataset(self, train: bool, transform: Any = None) -> Dataset:
        images = super()._dataset(train, transform)
        chosen = np.random.default_rng(self.seed_of_views).choice(len(images), IMAGES, replace=False)
        return Subset(images, chosen.tolist())


@torch.no_grad()
def spread(module: Method, views: SharedViews) -> Run:
    """Where new random views of each image lie on the circle of normalised features, and how far apart."""
    drawn = views.kept.views  # two views an item; those of later epochs are new
    items = [drawn[views.epochs + draw, instance] for instance in range(IMAGES) for draw in range(VIEWS // 2)]
    both, _, _ = finished_together(items)
    images = torch.stack(both, dim=1).flatten(0, 1)
    module.encoder.eval()
    features = module.encoder(images).double()  # (IMAGES · VIEWS, 2)
    module.encoder.train()
    directions = torch.rad2deg(torch.atan2(features[:, 1], features[:, 0])).unflatten(0, (IMAGES, VIEWS))
    return angles(directions) | {DIRECTIONS: directions.round(decimals=1).tolist()}


def angles(directions: Tensor) -> Run:
    """Mean angles between the directions (images, views) of one image and of two, in degrees, and how often a
    view's nearest is of its own image."""
    images, views = directions.shape
    flat = directions.flatten()
    apart = ((flat[:, None] - flat + 180) % 360 - 180).abs()  # up to 180°
    image = torch.arange(images).repeat_interleave(views)
    same, itself = image[:, None] == image, torch.eye(len(image), dtype=torch.bool)
    nearest = apart.masked_fill(itself, torch.inf).argmin(dim=1)
    return {
        WITHIN: float(apart[same & ~itself].mean()),
        BETWEEN: float(apart[~same].mean()),
        NEAREST: 100 * float((image[nearest] == image).double().mean()),
    }


def losses(epochs: list[Run]) -> Run:
    return {
        CLASSIFICATION: epochs[-1]["classification_loss"],
        CONSISTENCY: epochs[-1]["consistency_loss"],
    }


def density(directions: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """The density of points on the unit circle at each point of a grid, by a Gaussian kernel.

    Args:
        directions: (n,) of the points, in degrees.
        axis: (G,) coordinates of the grid.

    Returns:
        (G, G), with y along the rows.
    """
    angle = np.deg2rad(directions)
    kernel = KernelDensity(bandwidth=BANDWIDTH).fit(np.stack([np.cos(angle), np.sin(angle)], axis=1))
    x, y = np.meshgrid(axis, axis)
    return np.exp(kernel.score_samples(np.stack([x.ravel(), y.ravel()], axis=1))).reshape(x.shape)


def picture(directions: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Densities (G, G, 3) of each image's views (IMAGES, VIEWS) on white, as opaque as they are high."""
    drawn = np.ones((len(axis), len(axis), 3))
    for views, color in zip(directions, COLORS, strict=False):
        values = density(views, axis)
        opacity = (values / values.max())[..., None]
        drawn = drawn * (1 - opacity) + np.array(color) * opacity
    return drawn


@command("toy")
def study(
    epochs: PositiveInt = 200,
    seeds: PositiveInt = 20,
    learning_rate: PositiveFinite = 1e-4,
    weight_decay: NonNegativeFinite = 1e-6,
    consistency_weight: PositiveLossWeight = 0.1,
    larger_weight: PositiveLossWeight = 2.5,
) -> Study:
    """ConIC on eight images with features of two dimensions, with and without consistency.

    Leaves toy.png and toy.json. The picture shows the density of 20 random views of each image after the
    training, by a Gaussian kernel of standard deviation 0.04.

    Args:
        epochs: of each training, one step each.
        seeds: how many choices of eight images, and trainings of each variant.
        learning_rate: at the start of the cosine.
        weight_decay: of SGD.
        consistency_weight: α, the paper's for its toy.
        larger_weight: another α, the paper's for everything else.
    """
    settings = {"learning_rate": learning_rate, "weight_decay": weight_decay, "dim": 2}
    return MethodStudy(
        variants={
            f"α = {weight:g}": Variant(ConIC, {**settings, "consistency_weight": weight}, batch_size=IMAGES)
            for weight in (0.0, consistency_weight, larger_weight)
        },
        title=f"Where {VIEWS} views of each of eight images lie on the circle: densities",
        tables=tables,
        draw=draw,
        views=EightImages,
        measure=spread,
        after=losses,
    )


def tables(runs: Runs) -> dict[str, list[Row]]:
    _, none, *others = runs  # the first are untrained
    columns = (*MEASURES, CLASSIFICATION, CONSISTENCY)
    return {
        "Angles between views, and the last step's losses": table(runs, columns),
        "Paired differences": differences(runs, [(name, none) for name in others], columns),
    }


def draw(runs: Runs) -> Figure:
    """A row a variant, a picture a seed of the first four."""
    _, *variants = runs
    seeds = min(len(runs[variants[0]]), 4)
    axis = np.linspace(-1.2, 1.2, 241)
    figure = Figure(figsize=(WIDTH, 1 + WIDTH / seeds * len(variants)), layout="constrained")
    panels = figure.subplots(len(variants), seeds, squeeze=False, sharex=True, sharey=True)
    for row, name in zip(panels, variants, strict=True):
        row[0].set_ylabel(name)
        for seed, axes in enumerate(row):
            directions = np.array(runs[name][seed][DIRECTIONS])
            axes.imshow(picture(directions, axis), origin="lower", extent=(-1.2, 1.2, -1.2, 1.2))
            axes.set(xticks=(), yticks=())
    for seed, axes in enumerate(panels[0]):
        axes.set_title(f"seed {seed}", fontsize=10)
    for image, color in zip(range(IMAGES), COLORS, strict=False):
        axes.plot([], [], "o", color=color, label=f"image {image + 1}")
    return figure
