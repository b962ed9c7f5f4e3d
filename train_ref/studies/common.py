"""What the studies share: how they are described and run, what trainings are worth, tables and files.

A study's JSON holds its settings, the values of every training, and the rows of its tables. A value's name
tells its unit: it ends in "%", in "°", or is a loss in nats.
"""

from __future__ import annotations

import inspect
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import ttest_rel
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import DrawnViews, Views, finished_together
from ..errors import UsageError
from ..evaluation import Score, extract_features, format_table, knn_accuracy, probe_score
from ..figures import WIDTH, one_legend, save
from ..files import writable, write_text
from ..methods import Method

UNTRAINED = "untrained"
KNN, PROBE_1, PROBE_10 = "20 nearest neighbours, %", "probe of 1 % of the labels, %", "probe of 10 %, %"
MEASURES = (KNN, PROBE_1, PROBE_10)
LIMIT = 2**30  # bytes of views that are kept

Run = dict[str, Any]  # what a training came to: values by name, and its curves
Runs = dict[str, list[Run]]  # of each variant, a training a seed
Row = dict[str, Any]  # of a table: names, and cells {"mean", "std"} or {"mean", "std", "p"}
AtEnd = Callable[[Method, "SharedViews"], Run]


# Views


class Kept(Dataset):
    """Batches of views that are drawn when they are first asked for, and kept for the next training of the
    seed: an item is a list of (epoch, index), as `Order` gives them."""

    def __init__(self, views: DrawnViews, epochs: int, size: int) -> None:
        self.views = views
        count = len(views.images)
        self.drawn = np.zeros((epochs, count), dtype=bool)
        self.kept = torch.empty(epochs, count, 2, 3, size, size)
        self.labels = torch.empty(count, dtype=torch.int64)

    def __getitem__(self, batch: list[tuple[int, int]]) -> tuple[list[Tensor], Tensor, Tensor]:
        if missing := [item for item in batch if not self.drawn[item]]:
            views, labels, _ = finished_together([self.views[item] for item in missing])
            for item, of_item, label in zip(missing, zip(*views, strict=True), labels, strict=True):
                self.kept[item] = torch.stack(of_item)
                self.labels[item[1]] = label
                self.drawn[item] = True
        epochs, instances = torch.tensor(batch).T  # (B,) each
        views = self.kept[epochs, instances].transpose(0, 1)  # (2, B, 3, H, W)
        return list(views.contiguous()), self.labels[instances], instances


class SharedViews(Views):
    """The views of one seed, for all its trainings: to draw them takes longer than a small network's steps.

    They are functions of (seed, epoch, instance), their order of (seed, epoch); batches of any size have the
    same ones, so ``hparams.batch_size`` may change between trainings.

    Args:
        seed: of the views and their order.
        epochs: of the longest training.
        **views: arguments of `Views`.

    Raises:
        UsageError: the views of all epochs would take more than 1 GiB.
    """

    def __init__(self, seed: int, epochs: int, **views: Any) -> None:
        super().__init__(**views)
        self.seed_of_views, self.epochs = seed, epochs
        self.setup()
        needed = 2 * epochs * self.num_instances * 4 * 3 * self.hparams.image_size**2
        if needed > LIMIT:
            raise UsageError(
                f"epochs is {epochs}, whose views would take {needed / LIMIT:.1f} GiB; 1 GiB is kept at most"
            )

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)  # which takes the seed of torch's generator
        self.seed = self.seed_of_views

    @cached_property
    def kept(self) -> Kept:
        return Kept(self.drawn_views(), self.epochs, self.hparams.image_size)

    def train_dataloader(self) -> DataLoader:
        # As its sampler, and not its batch sampler, Lightning tells the order each epoch.
        return DataLoader(
            self.kept, sampler=super().train_dataloader().batch_sampler, batch_size=None, **self._loading()
        )

    @cached_property
    def fixed(self) -> Tensor:
        """A view (N, 3, H, W) of every training image, none of those that are trained on."""
        items = [self.kept.views[self.epochs, i] for i in range(self.num_instances)]
        (views, _), _, _ = finished_together(items)
        return views

    @cached_property
    def plain(self) -> list[list[Any]]:
        """Batches of the training images, and of the test images, without augmentation."""
        return [list(loader) for loader in self.evaluation_dataloaders()]


# Trainings


class Variant(NamedTuple):
    """One of the trainings that a study compares.

    Attributes:
        method: what is trained.
        settings: its arguments.
        batch_size: images a step.
    """

    method: type[Method]
    settings: dict[str, Any]
    batch_size: int = 64

    def module(self, seed: int) -> Method:
        """The untrained method. Of one seed, all of one architecture begin with the same backbone."""
        seed_everything(seed, verbose=False)
        return self.method(**{"arch": "convnet", "seed": seed, **self.settings})


