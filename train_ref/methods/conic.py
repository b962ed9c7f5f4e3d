"""ConIC (consistent instance classification): every image is a class of its own, and its views agree."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch.optim import SGD, Optimizer

from contrastive_ops import ConICLoss, ConICMetrics, DelayedSGD, InstanceClassifier

from ..checkpoints import LastCheckpoint
from ..distributed import gather, gather_objects, mean, own_rows, rank, world_size
from ..errors import UsageError
from ..networks import Head
from ..parsing import LossWeight, PositiveFinite, Temperature
from .method import Batch, Method


class ConIC(Method):
    """Instance classification with a consistency loss, over all images or an active set of them.

    Each of the N training images has a row in the classifier. Two views of an image are classified as that
    image, and penalised for being unlike each other. With `active` rows in the softmax, the batch's images
    take the places of those sampled earliest, and the other rows are updated late. The defaults are the
    paper's, without sampling; its active set is 65536. Without sampling, a consistency weight of 0 is
    Exemplar-CNN. Every process has the whole classifier, and all do the same to it.

    Args:
        head: ConIC's is "mlp_bn".
        active: rows in the softmax, at least as many as images a step; null, or N and more: all of them.
        compensation: weigh the negatives in an active set by (N − 1) / (active − 1), for those that are not.
        storage: where rows that are not active live: "device", "host" (its memory) or "disk".
        path: the folder of storage "disk", the same when a run is resumed, and one for each run.
        temperature: τ of the softmax.
        consistency_weight: α of the consistency between views.
        learning_rate: of SGD with momentum 0.9, at its largest; 0.06 suits a batch of 512.
        **network: arguments of every method.
    """

    name = "conic"
    metrics = ConICMetrics

    def __init__(
        self,
        head: Head = "mlp_bn",
        active: PositiveInt | None = None,
        compensation: bool = True,
        storage: Literal["device", "host", "disk"] = "device",
        path: str | None = None,
        temperature: Temperature = 0.1,
        consistency_weight: LossWeight = 2.5,
        learning_rate: PositiveFinite = 0.06,
        **network: Any,
    ) -> None:
        super().__init__(head=head, learning_rate=learning_rate, **network)
        self.classifier: InstanceClassifier | None = None  # as soon as the number of images is known
        self.criterion = ConICLoss(
            temperature=temperature, consistency_weight=consistency_weight, return_metrics=True
        )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        trainer, active = self.trainer, self.hparams.active
        if trainer.precision not in ("32-true", "64-true", "bf16-mixed", "16-mixed"):
            raise UsageError(
                f"trainer.precision is {trainer.precision}, but ConIC needs 32-true, bf16-mixed, 16-mixed or "
                "64-true: its classifier stays in float32, or float64"
            )
        images = trainer.datamodule.hparams.batch_size * trainer.accumulate_grad_batches
        if active is not None and active < images:
            raise UsageError(f"model.active is {active}, fewer than the {images} images of a step")
        if self.classifier is None:
            dtype = torch.float64 if trainer.precision == "64-true" else torch.float32
            self._make_classifier(trainer.datamodule.num_instances, dtype)

    def _make_classifier(self, num_instances: int, dtype: torch.dtype) -> None:
        settings, path = self.hparams, self.hparams.path
        if path is not None and rank():
            path = f"{path}-{rank()}"  # of a process its own
        try:
            self.classifier = InstanceClassifier(
                num_instances,
                settings.dim,
                settings.active or num_instances,
                settings.storage,
                path,
                settings.seed,
                dtype,
                generations=self._generations(),
            )
        except (
            ImportError,
            OSError,
            ValueError,
        ) as error:  # a folder that is in use, or holds something else
            raise UsageError(f"model.storage, model.path: {error}") from error

    def _generations(self) -> int:
        """How many checkpoints have their rows on disk: all that are kept, and one that is being written."""
        callbacks = self._trainer.callbacks if self._trainer else ()
        return max([3, *(each.keep + 1 for each in callbacks if isinstance(each, LastCheckpoint))])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if (
            self.hparams.storage == "disk"
        ):  # of which each process has its own, and tells which of its states it is
            self.saved = checkpoint["state_dict"]["classifier._extra_state"]
            checkpoint["storages"] = gather_objects(self.saved["storage"])

    def on_checkpoint_saved(self) -> None:
        if self.hparams.storage == "disk":
            self.classifier.confirm({"_extra_state": self.saved})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]["classifier._extra_state"]
        if storages := checkpoint.get("storages"):
            if len(storages) != world_size():
                raise UsageError(
                    f"trainer.devices: the checkpoint's rows on disk are those of {len(storages)} processes, "
                    f"and these are {world_size()}"
                )
            state["storage"] = storages[rank()]
        if self.classifier is None:  # loaded without a trainer, so without the images
            self._make_classifier(state["num_instances"], checkpoint["state_dict"]["classifier.weight"].dtype)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        try:
            return super().load_state_dict(*args, **options)
        except ValueError as error:  # a checkpoint of other images, or of rows on disk that have moved on
            raise UsageError(f"ckpt_path: {error}") from error

    def on_train_start(self) -> None:
        super().on_train_start()
        try:  # of more rows than are active, one is read from where they are stored
            self.classifier.read(
                torch.arange(min(len(self.classifier.weight) + 1, self.classifier.num_instances))
            )
        except RuntimeError as error:  # the rows on disk are an earlier training's
            raise UsageError(f"model.path: {error}") from error

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        views, _, instances = batch  # 2 × (B, 3, H, W), labels, (B,)

        target = own_rows(self.classifier.activate(gather(instances)))  # (B,) rows of the weight
        # Both views in one pass, as in SimCLR: batch statistics are those of 2 B images.
        features = self.encoder(torch.cat(views)).unflatten(0, (len(views), -1))  # (V, B, D)

        loss, metrics = self.criterion(
            features,
            self.classifier.weight,  # (A, D)
            target,
            num_instances=self.classifier.num_instances if self.hparams.compensation else None,
        )  # (), metrics (V, B) or (B,)

        self.report(loss, metrics)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """What rows carry that were evicted between accumulated batches: processes average it, as the wrapper
        of the model does the weight's gradient."""
        carried = self.classifier.carried
        if carried is not None and carried.grad is not None:
            carried.grad = mean(carried.grad)

    def optimizer(self, **settings: Any) -> Optimizer:
        return Together(SGD(self.encoder.parameters(), **settings), DelayedSGD(self.classifier, **settings))


class Together(Optimizer):
    """Several optimizers that take their steps together: to schedulers, loss scalers and Lightning, one.

    Args:
        *optimizers: their groups are this one's, and stay theirs.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
