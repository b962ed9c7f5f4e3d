"""Shows that the fused losses train as eager PyTorch does: ``python -m train_ref validate``."""

from __future__ import annotations

import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer, seed_everything
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from contrastive_ops import available_backends

from .augmentations import Augmentation
from .comparison import Compared, CompareGradients, Eager, relative
from .data import Views
from .errors import UsageError
from .evaluation import format_table
from .figures import WIDTH, caption, one_legend, save
from .files import writable, write_text
from .machine import describe
from .memory import PeakMemory
from .methods import METHODS, Method, MoCo, method_name
from .networks import Architecture, ResNet, Stem, check_size, network
from .parsing import PositiveFinite, Seed
from .timing import LossClock

# SGD's learning rate for each image of a batch: the papers' 0.03 for 256, and 0.06 for 512.
LEARNING_RATE = 0.03 / 256
ACTIVE = 256  # rows in a sampled softmax, in place of the paper's 65536, which are more than there are digits

# How far losses and gradients may be apart at the same weights, relative (L2). In half precision the eager
# code rounds every similarity, so what is stated there is its distance.
TOLERANCE = {"32-true": 1e-5, "64-true": 1e-10, "bf16-mixed": 5e-2, "16-mixed": 1e-2}
# Training amplifies roundings. Where a unit's sign, of some that are nearly zero, depends on one, the loss
# moves at once: curves fork, and which way a run takes is chance. So the fused run must be as near to one of
# several eager runs, their keys in another order, as two of those are to each other. While it is further
# away, eager runs are added: if as many as these have not been anywhere near, it is not by chance.
LEAST_PERMUTED, MOST_PERMUTED = 2, 32
FLOAT64_DRIFT = 1e-8  # whatever the eager runs do

Precision = Literal["32-true", "64-true", "bf16-mixed", "16-mixed"]
Criterion = Callable[[Method], nn.Module]  # from a method, with whose own criterion it may compute

# How curves are drawn: what is wide and pale lies below what is thin.
EAGER = {"color": "#56B4E9", "linewidth": 4, "alpha": 0.6}
FUSED = {"color": "#D55E00", "linewidth": 1}
PERMUTED = {"color": "0.6", "linewidth": 1}
ALLOWED = {"color": "0.3", "linewidth": 1, "linestyle": "--"}
SMALLEST_DIFFERENCE = 5e-17  # that is drawn: half of float64's last bit
PRECISIONS = {"32-true": "float32", "64-true": "float64", "bf16-mixed": "bfloat16", "16-mixed": "float16"}

# The options that numbers and curves depend on.
KEPT_SETTINGS = (
    "network", "steps", "precision", "dataset", "image_size", "batch_size", "queue_size", "dim",
    "learning_rate", "seed",
)  # fmt: skip


@dataclass
class Run:
    """A training.

    Attributes:
        curve: loss of each step.
        step_ms, loss_ms: median time of a step without its data, and of the loss in it.
        peak_mib: memory at its peak beyond that at the start: of the process, or of a GPU's tensors.
    """

    curve: list[float] = field(default_factory=list)
    step_ms: float = 0.0
    loss_ms: float = 0.0
    peak_mib: float = 0.0


class Measure(Callback):
    """Fills in a `Run`."""

    def __init__(self) -> None:
        self.run = Run()
        self.steps: list[float] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, module: Method) -> None:
        self.clock = LossClock(module.criterion, module.device)
        self.memory = PeakMemory(module.device)

    def on_train_batch_start(self, trainer: Trainer, module: Method, batch: Any, batch_idx: int) -> None:
        self._synchronize(module)
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._synchronize(module)
        self.steps.append(time.perf_counter() - self.since)
        self.losses.append(self.clock.read())
        self.run.curve.append(float(module.values["loss"]))

    def on_train_end(self, trainer: Trainer, module: Method) -> None:
        self.clock.remove()
        self.run.peak_mib = self.memory.read_mib()
        self.run.step_ms = 1000 * float(np.median(self.steps))
        self.run.loss_ms = 1000 * float(np.median(self.losses))

    @staticmethod
    def _synchronize(module: Method) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize()


class DrawnOnce(Views):
    """The first batches of a training, drawn once for all that train on them."""

    def draw(self, steps: int) -> None:
        self.setup()
        loader, self.batches = super().train_dataloader(), []
        for epoch in itertools.count():
            loader.batch_sampler.set_epoch(epoch)
            self.batches += itertools.islice(loader, steps - len(self.batches))
            if len(self.batches) == steps:
                return

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)


