"""The command ``fit``: Lightning's command line, and what every run here does besides training."""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from .backbones import read_checkpoint
from .callbacks import Evaluation, Record
from .checkpoints import AtomicCheckpointIO, LastCheckpoint
from .data import Views
from .errors import UsageError
from .methods import ALIASES, METHODS, method_name, settings_of
from .parsing import Help
from .progress import Plan, lines_in_place_of_a_bar
from .resuming import of_checkpoint, of_data, of_model, refuse_changes

CONFIG = ("--config", "-c")
RECIPES = Path(__file__).with_name("recipes")

DESCRIPTION = """\
Trains a method as a recipe says, and evaluates its features.

A recipe is a file in YAML, or the name of one of these, which come with the package:

{recipes}

--method takes another method than the recipe's: its paper's settings then outrank the recipe's, and options
outrank both. All options of Lightning's Trainer work, also the many not listed here: --trainer.<name>."""

# What the help says of Lightning's own options. Those of the trainer that are not here work too, unmentioned.
HELP = {
    "config": "a recipe's name, or a file; of several, the later outrank the earlier",
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
    """Lightning's command line of a method, with one subcommand, `fit`.

    Args:
        method: a name in `METHODS`.
        **settings: arguments of `LightningCLI`.
    """

    def __init__(self, method: str, **settings: Any) -> None:
        self.method = method
        super().__init__(
            METHODS[method].kind,
            Views,
            trainer_defaults={
                "callbacks": [Plan(method), Record()],
                "devices": 1,
                "enable_model_summary": False,
            },
            auto_configure_optimizers=False,
            **settings,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"] | {"weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--method",
            choices=[*METHODS, *ALIASES],
            default=self.method,
            help="what is trained; --model has its options",
        )
        parser.set_defaults({f"model.{name}": value for name, value in METHODS[self.method].settings.items()})
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")

    def setup_parser(self, *args: Any) -> None:
        super().setup_parser(*args)
        for action in self._parser("fit")._actions:
            if action.dest in HELP or action.dest.startswith("trainer."):
                action.help = HELP.get(action.dest, SUPPRESS)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(args)
        settings = self.config.fit
        if not settings.config:
            raise UsageError("fit needs --config: a recipe's name, or a file of your own")
        if settings.ckpt_path is None:
            return
        try:
            checkpoint = read_checkpoint(Path(settings.ckpt_path))
        except UsageError as error:
            raise UsageError(f"ckpt_path: {error}") from error
        kind, wanted = checkpoint["method"], METHODS[self.method].kind.name
        if kind != wanted:
            raise UsageError(f"ckpt_path: {settings.ckpt_path} is a checkpoint of {kind}, not of {wanted}")
        came = {**of_model(settings.model.as_dict()), **of_data(settings.data.as_dict())}
        if not isinstance(settings.seed_everything, bool):  # which draws one
            came["seed_everything"] = settings.seed_everything
        refuse_changes(came, of_checkpoint(checkpoint))

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        trainer = super().instantiate_trainer(
            plugins=[AtomicCheckpointIO()], use_distributed_sampler=False, **settings
        )
        lines_in_place_of_a_bar(trainer)
        if isinstance(trainer.strategy, DDPStrategy):
            # Queues and classifiers are the same everywhere. To send them around would cost more than a step.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            trainer.strategy._ddp_kwargs.setdefault(name, False)
        return trainer


def fit(args: list[str], called: str, examples: str) -> None:
    """Train as a command line says.

    Args:
        args: its words.
        called: what stands before them.
        examples: of command lines, to be shown at the end of the help.
    """
    args = with_method(with_recipes(args))
    recipes = textwrap.indent(textwrap.fill(", ".join(recipe_names()), 100), "  ")
    ReferenceCLI(
        method_of(args),
        parser_kwargs={
            "allow_abbrev": False,
            "exit_on_error": False,
            "formatter_class": Help,
            "fit": {
                "allow_abbrev": False,
                "exit_on_error": False,
                "description": DESCRIPTION.format(recipes=recipes),
                "usage": f"{called} --config RECIPE [--ckpt_path CHECKPOINT] [options]",
                "epilog": examples,
            },
        },
        args=["fit", *args],
    )


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe_file(given: str) -> str:
    """A file of the user or, where there is none, the package's recipe of that name, .yaml or not."""
    if Path(given).is_file():
        return given
    name, names = given.removesuffix(".yaml"), recipe_names()
    if name not in names:
        raise UsageError(
            f"config: there is no file {given}, and no recipe of that name; there are {', '.join(names)}"
        )
    return str(RECIPES / f"{name}.yaml")


def with_recipes(args: list[str]) -> list[str]:
    """The words of a command line, with every recipe's name replaced by its file."""
    words = []
    for before, word in zip([None, *args], args, strict=False):
        option, equals, value = word.partition("=")
        if before in CONFIG:
            word = recipe_file(word)
        elif option in CONFIG and equals:
            word = f"{option}={recipe_file(value)}"
        words.append(word)
    return words


def with_method(args: list[str]) -> list[str]:
    """The words of a command line where --method, if it names another method than the recipe, brings all
    that sets the methods of its kind apart: behind the recipe, which they outrank."""
    option, recipe = methods_named(args)
    if option is None or recipe is None or method_name(option) == method_name(recipe):
        return args
    words = [
        f"--model.{name}={'null' if value is None else value}"
        for name, value in settings_of(method_name(option)).items()
    ]
    behind = max(place for place, word in enumerate(args) if word.partition("=")[0] in CONFIG)
    behind += 1 if "=" in args[behind] else 2
    return [*args[:behind], *words, *args[behind:]]


def method_of(args: list[str]) -> str:
    """The method that --method or a recipe names: it decides the options that can be parsed at all."""
    option, recipe = methods_named(args)
    return method_name(option or recipe or "moco_v2_co2")


def methods_named(args: list[str]) -> tuple[str | None, str | None]:
    """What --method says, and the last recipe that says it."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    parser.add_argument("--method")
    known, _ = parser.parse_known_args(args)
    said = []
    for recipe in reversed(known.config):
        # Parsing will complain of what is no recipe.
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, AttributeError):
            said.append(yaml.safe_load(Path(recipe).read_text(encoding="utf-8")).get("method"))
    return known.method, next((name for name in said if isinstance(name, str)), None)
