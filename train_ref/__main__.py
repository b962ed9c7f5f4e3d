"""The command line: ``python -m train_ref fit --config digits_moco_v2_co2``, and others."""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentError, ArgumentParser
from collections.abc import Mapping

from .commands import COMMANDS, Command
from .errors import UsageError, library_errors, named_file, one_line
from .output import lasting_output

DESCRIPTION = (
    "Trains networks by contrast of augmented views with fused losses, and evaluates their features."
)
SCRIPT = "contrastive-ops-train"  # as the package is installed


def program() -> str:
    """What the user calls this."""
    return SCRIPT if sys.argv[0].removesuffix(".exe").endswith(SCRIPT) else f"python -m {__package__}"


def main(args: list[str] | None = None) -> None:
    """Run what a command line says; of a mistake in it, tell a line and exit.

    Args:
        args: the words of the command line, without the program's name; by default those it was started with.
    """
    warnings.filterwarnings("ignore", message=".*LeafSpec", module="lightning")
    try:
        with lasting_output():
            run(COMMANDS, program(), "command", DESCRIPTION, sys.argv[1:] if args is None else args)
    except (ArgumentError, UsageError, *library_errors()) as error:
        sys.exit(f"error: {one_line(error)}")
    except ModuleNotFoundError as error:
        if error.name is None:  # as Lightning tells what one of its own options needs
            sys.exit(f"error: {one_line(error)}")
        missing, *_ = error.name.split(".")
        if missing in (__package__, "contrastive_ops"):
            raise
        sys.exit(f"error: {missing} is missing: the trainer needs pip install 'contrastive-ops[train]'")
    except OSError as error:
        if not (file := named_file(error)):
            raise
        sys.exit(f"error: {file}: {error.strerror}")


def run(commands: Mapping[str, Command], called: str, kind: str, description: str, args: list[str]) -> None:
    """Run the one of the commands that the first word names, with the others as its arguments.

    Args:
        commands: by name.
        called: what the user has written before these words.
        kind: what one of the commands is called.
        description: of all of them, for the help.
        args: the words.
    """
    if args and args[0] in ("-h", "--help"):
        overview(commands, called, kind, description).parse_args(["--help"])
    if not args or args[0] not in commands:
        wrong = f"there is no {kind} {args[0]}" if args else f"a {kind} is missing"
        raise UsageError(f"{wrong}: {called} takes one of {', '.join(commands)}")
    name, *rest = args
    command, called = commands[name], f"{called} {name}"
    if command.choices:
        return run(command.choices, called, name, f"A {name} {command.purpose}.", rest)
    from .parsing import examples_text, parser_of  # jsonargparse takes a while

    function = command.function()
    # No news of absent devices. Lightning, where it has just been imported, has set another level.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if command.parses:
        function(rest, called, examples_text(called, command.examples))
    else:
        # Only what was said: the function has defaults of its own, and a resumed run those it began with.
        parser = parser_of(function, called, command.examples)
        function(**parser.parse_args(rest, defaults=False).as_dict())


def overview(commands: Mapping[str, Command], called: str, kind: str, description: str) -> ArgumentParser:
    """A parser that does nothing but help: it lists the commands."""
    help_of_one = f"{called} {kind.upper()} --help"
    parser = ArgumentParser(prog=called, description=description, epilog=f"More of each: {help_of_one}")
    listed = parser.add_subparsers(title=f"what a {kind} is for")
    for name, command in commands.items():
        listed.add_parser(name, help=command.purpose.replace("%", "%%"), add_help=False)
    return parser


if __name__ == "__main__":
    main()