@dataclass
class Verdict:
    """What a method's runs have shown.

    Attributes:
        loss_difference, gradient_difference: at the same weights, the largest of all steps.
        drift: of the fused curve from the nearest of the eager ones; in float64, where curves do not fork,
            from that whose keys are in their own order.
        eager_drift: the largest between two eager curves.
    """

    method: str
    backend: str
    loss_difference: float
    gradient_difference: float
    fused: Run
    eager: Run
    permuted: list[Run]
    drift: float = 0.0
    eager_drift: float = 0.0
    passed: bool = False

    def judge(self, precision: str) -> None:
        """Tells drifts and whether it passed, by the runs that there are so far."""
        runs = [self.eager, *self.permuted]
        self.eager_drift = max(itertools.starmap(drift, itertools.combinations(runs, 2)), default=0.0)
        if precision == "64-true":
            self.drift, allowed = drift(self.eager, self.fused), FLOAT64_DRIFT
        else:
            self.drift = min(drift(run, self.fused) for run in runs)
            # Nobody can ask curves to be nearer than losses at the same weights.
            allowed = max(self.eager_drift, TOLERANCE[precision])
        same = max(self.loss_difference, self.gradient_difference) <= TOLERANCE[precision]
        self.passed = same and self.drift <= allowed < math.inf

    def row(self) -> dict[str, str]:
        def share(run: Run) -> str:
            return f"{run.loss_ms:.1f} of {run.step_ms:.1f} ms"

        return {
            "method": self.method,
            "backend": self.backend,
            "losses": f"{self.loss_difference:.1e}",
            "gradients": f"{self.gradient_difference:.1e}",
            "drift": f"{self.drift:.1e}",
            "eager's own": f"{self.eager_drift:.1e}, {1 + len(self.permuted)} runs",
            "loss in a step, fused": share(self.fused),
            "eager": share(self.eager),
            "memory": f"{self.fused.peak_mib:.0f}",
            "eager's": f"{self.eager.peak_mib:.0f} MiB",
            "": "ok" if self.passed else "FAILED",
        }


def drift(a: Run, b: Run) -> float:
    """Root mean square of two curves' differences, relative to that of the first."""
    return relative(*(torch.tensor(run.curve, dtype=torch.float64) for run in (b, a)))


def validate(**options: Any) -> list[Verdict]:
    """Train each method with the fused losses and in eager PyTorch, and tell how far they are apart.

    The same network begins with the same weights and sees the same views. First the fused losses train, and
    at every step, at the same weights, losses and gradients are compared with those of eager PyTorch. Then
    both train freely, and so do eager runs whose keys are merely in another order: since training amplifies
    roundings, their curves tell how far apart equal ones get. While the fused curve is further from the
    nearest of them than two of them are from each other, more are run, up to 32.

    A table is printed; it, the curves and a picture of them are left as validate.json and validate.png. Ends
    with an error where a difference is larger than the tolerance, which is printed too.

    Args:
        **options: those of `Validation`.
    """
    return Validation(**options).run()


