"""What the features are worth while they are being trained: a linear probe alongside, and nearest neighbours
of a held-out part every few epochs. Neither changes the training."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from .data import Views
from .distributed import gather, gather_objects, mean, rank, total, world_size
from .errors import UsageError, one_line
from .evaluation import Features, extract_features, knn_accuracy
from .methods import Method
from .parsing import PositiveFinite

SIMILARITIES = 10**9  # bytes of them at once
RATE = 10.0  # at its largest; features are of length 1 or so, whatever the network
MEMORY = 0.9  # of the running statistics, as of batch norm's


class LinearProbe:
    """A linear layer that learns the labels from the features of each step's views, as they come.

    Features are detached: no gradient reaches the encoder. As in batch norm, each is standardised by the
    batch's mean and deviation, in the evaluation by their running means, and divided by √F, so that one
    learning rate suits all networks. SGD with momentum 0.9 and no decay begins at zero: nothing is random.
    Of several processes all have the layer, and learn from the rows of all.

    Args:
        features: F of them.
        classes: labels are below this.
        device: of the features.
        dtype: of the computation.
    """

    def __init__(self, features: int, classes: int, device: torch.device, dtype: torch.dtype) -> None:
        like = {"device": device, "dtype": dtype}
        self.layer = nn.Linear(features, classes, **like)
        for parameter in self.layer.parameters():
            nn.init.zeros_(parameter)
        self.mean, self.square = torch.zeros(features, **like), torch.zeros(features, **like)
        self.steps = 0
        self.optimizer = torch.optim.SGD(self.layer.parameters(), RATE, momentum=0.9)

    def step(self, features: Tensor, labels: Tensor, factor: float) -> dict[str, Tensor]:
        """Learn from a batch.

        Args:
            features: (V·B, F) of this process's V views of each image, view by view.
            labels: (B,) of the images.
            factor: of the largest learning rate.

        Returns:
            Means over all processes: the loss, and which part of the views was classified as labelled.
        """
        x = features.to(self.mean)
        labels = labels.repeat(len(x) // len(labels))
        count = world_size() * len(x)
        average, square = total(x.sum(0)) / count, total(x.square().sum(0)) / count
        self.mean.mul_(MEMORY).add_(average, alpha=1 - MEMORY)
        self.square.mul_(MEMORY).add_(square, alpha=1 - MEMORY)
        self.steps += 1

        with torch.enable_grad():
            logits = self.layer(_standardized(x, average, square))  # (V·B, classes)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.layer.parameters():
            parameter.grad = mean(parameter.grad)
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * factor
        self.optimizer.step()

        right = (logits.argmax(1) == labels).to(loss.dtype).mean()
        told = mean(torch.stack([loss.detach(), right]))
        return dict(zip(("probe_loss", "probe_top1"), told.unbind(), strict=True))

    @torch.no_grad()
    def accuracy(self, test: Features) -> float:
        """In percent of images of which these are the features, without augmentation."""
        known = 1 - MEMORY**self.steps  # the running sums began at zero
        correct = 0
        for features, labels in zip(test.features.split(1024), test.labels.split(1024), strict=True):
            x = _standardized(features.to(self.mean), self.mean / known, self.square / known)
            correct += int((self.layer(x).argmax(1).cpu() == labels).sum())
        return 100 * correct / len(test.labels)

    def state_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self.mean,
            "square": self.square,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.layer.load_state_dict(state["layer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.steps = state["steps"]


def _standardized(x: Tensor, average: Tensor, square: Tensor) -> Tensor:
    variance = (square - average.square()).clamp(min=0)
    return (x - average) * (variance + 1e-5).rsqrt() / math.sqrt(x.shape[1])


class Seen:
    """The features that a backbone makes of its first batch in each step, detached.

    Where views have several sizes and so come in several batches, the first has the largest.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.features: Tensor | None = None
        self._hook = backbone.register_forward_hook(self._keep)

    def _keep(self, backbone: nn.Module, images: Any, features: Tensor) -> None:
        if backbone.training and self.features is None:
            self.features = features.detach()

    def take(self) -> Tensor:
        features, self.features = self.features, None
        return features

    def remove(self) -> None:
        self._hook.remove()


@torch.no_grad()
def shared_features(backbone: nn.Module, loader: DataLoader, device: torch.device) -> Features | None:
    """`extract_features`, of which each process does its share. The first one has them; the others get None.

    Args:
        backbone: the same in all processes.
        loader: of all images, in order.
        device: of this process.
    """
    count, processes = len(loader.dataset), world_size()
    share = DataLoader(
        Subset(loader.dataset, range(rank(), count, processes)),
        loader.batch_size,
        num_workers=loader.num_workers,
        multiprocessing_context=loader.multiprocessing_context,
        pin_memory=loader.pin_memory,
        generator=torch.Generator(),  # or starting it would draw from the global one
    )
    own = extract_features(backbone, share, device)
    together = []
    for rows in own:
        missing = math.ceil(count / processes) - len(rows)
        padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        parts = []
        for part in padded.split(4096):  # a GPU need not hold them all
            everywhere = gather(part.to(device)).unflatten(0, (processes, -1))  # (P, rows, …)
            if rank() == 0:
                parts.append(everywhere.transpose(0, 1).flatten(0, 1).cpu())
        together.append(torch.cat(parts)[:count] if parts else None)
    return Features(*together) if rank() == 0 else None


