"""The command line: ``python -m train_ref fit --config train_ref/recipes/<name>.yaml``."""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentError
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .callbacks import Curves, Evaluation
from .checkpoints import AtomicCheckpointIO, LastCheckpoint
from .data import Views
from .errors import UsageError
from .moco import MoCo
from .runs import run_directory


class ReferenceCLI(LightningCLI):
    """Lightning's command line with one subcommand, `fit`, and what every run here does besides training."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")

    def before_instantiate_classes(self) -> None:
        checkpoint = self.config.fit.ckpt_path
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise UsageError(f"there is no checkpoint {checkpoint}")

    def instantiate_trainer(self, **settings: object) -> Trainer:
        return super().instantiate_trainer(plugins=[AtomicCheckpointIO()], **settings)

    def before_fit(self) -> None:
        print(f"Training; everything is kept in {run_directory(self.trainer)}", flush=True)


def main(args: ArgsType = None) -> None:
    for library in ("pytorch", "fabric"):  # they announce seeds, devices that are absent, and other products
        logging.getLogger(f"lightning.{library}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec", module="lightning")
    try:
        ReferenceCLI(
            MoCo,
            Views,
            trainer_defaults={"callbacks": [Curves()], "enable_model_summary": False},
            auto_configure_optimizers=False,
            parser_kwargs={
                "description": "Trains a network by contrast of augmented views, and evaluates its features.",
                "exit_on_error": False,
                "fit": {
                    "exit_on_error": False,
                    "usage": "python -m train_ref fit --config RECIPE [--ckpt_path CHECKPOINT] [options]",
                },
            },
            args=args,
        )
    except (ArgumentError, MisconfigurationException, UsageError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
