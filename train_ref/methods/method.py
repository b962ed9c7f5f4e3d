"""What all methods have: an encoder, an optimizer with a schedule, and a report of each step."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from contrastive_ops import LossMetrics

from .. import distributed
from ..errors import UsageError
from ..networks import Architecture, Head, Stem, check_size, network, normalize_in_groups, projection_head
from ..optimizers import OptimizerName, optimizer_of
from ..parsing import NonNegativeFinite, PositiveFinite, Seed
from ..resuming import of_model, refuse_changes

# ([views (B, 3, H, W), other views (B, 3, H, W)], labels (B,), instances (B,)): B of this process. Nothing
# here looks at the labels.
Batch = tuple[list[Tensor], Tensor, Tensor]


class Method(LightningModule):
    """The base of the methods. What they compute in a step does not depend on how many processes share it:
    batches, batch statistics and negatives are those of all.

    A subclass computes its loss in `training_step`, by its `criterion`: a module of contrastive_ops that
    returns metrics too, or another of the same tensors in its place.

    Args:
        arch: the network: a ResNet of torchvision's, ViT-S/16, or any of timm's by its name, timm/<name>.
        stem: how a ResNet of torchvision's starts: "small" suits images of 64 pixels and fewer.
        head: the projection from features to the contrast's rows; it is thrown away after the training.
        dim: dimension D of these rows.
        norm_groups: parts of a batch that batch norm takes its statistics from: 8 for those of eight GPUs, on
            however many; 1 for those of the whole batch, synchronised over all processes.
        optimizer: of the encoder: "sgd" with momentum 0.9, as most papers have; "lars", SimCLR's for large
            batches; "adamw", for transformers. The last two leave biases and norms without decay.
        learning_rate: at its largest.
        weight_decay: of the optimizer.
        schedule: of the learning rate, over all steps: "cosine" down to 0, or "step": a tenth after three
            fifths and a hundredth after four fifths of them.
        warmup: the part of all steps in which the learning rate first grows from 0.
        seed: of what is random beside views and their order: keys' shuffling, a classifier's rows.
    """

    name: ClassVar[str]
    metrics: ClassVar[Any] = LossMetrics  # the criterion's, a named tuple
    criterion: nn.Module
    shares_loss: ClassVar[bool] = True  # whether processes compute it together, of the rows and keys of all
    views_at_once = 2  # of an image, in a batch of the encoder
    takes_small_views: ClassVar[bool] = False  # whether the loss is of any number of views

    def __init__(
        self,
        arch: Architecture = "resnet50",
        stem: Stem = "imagenet",
        head: Head = "mlp",
        dim: PositiveInt = 128,
        norm_groups: PositiveInt = 1,
        optimizer: OptimizerName = "sgd",
        learning_rate: PositiveFinite = 0.03,
        weight_decay: NonNegativeFinite = 1e-4,
        schedule: Literal["cosine", "step"] = "cosine",
        warmup: ClosedUnitInterval = 0.0,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        backbone = network(arch, stem)
        self.encoder = nn.Sequential(backbone, projection_head(head, backbone.num_features, dim))
        # On CPUs as on GPUs in mixed precision, convolutions are fastest in this order.
        self.encoder.to(memory_format=torch.channels_last)

    @property
    def backbone(self) -> nn.Module:
        """The encoder without its head: what the training is for, (B, 3, H, W) to (B, features)."""
        return self.encoder[0]

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule.hparams
        if (small := data.small_views) and not self.takes_small_views:
            raise UsageError(
                f"data.small_views is {small}, but the loss of {self.name} is of two views; conic takes more"
            )
        # How many views of an image have each size, and go through the encoder at once.
        sizes = {"image_size": self.views_at_once} | ({"small_size": small} if small else {})
        for option in sizes:
            check_size(self.backbone, self.hparams.arch, data[option], f"data.{option}")
        groups, processes, batch = self.hparams.norm_groups, self.trainer.world_size, data.batch_size
        if groups > 1 and (groups % processes or batch % groups):
            raise UsageError(
                f"model.norm_groups is {groups}: it must be 1, or divide data.batch_size, {batch}, and be a "
                f"multiple of the number of processes, {processes}"
            )
        for option, views in sizes.items():
            size = data[option]
            if batch * views // groups == 1 and not self._trains_on_one(size):
                raise UsageError(
                    f"data.batch_size is {batch} and model.norm_groups {groups}: batch norm would take its "
                    f"statistics from a single image of {size} pixels, as data.{option} says, which leaves a "
                    "single value of a channel"
                )
        normalize_in_groups(self.encoder, groups)
        if self.shares_loss:
            self.criterion.group = distributed.group()

    @classmethod
    def value_names(cls) -> list[str]:
        """The names of a step's values, as `report` keeps them."""
        return ["loss", *(field for field in cls.metrics._fields if field.endswith("loss")), "top1", "top5"]

    def _trains_on_one(self, size: int) -> bool:
        """Whether a single image of that size has several values of a channel wherever there is a norm."""
        image = torch.zeros(1, 3, size, size).to(next(self.encoder.parameters()))
        try:
            copy.deepcopy(self.encoder).train()(image)
        except ValueError:
            return False
        return True

    def report(self, loss: Tensor, metrics: Any) -> None:
        """Keep a step's values, means over all processes, as `values`, and log them. Metrics' fields that end
        in "loss" are averaged; from their rank comes how often the positive is the most similar of all, or
        among the five most similar."""
        values = {"loss": loss.detach()}
        if metrics is not None:
            for field in metrics._fields:
                if field.endswith("loss"):
                    values[field] = getattr(metrics, field).mean()
            for top in (1, 5):
                values[f"top{top}"] = (metrics.positive_rank < top).to(loss.dtype).mean()
        stacked = distributed.mean(torch.stack(list(values.values())))
        self.values = dict(zip(values, stacked.unbind(), strict=True))
        for name, value in self.values.items():
            self.log(name, value, prog_bar=not name.endswith("_loss"))

    def make_optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Of all that is trained."""
        return optimizer_of(self.hparams.optimizer, self.encoder, lr, weight_decay)

    def configure_optimizers(self) -> dict[str, Any]:
        hparams = self.hparams
        optimizer = self.make_optimizer(hparams.learning_rate, hparams.weight_decay)
        # The papers' codes change the rate once an epoch; once a step is the same curve, and serves runs that
        # are shorter than an epoch.
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self, steps: int) -> Any:
        warmup, schedule = self.hparams.warmup * steps, self.hparams.schedule

        def factor(step: int) -> float:
            step = min(step, steps)  # beyond its end, a cosine would rise again
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if schedule == "cosine":
                return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
            return 0.1 ** ((step >= round(0.6 * steps)) + (step >= round(0.8 * steps)))

        return factor

    def on_train_start(self) -> None:
        """A run that goes on for longer than its checkpoint's was to begins with its own schedule's rate."""
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            for group, rate, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = rate * factor(scheduler.last_epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["method"] = self.name
        distributed.put_together(checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None:  # a run goes on; else the settings are the caller's affair
            refuse_changes(of_model(self.hparams), of_model(checkpoint["hyper_parameters"]))

    def on_checkpoint_saved(self) -> None:
        """The checkpoint that was taken last is a file now, whatever happens."""

    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        try:
            return super().load_state_dict(state_dict, *args, **options)
        except RuntimeError as error:  # a page of names and shapes
            raise UsageError(
                "ckpt_path: the checkpoint is of another network, or of other sizes, than model.arch, "
                "model.stem, model.head, model.dim and the like say"
            ) from error
