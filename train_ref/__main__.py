"""The command line: ``python -m train_ref fit --config train_ref/recipes/<name>.yaml``."""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import SUPPRESS, ArgumentError
from typing import Any
from zipfile import is_zipfile

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .callbacks import Curves, Evaluation
from .checkpoints import AtomicCheckpointIO, LastCheckpoint
from .data import Views
from .errors import UsageError
from .moco import MoCo
from .runs import run_directory

# What the help says of Lightning's own options. Those of the trainer that are not here work too, unmentioned.
HELP = {
    "ckpt_path": "go on from this checkpoint",
    "seed_everything": "seed of all random numbers; true draws one",
    "trainer.accelerator": "cpu, gpu, or auto",
    "trainer.accumulate_grad_batches": "batches a step of the optimizer",
    "trainer.devices": "how many devices, or which",
    "trainer.log_every_n_steps": "how often values go to the logger",
    "trainer.logger": "by default TensorBoard's, under lightning_logs",
    "trainer.max_epochs": "end of the training",
    "trainer.max_steps": "end of the training, if that comes first",
    "trainer.precision": "32-true, bf16-mixed or 16-mixed, among others",
}


class ReferenceCLI(LightningCLI):
    """Lightning's command line with one subcommand, `fit`, and what every run here does besides training."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"] | {"weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")

    def setup_parser(self, *args: Any) -> None:
        super().setup_parser(*args)
        for action in self._parser("fit")._actions:
            if action.dest in HELP or action.dest.startswith("trainer."):
                action.help = HELP.get(action.dest, SUPPRESS)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        if not (self.config.fit.config or self.config.config):
            raise UsageError("fit needs --config: one of train_ref/recipes, or your own")
        checkpoint = self.config.fit.ckpt_path
        if checkpoint is not None and not is_zipfile(checkpoint):  # as torch.save writes them
            raise UsageError(f"ckpt_path: there is no checkpoint {checkpoint}, or not a whole one")

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        return super().instantiate_trainer(plugins=[AtomicCheckpointIO()], **settings)

    def before_fit(self) -> None:
        print(f"Training; everything is kept in {run_directory(self.trainer)}", flush=True)


def main(args: ArgsType = None) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no news of absent devices
    warnings.filterwarnings("ignore", message=".*LeafSpec", module="lightning")
    try:
        ReferenceCLI(
            MoCo,
            Views,
            trainer_defaults={"callbacks": [Curves()], "devices": 1, "enable_model_summary": False},
            auto_configure_optimizers=False,
            parser_kwargs={
                "description": "Trains a network by contrast of augmented views, and evaluates its features.",
                "exit_on_error": False,
                "fit": {
                    "exit_on_error": False,
                    "description": "Trains as a recipe says; options change its settings. All options of "
                    "Lightning's Trainer work, also the many not listed here: --trainer.<name>.",
                    "usage": "python -m train_ref fit --config RECIPE [--ckpt_path CHECKPOINT] [options]",
                },
            },
            args=args,
        )
    except (ArgumentError, MisconfigurationException, UsageError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()