class EpochMeans(Callback):
    """The mean of every value of a step, over each epoch, and what there is to say at its end."""

    def __init__(self, at_end: AtEnd | None) -> None:
        self.at_end = at_end
        self.epochs: list[Run] = []

    def on_train_epoch_start(self, trainer: Trainer, module: Method) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Method, *_: Any) -> None:
        self.steps.append(module.values)

    def on_train_epoch_end(self, trainer: Trainer, module: Method) -> None:
        means = {
            name: float(torch.stack([step[name] for step in self.steps]).mean()) for name in module.values
        }
        self.epochs.append(means | (self.at_end(module, trainer.datamodule) if self.at_end else {}))


def train(
    module: Method, views: SharedViews, epochs: int, quick: bool = False, at_end: AtEnd | None = None
) -> list[Run]:
    """Train on the CPU; returns the values of each epoch. `quick` ends an epoch after two steps."""
    means = EpochMeans(at_end)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        limit_train_batches=2 if quick else None,
        callbacks=[means],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")  # nor needs them
        trainer.fit(module, views)
    if not np.isfinite(means.epochs[-1]["loss"]):
        raise UsageError("the training diverged: its loss is no longer finite; lower the learning rate")
    return means.epochs


def worth(module: Method, views: SharedViews) -> Run:
    """The measures of frozen features, of the 360 test images; probes are means over twenty draws of the
    labels, the same for every network."""
    train, test = (extract_features(module.backbone, batches, "cpu") for batches in views.plain)
    return {
        KNN: knn_accuracy(train, test, k=20),  # of 144 images a class
        PROBE_1: probe_score(train, test, 0.01, seeds=20).mean,
        PROBE_10: probe_score(train, test, 0.1, seeds=20).mean,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Networks and probes as small as these are slower with more, and differ with their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Study(ABC):
    """What is trained to answer a question, and how that is told.

    Attributes:
        title: heads the figure.
        tables: from all trainings, rows by the table's title.
        draw: the figure, from all trainings.
    """

    title: str
    tables: Callable[[Runs], dict[str, list[Row]]]
    draw: Callable[[Runs], Figure]

    @abstractmethod
    def of_seed(self, seed: int, epochs: int, quick: bool) -> Iterator[tuple[str, Run]]:
        """Train every variant with a seed: their names, and what they came to.

        Args:
            seed: of all that is random.
            epochs: of each training.
            quick: two steps an epoch.
        """

    @one_thread()
    def train(self, epochs: int, seeds: int, quick: bool) -> Runs:
        """`of_seed` of so many seeds, which are 0, 1, …: the values of all trainings."""
        runs: Runs = {}
        for seed in range(seeds):
            for name, run in self.of_seed(seed, epochs, quick):
                runs.setdefault(name, []).append(run)
                said = (f"{text(key, value)} {key}" for key, value in run.items() if isinstance(value, float))
                print(f"seed {seed}, {name}: {', '.join(said)}", flush=True)
        return runs


@dataclass(frozen=True)
class MethodStudy(Study):
    """Methods, or settings of them, side by side. All of a seed see the same views in the same order.

    Attributes:
        variants: what is compared, by name.
        views: of a seed, and so many epochs.
        measure: what a network is worth, untrained and trained.
        at_end: values of an epoch, beside the means of its steps.
        after: what a training came to beside its network, from the values of its epochs.
    """

    variants: Mapping[str, Variant]
    views: Callable[[int, int], SharedViews] = SharedViews
    measure: AtEnd = worth
    at_end: AtEnd | None = None
    after: Callable[[list[Run]], Run] | None = None

    def of_seed(self, seed: int, epochs: int, quick: bool) -> Iterator[tuple[str, Run]]:
        shared = self.views(seed, epochs)
        for number, (name, variant) in enumerate(self.variants.items()):
            shared.hparams.batch_size = variant.batch_size
            module = variant.module(seed)
            if number == 0:
                yield UNTRAINED, self.measure(module, shared)
            means = train(module, shared, epochs, quick, self.at_end)
            yield name, self.measure(module, shared) | (self.after(means) if self.after else {})


QUICK = {"epochs": 2, "seeds": 2}


@dataclass(frozen=True)
class Runner:
    """Runs the study that a function describes by its settings, `epochs` and `seeds` among them.

    Attributes:
        name: of the study, and of the files that it leaves.
        describe: the function. Its docstring tells of the study.
    """

    name: str
    describe: Callable[..., Study]

    def __call__(
        self, quick: bool = False, directory: str = "runs/studies", **settings: Any
    ) -> dict[str, Any]:
        """Leave ``<name>.json`` and ``<name>.png``, and print the tables.

        Args:
            quick: two seeds of two short epochs, to see that it works.
            directory: where the figure and its numbers go.
            **settings: of the study, in place of its defaults.

        Returns:
            What the JSON holds.
        """
        path = result_file(self.name, directory)
        given = inspect.signature(self.describe).bind(**settings | (QUICK if quick else {}))
        given.apply_defaults()
        study = self.describe(**given.arguments)
        runs = study.train(given.arguments["epochs"], given.arguments["seeds"], quick)
        result = {
            "study": self.name,
            "settings": given.arguments,
            "torch": torch.__version__,
            "tables": study.tables(runs),
            "runs": runs,
        }
        keep(result, self.figure(result), path)
        return result

    def figure(self, result: Mapping[str, Any]) -> Figure:
        """The study's figure, from what its JSON holds."""
        study = self.describe(**result["settings"])
        figure = study.draw(result["runs"])
        figure.suptitle(study.title)
        one_legend(figure)
        return figure


def command(name: str) -> Callable[[Callable[..., Study]], Runner]:
    """Decorates the function that describes the study of that name."""
    return partial(Runner, name)


# Tables


def score(values: Sequence[float]) -> Row:
    """A table's cell: mean and deviation over seeds; of one seed there is no deviation."""
    return Score.of(values)._asdict()


def table(runs: Runs, columns: Sequence[str]) -> list[Row]:
    """A row a variant: mean and deviation of each value over the seeds."""
    return [
        {
            "variant": name,
            **{
                column: score([run[column] for run in runs[name]]) if column in runs[name][0] else None
                for column in columns
            },
        }
        for name in runs
    ]


def differences(runs: Runs, pairs: Iterable[tuple[str, str]], columns: Sequence[str]) -> list[Row]:
    """A row a pair of variants: mean and deviation of their difference, seed by seed, and the probability p
    of one as large if there were none (Student's paired test, two-sided, each cell for itself)."""
    rows = []
    for one, other in pairs:
        row: Row = {"difference": f"{one} against {other}"}
        for column in columns:
            here, there = ([run[column] for run in runs[name]] for name in (one, other))
            p = ttest_rel(here, there).pvalue if len(here) > 1 else float("nan")
            row[column] = score(np.subtract(here, there)) | {"p": float(p) if np.isfinite(p) else None}
        rows.append(row)
    return rows


def accuracy(pairs: Iterable[tuple[str, str]]) -> Callable[[Runs], dict[str, list[Row]]]:
    """A study's tables of what features are worth, and of how far each pair of variants is apart in it."""
    return lambda runs: {
        "Accuracy": table(runs, MEASURES),
        "Paired differences": differences(runs, pairs, MEASURES),
    }


def text(column: str, cell: Any) -> str:
    """A cell as it is read: one digit after the point in percent and degrees, three in a loss."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    digits = 1 if column.endswith(("%", "°")) else 3
    if isinstance(cell, float):
        return f"{cell:.{digits}f}"
    paired = "p" in cell
    words = f"{cell['mean']:{'+' if paired else ''}.{digits}f}".replace("-", "−")
    if cell["std"] is not None:
        words += f" ± {cell['std']:.{digits}f}"
    if paired and cell["p"] is not None:
        words += f" (p = {cell['p']:.2g})" if cell["p"] >= 0.001 else " (p < 0.001)"
    return words


def texts(rows: Sequence[Row]) -> list[dict[str, str]]:
    return [{column: text(column, cell) for column, cell in row.items()} for row in rows]


# Figures and files


def dots(axes: Axes, runs: Runs, variants: Mapping[str, str], value: str, **line: Any) -> None:
    """A value against variants, each with its label: a pale line a seed, and mean and deviation over them."""
    values = np.array([[run[value] for run in runs[name]] for name in variants])  # (variants, seeds)
    places, seeds = range(len(variants)), values.shape[1]
    deviation = values.std(axis=1, ddof=1) if seeds > 1 else None
    style = {"marker": "o", "capsize": 4, "zorder": 2, "label": over(seeds)} | line
    mean, *_ = axes.errorbar(places, values.mean(axis=1), deviation, **style)
    each = {"color": mean.get_color(), "alpha": 0.3, "linewidth": 0.8, "zorder": 1}
    if style.get("linestyle") == "none":
        each |= {"linestyle": "none", "marker": "o", "markersize": 4, "markeredgewidth": 0}
    axes.plot(places, values, **each)
    axes.plot([], [], **each | {"label": "a seed"})
    axes.set_xticks(places, variants.values())
    axes.margins(x=0.15)
    axes.set_title(value, fontsize=10)
    axes.grid(axis="y", alpha=0.3)


def panels(runs: Runs, rows: Sequence[Mapping[str, str]]) -> Figure:
    """What features are worth, a column a measure: in each row of panels, variants with their labels."""
    figure = Figure(figsize=(WIDTH, 1 + 2.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(MEASURES), sharey="col", sharex="row", squeeze=False)
    for row, labels in zip(grid, rows, strict=True):
        for axes, measure in zip(row, MEASURES, strict=True):
            dots(axes, runs, labels, measure)
    for axes in grid[1:].flat:
        axes.set_title("")  # that of the column is at its head
    return figure


def over(seeds: int) -> str:
    """What `dots` has drawn."""
    return f"mean ± standard deviation over {seeds} seeds"


def result_file(name: str, directory: str) -> Path:
    """Where a study's numbers are to go: asked for before it starts, so that a mistake costs no training."""
    return writable(Path(directory) / f"{name}.json", "directory")


def keep(result: dict[str, Any], figure: Figure, path: Path) -> None:
    """Leave a study's result and, beside it, its figure; print the tables, each under its title."""
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    save(figure, path.with_suffix(".png"))
    for title, rows in result["tables"].items():
        print(f"\n{title}:\n\n{format_table(texts(rows))}")
    print(f"\nFigure and numbers are kept in {path.parent}", flush=True)
