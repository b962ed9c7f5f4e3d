"""The command line: ``python -m train_ref fit --config train_ref/recipes/<name>.yaml``, and others."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import warnings
from argparse import SUPPRESS, ArgumentError, ArgumentParser, RawDescriptionHelpFormatter
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import jsonargparse
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel

from .callbacks import Evaluation, Record
from .checkpoints import AtomicCheckpointIO, LastCheckpoint
from .data import Views
from .errors import UsageError, one_line
from .methods import METHODS
from .runs import run_directory

DESCRIPTION = """\
Trains a network by contrast of augmented views, and evaluates its features.

  fit                    trains, as a recipe says
  knn, linear, finetune  evaluate a checkpoint
  export                 writes a checkpoint's backbone for other programs
  validate               shows that the fused losses train as eager PyTorch does
  study                  repeats a result of the papers on digits

Each has its own --help."""

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
        parser.add_argument(
            "--method", choices=METHODS, default="moco", help="what is trained; --model has its options"
        )
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
        if checkpoint is None:
            return
        if not is_zipfile(checkpoint):  # as torch.save writes them
            raise UsageError(f"ckpt_path: there is no checkpoint {checkpoint}, or not a whole one")
        method = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True).get("method")
        if method != self.config.fit.method:
            raise UsageError(
                f"ckpt_path: {checkpoint} is a checkpoint of {method or 'something else'}, "
                f"not of {self.config.fit.method}"
            )

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        trainer = super().instantiate_trainer(
            plugins=[AtomicCheckpointIO()], use_distributed_sampler=False, **settings
        )
        if isinstance(trainer.strategy, DDPStrategy):
            # Queues and classifiers are the same everywhere. To send them around would cost more than a step.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            trainer.strategy._ddp_kwargs.setdefault(name, False)
        return trainer

    def before_fit(self) -> None:
        print(f"Training; everything is kept in {run_directory(self.trainer)}", flush=True)


def method_of(args: list[str]) -> str:
    """What --method or the recipes say, which decides the options that can be parsed at all."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    parser.add_argument("--method")
    known, _ = parser.parse_known_args(args)
    said = [known.method]
    for recipe in reversed(known.config):
        with contextlib.suppress(
            OSError, ValueError, yaml.YAMLError, AttributeError
        ):  # which parsing will complain of
            said.append(yaml.safe_load(Path(recipe).read_text(encoding="utf-8")).get("method"))
    return next((method for method in said if method in METHODS), "moco")


# What the other commands are: functions, whose arguments are the options.
COMMANDS = {
    "knn": "evaluate",
    "linear": "evaluate",
    "finetune": "evaluate",
    "export": "evaluate",
    "validate": "validate",
}


def run_command(name: str, args: list[str]) -> None:
    """``python -m train_ref <name> [options]``."""
    if name == "study":
        from .studies import STUDIES

        if not args or args[0] not in STUDIES:
            raise UsageError(f"study needs the name of one: {', '.join(STUDIES)}")
        name, args = f"study {args[0]}", args[1:]
        function = STUDIES[name.removeprefix("study ")]
    else:
        function = getattr(import_module(f".{COMMANDS[name]}", __package__), name)
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m train_ref {name}",
        description=inspect.getdoc(function).partition("\n\nArgs:")[0],
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_function_arguments(function, as_positional=True)
    function(**parser.parse_args(args).as_dict())


def main(args: list[str] | None = None) -> None:
    given = sys.argv[1:] if args is None else args
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no news of absent devices
    warnings.filterwarnings("ignore", message=".*LeafSpec", module="lightning")
    try:
        if given and (given[0] in COMMANDS or given[0] == "study"):
            run_command(given[0], given[1:])
            return
        ReferenceCLI(
            METHODS[method_of(given)],
            Views,
            trainer_defaults={"callbacks": [Record()], "devices": 1, "enable_model_summary": False},
            auto_configure_optimizers=False,
            parser_kwargs={
                "description": DESCRIPTION,
                "formatter_class": RawDescriptionHelpFormatter,
                "allow_abbrev": False,
                "exit_on_error": False,
                "fit": {
                    "allow_abbrev": False,
                    "exit_on_error": False,
                    "description": "Trains as a recipe says; options change its settings. All options of "
                    "Lightning's Trainer work, also the many not listed here: --trainer.<name>.",
                    "usage": "python -m train_ref fit --config RECIPE [--ckpt_path CHECKPOINT] [options]",
                },
            },
            args=args,
        )
    except (ArgumentError, MisconfigurationException, UsageError) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
