"""What a run that goes on from a checkpoint must have as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import UsageError

OPTIMIZER = "the optimizer goes on with the checkpoint's"
POSITION = "the checkpoint's place in the epoch is counted in these images, batch by batch"
SCHEDULE = "the learning rate follows steps, of which an epoch would have another number"

# Options, and why another value than the checkpoint's is refused: it would be ignored without a word, or the
# rest of an epoch would have images twice or not at all. What is not here may change: it takes effect from
# the checkpoint on (augmentation, temperature), or nothing depends on it (workers, processes). Folders are
# compared by what is in them, wherever they are.
FIXED = {
    "seed_everything": "views and their order go on with the checkpoint's",
    "model.optimizer": OPTIMIZER,
    "model.learning_rate": OPTIMIZER,
    "model.weight_decay": OPTIMIZER,
    "model.seed": "what is drawn by it at the start comes from the checkpoint",
    "data.dataset": POSITION,
    "data.root": POSITION,
    "data.synthetic_seed": POSITION,
    "data.synthetic_size": POSITION,
    "data.image_size": POSITION,  # of synthetic images, which are others of another size
    "data.batch_size": POSITION,
    "trainer.limit_train_batches": SCHEDULE,
    "trainer.accumulate_grad_batches": SCHEDULE,
}


def refuse_changes(came: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """Compare settings by the names in `FIXED`; one that either side lacks is not compared.

    Args:
        came: the run's that is to go on.
        kept: the checkpoint's.

    Raises:
        UsageError: one differs.
    """
    for name, reason in FIXED.items():
        if name in came and name in kept and came[name] != kept[name]:
            raise UsageError(
                f"{name} is {came[name]}, but the run of the checkpoint has {kept[name]}: {reason}; to go on "
                "from it, leave this as it was"
            )


def of_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A method's arguments, by the names of their options."""
    return {f"model.{name}": value for name, value in settings.items()}


def of_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Views` that its images and their batches depend on, by the names of their options.
    What is in a folder shows only when it is opened."""
    names = ["dataset", "batch_size"]
    if settings.get("dataset") == "synthetic":
        names += ["synthetic_seed", "synthetic_size", "image_size"]
    return {f"data.{name}": settings[name] for name in names if name in settings}


def of_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells of its run."""
    state = checkpoint.get("Views", {})  # of the images
    return {
        **of_model(checkpoint["hyper_parameters"]),
        **of_data(checkpoint["datamodule_hyper_parameters"]),
        **({"seed_everything": state["seed"]} if "seed" in state else {}),
    }