class OnlineEvaluation(Callback):
    """While training goes on, tells what the features are worth, and changes nothing of it.

    A linear probe learns alongside; its loss and its accuracy on the views of each step are values of the
    step, as the method's are. Every few epochs, and at the end, the nearest neighbours of test images vote,
    as in the command ``knn``, and the probe is tested on the same images. Nothing of it is random; the probe
    is in checkpoints.

    Args:
        k: votes of the nearest-neighbour classifier.
        temperature: of its weights.
        max_images: take no more training and test images than this; by default all.
        every_n_epochs: how often test images are classified; null: never.
        probe: train a linear layer alongside.
        enabled: false leaves all of it out.
    """

    values = ("probe_loss", "probe_top1", "knn_accuracy", "probe_accuracy")  # that may be logged

    def __init__(
        self,
        k: PositiveInt = 200,
        temperature: PositiveFinite = 0.07,
        max_images: PositiveInt | None = None,
        every_n_epochs: PositiveInt | None = 10,
        probe: bool = True,
        enabled: bool = True,
    ) -> None:
        self.k, self.temperature, self.max_images = k, temperature, max_images
        self.every_n_epochs, self.with_probe, self.enabled = every_n_epochs, probe, enabled
        self.probe: LinearProbe | None = None
        self.restored: dict[str, Any] | None = None  # the probe's state, from a checkpoint
        self.measured: tuple[int, dict[str, float]] = (-1, {})  # after which epoch, and what

    def setup(self, trainer: Trainer, module: Method, stage: str) -> None:
        if self.enabled:
            self._check(trainer.datamodule)

    def _check(self, views: Views) -> None:
        """Raise a UsageError, in all processes, where the evaluation would fail after the training."""
        labels = views.evaluation_labels(self.max_images)
        if len(labels.unique()) == 1:
            share = (
                "" if self.max_images is None else f", of which evaluation.max_images leaves {len(labels)},"
            )
            raise UsageError(
                f"data.dataset is {views.hparams.dataset}, whose training images{share} are all of one "
                "class: nothing can be measured; --evaluation.enabled false leaves the evaluation out"
            )
        mistake = None
        if rank() == 0:
            try:
                views.read_test_images(self.max_images)
            except UsageError as error:
                mistake = f"{one_line(error)}; --evaluation.enabled false leaves the evaluation out"
        mistake, *_ = gather_objects(mistake)
        if mistake is not None:
            raise UsageError(mistake)

    def on_train_start(self, trainer: Trainer, module: Method) -> None:
        if not (self.enabled and self.with_probe):
            return
        classes = int(trainer.datamodule.evaluation_labels().max()) + 1
        weight = next(module.backbone.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.probe = LinearProbe(module.backbone.num_features, classes, weight.device, dtype)
        if self.restored is not None:
            self.probe.load_state_dict(self.restored)
        self.seen = Seen(module.backbone)

    def on_train_batch_start(self, trainer: Trainer, module: Method, batch: Any, batch_idx: int) -> None:
        self.labels = batch[1]

    def on_after_backward(self, trainer: Trainer, module: Method) -> None:
        """Before others look at the step's values, whatever the order of callbacks."""
        if self.probe is None:
            return
        factor = trainer.optimizers[0].param_groups[0]["lr"] / module.hparams.learning_rate
        values = self.probe.step(self.seen.take(), self.labels, factor)
        module.values |= values
        for name, value in values.items():
            module.log(name, value, prog_bar=name == "probe_top1")

    def on_train_epoch_end(self, trainer: Trainer, module: Method) -> None:
        for name, value in self.measure(trainer, module).items():
            module.log(name, value, prog_bar=True, sync_dist=True)

    def measure(self, trainer: Trainer, module: Method) -> dict[str, float]:
        """Accuracies after this epoch in percent, if it is one after which they are measured. All processes
        ask, and whoever asks first, the others get the same."""
        epoch = trainer.current_epoch
        if self.measured[0] != epoch:
            due = self.enabled and self.every_n_epochs is not None
            last = trainer.global_step >= trainer.estimated_stepping_batches
            due = due and (last or (epoch + 1) % self.every_n_epochs == 0)
            self.measured = (epoch, self._measure(trainer, module) if due else {})
        return self.measured[1]

    def _measure(self, trainer: Trainer, module: Method) -> dict[str, float]:
        loaders = trainer.datamodule.evaluation_dataloaders(self.max_images)
        train, test = (shared_features(module.backbone, loader, module.device) for loader in loaders)
        accuracies: dict[str, float] = {}
        if rank() == 0:
            chunk = max(1, SIMILARITIES // (4 * len(train.labels)))
            settings = {"k": self.k, "temperature": self.temperature, "chunk_size": chunk}
            try:
                accuracy = knn_accuracy(train, test, device=module.device, **settings)
            except torch.OutOfMemoryError:
                # The training needs the GPU's memory. A CPU has more, and is slower.
                accuracy = knn_accuracy(train, test, **settings)
            accuracies["knn_accuracy"] = accuracy
            if self.probe is not None:
                accuracies["probe_accuracy"] = self.probe.accuracy(test)
        accuracies, *_ = gather_objects(accuracies)
        return accuracies

    def on_train_end(self, trainer: Trainer, module: Method) -> None:
        if self.probe is not None:
            self.seen.remove()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.probe is None else {"probe": self.probe.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict.get("probe")


def measured(trainer: Trainer, module: Any) -> dict[str, float]:
    """What online evaluations have measured at the end of this epoch."""
    evaluations = (each for each in trainer.callbacks if isinstance(each, OnlineEvaluation))
    return {name: value for each in evaluations for name, value in each.measure(trainer, module).items()}
