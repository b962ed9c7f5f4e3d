"""The command ``fit``: Lightning's command line, and what every run here does besides training."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import sys
import textwrap
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch.nn.parallel import DistributedDataParallel

from .backbones import read_checkpoint
from .callbacks import Evaluation, Record
from .checkpoints import AtomicCheckpointIO, LastCheckpoint
from .data import Views
from .errors import UsageError
from .files import write_text
from .limits import check_settings, check_trainer
from .methods import ALIASES, METHODS, method_name, settings_of
from .parsing import Help
from .progress import Plan, lines_in_place_of_a_bar
from .resuming import of_checkpoint, of_data, of_model, refuse_changes
from .runs import CONFIG_FILE, LATEST, latest_checkpoint, own_directory, run_directory

CONFIG = ("--config", "-c")
RECIPES = Path(__file__).with_name("recipes")
GROUPS = ("trainer", "model", "data", "evaluation", "checkpoint")
# What constructors raise that do not like their arguments.
BUILDING = (ImportError, MemoryError, OSError, OverflowError, RuntimeError, TypeError, ValueError)

DESCRIPTION = """\
Trains a method as a recipe says, and evaluates its features.

A recipe is a file in YAML, or the name of one of these, which come with the package:

{recipes}

A recipe is code: it may name any class that can be imported, as callback or logger, and that class runs. Take
recipes only from people whom you would trust with a program.

--method takes another method than the recipe's: its paper's settings then outrank the recipe's, and options
outrank both. All options of Lightning's Trainer work, also the many not listed here: --trainer.<name>."""

# What the help says of Lightning's own options. The trainer takes others too, which are not mentioned.
HELP = {
    "config": "a recipe's name, or a file; of several, the later outrank the earlier",
    "ckpt_path": "go on from this checkpoint; last: from the run's latest, or start if there is none",
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


class RecipeParser(LightningArgumentParser):
    """Reads recipes as UTF-8, whatever the locale's encoding is."""

    def parse_path(self, path: str, **settings: Any) -> Namespace:
        text = recipe_text(path)
        with contextlib.chdir(Path(path).parent):  # what a recipe names lies beside it
            return self.parse_string(text, path=Path(path).name, **settings)


class SaveConfig(SaveConfigCallback):
    """Keeps all settings in ``config.yaml`` in the run's directory, when the first step is about to begin.

    Lightning's own writes it earlier, in the encoding of the locale, and leaves half of it on a full disk.
    """

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.path = run_directory(trainer) / CONFIG_FILE

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            write_text(self.path, self.parser.dump(self.config, skip_none=False))


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
                # As many processes as torchrun has started, where it has.
                "devices": int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
                "num_nodes": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
                "enable_model_summary": False,
            },
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            parser_class=RecipeParser,
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
        seed = settings.seed_everything
        if not isinstance(seed, bool | None) and not 0 <= seed < 2**32:
            raise UsageError(f"seed_everything is {seed}: a seed is 0 or more, and less than 2**32")
        if settings.ckpt_path not in (None, LATEST):
            self._check_checkpoint(settings.ckpt_path)

    def _check_checkpoint(self, path: str) -> None:
        """Raise UsageError where a training of this method cannot go on from it."""
        try:
            checkpoint = read_checkpoint(Path(path))
        except UsageError as error:
            raise UsageError(f"ckpt_path: {error}") from error
        kind, wanted = checkpoint["method"], METHODS[self.method].kind.name
        if kind != wanted:
            raise UsageError(f"ckpt_path: {path} is a checkpoint of {kind}, not of {wanted}")
        settings = self.config.fit
        came = {**of_model(settings.model.as_dict()), **of_data(settings.data.as_dict())}
        if not isinstance(settings.seed_everything, bool):  # which draws one
            came["seed_everything"] = settings.seed_everything
        refuse_changes(came, of_checkpoint(checkpoint))

    def _parse_ckpt_path(self) -> None:
        """Lightning's would let the checkpoint's settings outrank what the options say, without a word."""

    def instantiate_classes(self) -> None:
        # Lightning's parser checks types. What their constructors refuse is a mistake in the options as well.
        try:
            super().instantiate_classes()
        except MisconfigurationException:
            raise  # it names its argument
        except BUILDING as error:
            raise UsageError(f"what the options ask for cannot be built: {error}") from error

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        given = self.config_init.fit.trainer
        check_settings(given)
        plugins = given.plugins or []
        trainer = super().instantiate_trainer(
            plugins=[AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])],
            use_distributed_sampler=False,
            **settings,
        )
        check_trainer(trainer, [*METHODS[self.method].kind.value_names(), *Evaluation.values])
        lines_in_place_of_a_bar(trainer)
        if isinstance(trainer.strategy, DDPStrategy):
            # Queues and classifiers are the same everywhere. To send them around would cost more than a step.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            trainer.strategy._ddp_kwargs.setdefault(name, False)
        started = int(os.environ.get("WORLD_SIZE", 1))
        if "TORCHELASTIC_RUN_ID" in os.environ and trainer.world_size != started:
            raise UsageError(
                f"trainer.devices and trainer.num_nodes make {trainer.world_size} processes, but torchrun "
                f"has started {started}"
            )
        return trainer

    def fit(self, ckpt_path: str | None, **settings: Any) -> None:
        """Train, in the place of the trainer's own `fit`."""
        if ckpt_path == LATEST:
            found = latest_checkpoint(self.trainer)
            ckpt_path = None if found is None else str(found)
            if found is not None:
                self._check_checkpoint(ckpt_path)
            rank_zero_only(print)(f"Going on from {found}" if found else "There is no checkpoint yet")
        with own_directory(self.trainer, None if ckpt_path is None else Path(ckpt_path)):
            try:
                self.trainer.fit(ckpt_path=ckpt_path, **settings)
            except SIGTERMException:  # before the first step; Lightning's exit status would be 0
                sys.exit(128 + signal.SIGTERM)


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


def recipe_text(path: str) -> str:
    """What stands in a recipe's file."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"config: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"config: {path} is no text in UTF-8, which a recipe is: {error}") from error


def recipe_settings(path: str) -> dict[str, Any]:
    """What a recipe's file says."""
    try:
        settings = yaml.safe_load(recipe_text(path))
    except yaml.YAMLError as error:
        raise UsageError(f"config: {path} is no YAML, which a recipe is: {error}") from error
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise UsageError(f"config: {path} holds {found}, where a recipe has settings by their names")
    try:
        json.dumps(settings, default=str, skipkeys=True)
    except ValueError as error:
        raise UsageError(f"config: {path} has an anchor that is part of itself") from error
    for name in GROUPS:
        if not isinstance(settings.get(name, {}), dict | str):  # text names a file of them
            raise UsageError(
                f"config: {path} has {settings[name]} for {name}, where it has settings by their names"
            )
    return settings


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
    said = [recipe_settings(recipe).get("method") for recipe in reversed(known.config)]
    return known.method, next((name for name in said if isinstance(name, str)), None)
