"""ConIC (consistent instance classification): every image is a class of its own, and its views agree."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from contrastive_ops import DelayedSGD, InstanceClassifier, conic_loss

from .errors import UsageError
from .networks import FEATURES, Architecture, Stem, projection_head, resnet
from .runs import log_values


class ConIC(LightningModule):
    """Instance classification with a consistency loss, over all images or an active set of them.

    Each of the N training images has a row in the classifier. Two views of an image are classified as that
    image, and penalised for being unlike each other. With `active` rows in the softmax, the batch's images
    take the places of those sampled earliest, and the other rows are updated late. The defaults are the
    paper's, without sampling; its active set is 65536. Without sampling, a consistency weight of 0 is
    Exemplar-CNN.

    Args:
        arch: the network.
        stem: how the network starts: "small" suits images of 64 pixels and fewer.
        dim: dimension D of the features and of the classifier's rows.
        active: rows in the softmax, at least as many as images a step; null, or N and more: all of them.
        compensation: weigh the negatives in an active set by (N − 1) / (active − 1), for those that are not.
        storage: where rows that are not active live: "device", "host" (its memory) or "disk".
        path: the folder of storage "disk", the same when a run is resumed, and one for each run.
        temperature: τ of the softmax.
        consistency_weight: α of the consistency between views.
        learning_rate: of SGD with momentum 0.9, at the start of a cosine; 0.06 suits a batch of 512.
        weight_decay: of SGD.
        seed: of the classifier's first rows and first active set.
    """

    def __init__(
        self,
        arch: Architecture = "resnet50",
        stem: Stem = "imagenet",
        dim: PositiveInt = 128,
        active: PositiveInt | None = None,
        compensation: bool = True,
        storage: Literal["device", "host", "disk"] = "device",
        path: str | None = None,
        temperature: PositiveFloat = 0.1,
        consistency_weight: NonNegativeFloat = 2.5,
        learning_rate: PositiveFloat = 0.06,
        weight_decay: NonNegativeFloat = 1e-4,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        backbone = resnet(arch, stem)
        self.encoder = nn.Sequential(backbone, projection_head("mlp_bn", FEATURES[arch], dim))
        # On CPUs as on GPUs in mixed precision, convolutions are fastest in this order.
        self.encoder.to(memory_format=torch.channels_last)
        self.classifier: InstanceClassifier | None = None  # as soon as the number of images is known

    @property
    def backbone(self) -> nn.Module:
        """The encoder without its head: what the training is for, (B, 3, H, W) to (B, features)."""
        return self.encoder[0]

    def setup(self, stage: str) -> None:
        trainer, active = self.trainer, self.hparams.active
        if trainer.world_size > 1:
            raise UsageError(f"ConIC trains in one process so far, not in {trainer.world_size}")
        if trainer.precision not in ("32-true", "bf16-mixed"):
            raise UsageError(
                f"trainer.precision is {trainer.precision}, but ConIC needs 32-true or bf16-mixed: "
                "its classifier stays in float32, and is updated without a loss scaler"
            )
        images = trainer.datamodule.hparams.batch_size * trainer.accumulate_grad_batches
        if active is not None and active < images:
            raise UsageError(f"model.active is {active}, fewer than the {images} images of a step")
        if self.classifier is None:
            self._make_classifier(trainer.datamodule.num_instances)

    def _make_classifier(self, num_instances: int) -> None:
        settings = self.hparams
        try:
            self.classifier = InstanceClassifier(
                num_instances,
                settings.dim,
                settings.active or num_instances,
                settings.storage,
                settings.path,
                settings.seed,
            )
        except (OSError, ValueError) as error:  # a folder that is in use, or holds something else
            raise UsageError(f"model.storage, model.path: {error}") from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.classifier is None:  # loaded without a trainer, so without the images
            self._make_classifier(checkpoint["state_dict"]["classifier._extra_state"]["num_instances"])

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        try:
            return super().load_state_dict(*args, **options)
        except ValueError as error:  # a checkpoint of other images, or of rows on disk that have moved on
            raise UsageError(f"ckpt_path: {error}") from error

    def on_train_start(self) -> None:
        try:  # of more rows than are active, one is read from where they are stored
            self.classifier.read(
                torch.arange(min(len(self.classifier.weight) + 1, self.classifier.num_instances))
            )
        except RuntimeError as error:  # the rows on disk are an earlier training's
            raise UsageError(f"model.path: {error}") from error

    def training_step(self, batch: tuple[list[Tensor], Tensor, Tensor], batch_idx: int) -> Tensor:
        views, _, instances = batch  # 2 × (B, 3, H, W), labels that only the evaluation looks at, (B,)

        target = self.classifier.activate(instances)  # (B,) rows of the classifier's weight
        # Both views in one pass, as in SimCLR: batch statistics are those of 2 B images.
        features = self.encoder(torch.cat(views)).unflatten(0, (len(views), -1))  # (V, B, D)

        loss, metrics = conic_loss(
            features,
            self.classifier.weight,  # (A, D)
            target,
            num_instances=self.classifier.num_instances if self.hparams.compensation else None,
            temperature=self.hparams.temperature,
            consistency_weight=self.hparams.consistency_weight,
            return_metrics=True,
        )  # (), metrics (V, B) or (B,)

        log_values(
            self,
            loss=loss.detach(),
            classification_loss=metrics.classification_loss.mean(),  # of a view; the loss has their sum
            consistency_loss=metrics.consistency_loss.mean(),
            # Is the view's own row among the most similar in the softmax?
            top1=(metrics.positive_rank < 1).float().mean(),
            top5=(metrics.positive_rank < 5).float().mean(),
        )
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        settings = {
            "lr": self.hparams.learning_rate,
            "momentum": 0.9,
            "weight_decay": self.hparams.weight_decay,
        }
        self.classifier_optimizer = DelayedSGD(self.classifier, **settings)
        optimizer = torch.optim.SGD(self.encoder.parameters(), **settings)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        """Step the network, which Lightning knows of, then the classifier at the same learning rate.

        The classifier's momentum is a buffer of its own, so a checkpoint needs nothing of its optimizer.
        """
        optimizer.step(closure=optimizer_closure)  # forward and backward, of both, happen in the closure
        (group,) = self.classifier_optimizer.param_groups
        group["lr"] = optimizer.param_groups[0]["lr"]
        self.classifier_optimizer.step()
        self.classifier_optimizer.zero_grad()
