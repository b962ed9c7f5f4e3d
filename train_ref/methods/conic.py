"""ConIC (consistent instance classification): every image is a class of its own, and its views agree."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch.optim import Optimizer

from contrastive_ops import ConICLoss, ConICMetrics, DelayedSGD, InstanceClassifier

from ..checkpoints import LastCheckpoint
from ..distributed import gather_objects, group, total
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
    Exemplar-CNN. Of several processes each has some shards of the classifier, with their rows.

    Args:
        head: ConIC's is "mlp_bn".
        active: rows in the softmax, at least as many as images a step; null, or N and more: all of them.
        shards: in which the images are dealt out, each with its share of the active rows; a multiple of the
            number of processes. A run with so many is the same on any number of processes that divides it;
            with 1 the batch takes the place of those sampled earliest of all, as in the paper.
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
    takes_small_views = True

    def __init__(
        self,
        head: Head = "mlp_bn",
        active: PositiveInt | None = None,
        shards: PositiveInt = 1,
        compensation: bool = True,
        storage: Literal["device", "host", "disk"] = "device",
        path: str | None = None,
        temperature: Temperature = 0.1,
        consistency_weight: LossWeight = 2.5,
        learning_rate: PositiveFinite = 0.06,
        **network: Any,
    ) -> None:
        super().__init__(head=head, learning_rate=learning_rate, **network)
        if self.hparams.optimizer != "sgd":
            raise UsageError(
                f"model.optimizer is {self.hparams.optimizer}, and must be sgd: ConIC's classifier takes "
                "steps of SGD, at the encoder's learning rate"
            )
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
        if self.hparams.shards % trainer.world_size:
            raise UsageError(
                f"model.shards is {self.hparams.shards}: it must be a multiple of the number of processes, "
                f"{trainer.world_size}, each of which has some of the classifier's shards"
            )
        if self.classifier is None:
            dtype = torch.float64 if trainer.precision == "64-true" else torch.float32
            self._make_classifier(trainer.datamodule.num_instances, dtype)

    def _make_classifier(self, num_instances: int, dtype: torch.dtype) -> None:
        settings = self.hparams
        try:
            self.classifier = InstanceClassifier(
                num_instances,
                settings.dim,
                settings.active or num_instances,
                settings.storage,
                settings.path,
                settings.shards,
                group(),
                settings.seed,
                dtype,
                generations=self._generations(),
            )
        except (
            ImportError,
            OSError,
            ValueError,
        ) as error:  # a folder that is in use, or holds something else
            raise UsageError(f"model.storage, model.shards, model.path: {error}") from error
        if group() is not None:
            # The wrapper of the model leaves these alone, which are another process's nowhere.
            self._ddp_params_and_buffers_to_ignore = ["classifier.weight", "classifier.momentum"]

    def _generations(self) -> int:
        """How many checkpoints have their rows on disk: all that are kept, and one that is being written."""
        callbacks = self._trainer.callbacks if self._trainer else ()
        return max([3, *(each.keep + 1 for each in callbacks if isinstance(each, LastCheckpoint))])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        state, prefix = checkpoint["state_dict"], "classifier."
        self.saved = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        shards = {name: x for name, x in state.items() if name.startswith(f"{prefix}shards.")}
        for of_process in gather_objects(shards):
            state.update(of_process)

    def on_checkpoint_saved(self) -> None:
        if self.hparams.storage == "disk":
            self.classifier.confirm(self.saved)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        if self.classifier is None:  # loaded without a trainer, so without the images
            weight = state.get("classifier.weight", state.get("classifier.shards.0000.weight"))
            self._make_classifier(state["classifier._extra_state"]["num_instances"], weight.dtype)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        try:
            return super().load_state_dict(*args, **options)
        except ValueError as error:  # a checkpoint of other images, or of rows on disk that have moved on
            raise UsageError(f"ckpt_path: {error}") from error

    def on_train_start(self) -> None:
        super().on_train_start()
        try:  # of more rows than are active, one is read from where they are stored
            self.classifier.read(torch.arange(min(self.classifier.active + 1, self.classifier.num_instances)))
        except RuntimeError as error:  # the rows on disk are an earlier training's
            raise UsageError(f"model.path: {error}") from error

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        views, _, instances = batch  # V × (B, 3, H, W), labels, (B,)

        target = self.classifier.activate(instances)  # (B,) rows of the weight
        features = self.encode(views)  # (V, B, D)

        loss, metrics = self.criterion(
            features,
            self.classifier.weight,  # (A, D), of P processes (A/P, D)
            target,
            num_instances=self.classifier.num_instances if self.hparams.compensation else None,
        )  # (), metrics (V, B) or (B,)

        self.report(loss, metrics)
        return loss

    def encode(self, views: list[Tensor]) -> Tensor:
        """The features (V, B, D) of views (B, 3, H, W). Those of one size go through the encoder in one pass,
        as SimCLR's two: batch statistics are those of all of them."""
        of_sizes = [list(some) for _, some in itertools.groupby(views, lambda each: each.shape)]
        return torch.cat([self.encoder(torch.cat(some)).unflatten(0, (len(some), -1)) for some in of_sizes])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of the gradients of all rows, of which a process has its own."""
        if group() is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        everywhere = [p for p in self.encoder.parameters() if p.grad is not None]
        here = [p for p in self.classifier.parameters() if p.grad is not None]
        squares = [
            torch.nn.utils.get_total_norm([p.grad for p in parameters]).square().to(self.device)
            for parameters in (everywhere, here)
        ]
        norm = (squares[0] + total(squares[1])).sqrt()
        torch.nn.utils.clip_grads_with_norm_([*everywhere, *here], gradient_clip_val, norm)

    def make_optimizer(self, lr: float, weight_decay: float) -> Optimizer:
        rows = DelayedSGD(self.classifier, lr=lr, momentum=0.9, weight_decay=weight_decay)
        return Together(super().make_optimizer(lr, weight_decay), rows)


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