@dataclass(frozen=True)
class Validation:
    """What trains, on what, and how.

    Args:
        methods: which, as a list, [a,b] or a,b, or a single one; all by default.
        network: small images get ResNets with a small stem.
        steps: of each training.
        backend: of the fused losses; by default cpu, or triton on a GPU.
        precision: 32-true, 64-true, bf16-mixed or 16-mixed.
        dataset: digits, folder or synthetic.
        root: of the folder.
        augmentation: of the views; by default digits' or MoCo v2's.
        image_size: of the views, in pixels.
        batch_size: images a step.
        queue_size: K of MoCo.
        dim: D of what is contrasted.
        learning_rate: by default the papers', in proportion to the batch.
        accelerator: cpu, gpu or auto.
        free: false leaves out the free runs, and their times with them.
        seed: of everything.
        output: folder of what is left.
    """

    methods: Sequence[str] | str = tuple(METHODS)
    network: Architecture = "convnet"
    steps: PositiveInt = 100
    backend: str | None = None
    precision: Precision = "32-true"
    dataset: Literal["digits", "folder", "synthetic"] = "digits"
    root: str | None = None
    augmentation: Augmentation | None = None
    image_size: PositiveInt = 8
    batch_size: PositiveInt = 64
    queue_size: PositiveInt = 4096
    dim: PositiveInt = 128
    learning_rate: PositiveFinite | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    free: bool = True
    seed: Seed = 0
    output: str = "runs/validate"

    def run(self) -> list[Verdict]:
        """Train all methods, tell what has come of it, and leave it in the folder."""
        chosen = self.complete()
        file = writable(Path(self.output) / "validate.json")
        available(chosen.backend)
        check_size(network(chosen.network, chosen.stem), chosen.network, chosen.image_size)
        views = chosen.views()
        verdicts = []
        for method in chosen.methods:
            verdicts.append(chosen.judged(method, views))
            print(f"{method}: {'ok' if verdicts[-1].passed else 'FAILED'}", flush=True)
        chosen.keep(verdicts, file)
        chosen.tell(verdicts)
        print(f"Curves and numbers are kept in {file.parent}", flush=True)
        failed = [verdict.method for verdict in verdicts if not verdict.passed]
        if failed:
            sys.exit(f"error: not within the tolerance: {', '.join(failed)}")
        return verdicts

    @property
    def on_gpu(self) -> bool:
        return self.accelerator == "gpu" or (self.accelerator == "auto" and torch.cuda.is_available())

    @property
    def stem(self) -> Stem:
        return "small" if self.image_size <= 64 and self.network in get_args(ResNet) else "imagenet"

    def complete(self) -> Validation:
        """The same with methods by their names, and with the defaults that depend on other options."""
        methods = self.methods
        if isinstance(methods, str):
            methods = [name.strip() for name in methods.split(",")]
        methods = [method_name(name) for name in methods]
        if not methods:
            raise UsageError(f"methods must name one at least; there are {', '.join(METHODS)}")
        return replace(
            self,
            methods=methods,
            backend=self.backend or ("triton" if self.on_gpu else "cpu"),
            augmentation=self.augmentation or ("digits_v2" if self.dataset == "digits" else "moco_v2"),
            learning_rate=(
                LEARNING_RATE * self.batch_size if self.learning_rate is None else self.learning_rate
            ),
        )

    def views(self) -> DrawnOnce:
        """The views of all trainings."""
        seed_everything(self.seed, verbose=False)
        views = DrawnOnce(
            dataset=self.dataset,
            root=self.root,
            augmentation=self.augmentation,
            image_size=self.image_size,
            batch_size=self.batch_size,
            synthetic_size=max(4096, self.batch_size),
        )
        views.draw(self.steps)
        return views

    def module(self, method: str) -> Method:
        """The untrained method, whose losses are the backend's."""
        kind, settings = METHODS[method]
        if kind is MoCo:
            settings = {"queue_size": self.queue_size, **settings}
        if "active" in settings:
            settings = {**settings, "active": ACTIVE}
        seed_everything(self.seed, verbose=False)
        module = kind(
            arch=self.network,
            stem=self.stem,
            dim=self.dim,
            learning_rate=self.learning_rate,
            seed=self.seed,
            **settings,
        )
        module.criterion.backend = self.backend
        return module

    def train(
        self, method: str, views: DrawnOnce, criterion: Criterion, *callbacks: Callback
    ) -> tuple[Run, nn.Module]:
        """Train a method with a criterion in place of its own; returns the run, and the criterion."""
        gc.collect()  # networks of earlier runs: the trainer and they refer to each other
        module = self.module(method)
        module.criterion = criterion(module)
        measure = Measure()
        trainer = Trainer(
            accelerator=self.accelerator,
            devices=1,
            precision=self.precision,
            max_steps=self.steps,
            max_epochs=-1,
            callbacks=[measure, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, views)
        return measure.run, module.criterion

    def compared(self, method: str, views: DrawnOnce) -> tuple[float, float]:
        """The largest differences of losses and of gradients, of all steps, at the same weights."""
        _, comparison = self.train(method, views, Compared.in_training, CompareGradients())
        return max(comparison.losses), max(comparison.gradients, default=math.inf)

    def judged(self, method: str, views: DrawnOnce) -> Verdict:
        """Compare at the same weights; then run freely, eager code as often as it takes."""
        differences = self.compared(method, views)
        verdict = Verdict(method, self.backend, *differences, Run(), Run(), [])
        if self.free:
            verdict.fused, _ = self.train(method, views, lambda module: module.criterion)
            verdict.eager, _ = self.train(method, views, lambda module: Eager(module.criterion))
        verdict.judge(self.precision)
        most = MOST_PERMUTED if max(differences) <= TOLERANCE[self.precision] else LEAST_PERMUTED
        while self.free and len(verdict.permuted) < (LEAST_PERMUTED if verdict.passed else most):
            order = 1 + len(verdict.permuted)
            run, _ = self.train(method, views, lambda module, order=order: Eager(module.criterion, order))
            verdict.permuted.append(run)
            verdict.judge(self.precision)
        return verdict

    def keep(self, verdicts: list[Verdict], file: Path) -> None:
        """Leave everything as JSON, and the curves' picture beside it."""
        result = {
            "machine": describe("cuda" if self.on_gpu else "cpu"),
            "settings": {name: getattr(self, name) for name in KEPT_SETTINGS},
            "verdicts": [asdict(verdict) for verdict in verdicts],
        }
        write_text(file, json.dumps(result, indent=1) + "\n")
        if self.free:
            save(draw(result), file.with_suffix(".png"))

    def tell(self, verdicts: list[Verdict]) -> None:
        """Print the table, and by which rule each has passed or failed."""
        tolerance = TOLERANCE[self.precision]
        print("\n" + format_table([verdict.row() for verdict in verdicts]))
        print(
            f"\nAt the same weights, losses and gradients may differ by {tolerance:g} (relative, the largest "
            f"of {self.steps} steps)."
        )
        if self.free:
            rule = f"{FLOAT64_DRIFT:g} from eager"
            if self.precision != "64-true":
                rule = (
                    "from the nearest of the eager runs, whose keys are in several orders, as far as two of "
                    f"those are apart, or by {tolerance:g}"
                )
            print(f"Fused curves may drift {rule} (relative, root mean square).")


def available(backend: str) -> None:
    """Refuse a backend that cannot serve here.

    Raises:
        UsageError: tells why it cannot.
    """
    status = available_backends().get(backend, "there is none of that name")
    if not status or isinstance(status, str):
        raise UsageError(f"backend: {backend} cannot serve here: {status}")


def draw(result: Mapping[str, Any]) -> Figure:
    """Both curves of each method and, below them, how far the fused one and those of eager code with its keys
    in another order are from eager, relative to it, from what `Validation.keep` has left."""
    settings, verdicts = result["settings"], result["verdicts"]
    columns = min(5, len(verdicts))
    rows = math.ceil(len(verdicts) / columns)
    figure = Figure(figsize=(WIDTH, 1 + 3.4 * rows), layout="constrained")
    # Losses differ from method to method, differences have one scale for all.
    heights = figure.subplots(2 * rows, columns, squeeze=False, sharex=True).reshape(rows, 2, columns)
    pairs = heights.transpose(0, 2, 1).reshape(-1, 2)
    for (curves, differences), verdict in zip(pairs, verdicts, strict=False):
        eager = np.array(verdict["eager"]["curve"])
        curves.plot(eager, label="eager", **EAGER)
        curves.plot(verdict["fused"]["curve"], label="fused", **FUSED)
        curves.set_title(verdict["method"], fontsize=10)
        differences.sharey(pairs[0][1])
        for run in verdict["permuted"]:
            differences.plot(relative_difference(run, eager), label="eager, other order of keys", **PERMUTED)
        differences.plot(relative_difference(verdict["fused"], eager), label="fused", **FUSED)
        if settings["precision"] == "64-true":
            differences.axhline(FLOAT64_DRIFT, label="what validate allows", **ALLOWED)
        for axes in (curves, differences):
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=8)
    for axes in pairs[len(verdicts) :].flat:
        axes.remove()
    _, first = pairs[0]
    first.set_yscale("log")
    first.set_ylim(bottom=SMALLEST_DIFFERENCE)
    for (curves, differences), place in zip(pairs, range(len(verdicts)), strict=False):
        if place % columns == 0:
            curves.set_ylabel("loss")
            differences.set_ylabel("relative\ndifference\nfrom eager")
        else:
            differences.tick_params(labelleft=False)
        if place + columns >= len(verdicts):
            differences.set_xlabel("step")
    caption(figure, seen(result))
    one_legend(figure)
    return figure


def relative_difference(run: Mapping[str, Any], eager: np.ndarray) -> np.ndarray:
    """Of a curve, step by step; what is equal is at the lower edge of the picture."""
    return np.maximum(np.abs(np.array(run["curve"]) - eager) / np.abs(eager), SMALLEST_DIFFERENCE)


def seen(result: Mapping[str, Any]) -> str:
    """What `draw` shows, in words and numbers."""
    settings, verdicts = result["settings"], result["verdicts"]

    def largest(*values: str) -> str:
        return f"{max(verdict[value] for verdict in verdicts for value in values):.0e}"

    apart = largest("loss_difference", "gradient_difference")
    told = (
        f"A {settings['network']} trains {settings['steps']} steps in {PRECISIONS[settings['precision']]}, "
        "with fused losses and with eager ones, freely, from the same weights on the same views. At the same "
        f"weights, losses and gradients differ by {apart} at most. Training makes roundings grow, those of "
        "fused losses as those of eager code whose keys are merely in another order"
    )
    if settings["precision"] != "64-true":
        return f"{told}, until all curves part."
    return f"{told}: curves lie on each other, and are {largest('drift')} apart at most (root mean square)."
