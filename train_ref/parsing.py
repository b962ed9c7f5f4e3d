"""Command lines from functions: arguments are options, docstrings are their help."""

from __future__ import annotations

import inspect
import math
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import restricted_number_type

# Training with an infinite rate or temperature would end in NaN; jsonargparse's own types let infinity pass.
PositiveFinite = restricted_number_type("PositiveFinite", float, [(">", 0), ("<", math.inf)])
NonNegativeFinite = restricted_number_type("NonNegativeFinite", float, [(">=", 0), ("<", math.inf)])
# What the losses take; they would tell at the first step.
Temperature = restricted_number_type("Temperature", float, [(">=", 1e-6), ("<=", 1e6)])
LossWeight = restricted_number_type("LossWeight", float, [(">=", 0), ("<=", 1e6)])
PositiveLossWeight = restricted_number_type("PositiveLossWeight", float, [(">", 0), ("<=", 1e6)])
Fraction = restricted_number_type("Fraction", float, [(">", 0), ("<=", 1)])
# Every generator of random numbers takes 32 bits; Lightning's refuse more.
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help with types and defaults, whose descriptions keep their lines.

    Argparse's own formatters apply the operator % to every text, and a docstring's "60 % of the steps" would
    be an error. How options are told comes from jsonargparse's, which takes only `%(name)s` for a place.
    """

    def _get_type_str(self, action: Action) -> str | None:
        told = super()._get_type_str(action)
        return None if told and told.startswith("Literal[") else told  # the choices stand before it


def examples_text(called: str, examples: Sequence[str]) -> str:
    """The end of a help: calls to try, a line each."""
    return "\n  ".join(["examples:", *(f"{called} {example}".rstrip() for example in examples)])


def empty_parser(called: str, description: str, examples: str) -> ArgumentParser:
    """A parser without arguments yet, which raises ArgumentError where others exit.

    Args:
        called: what the user writes before the arguments.
        description: for the help.
        examples: its end.
    """
    return ArgumentParser(
        prog=called,
        description=description,
        epilog=examples,
        formatter_class=Help,
        allow_abbrev=False,
        exit_on_error=False,
    )


def parser_of(function: Callable[..., Any], called: str, examples: Sequence[str] = ()) -> ArgumentParser:
    """The parser of a function's arguments; what it parses is ready to be passed as keyword arguments.

    Args:
        function: with type hints, and a docstring in Google's style; or an object that, when called, also
            takes the arguments of a function, its attribute `describe`, whose docstring is the help.
        called: what the user writes before the arguments.
        examples: arguments that are worth a try.
    """
    described = getattr(function, "describe", function)
    description = (inspect.getdoc(described) or "").partition("\n\nArgs:")[0]
    parser = empty_parser(called, description, examples_text(called, examples))
    parser.add_function_arguments(described, as_positional=True, as_group=False)
    if described is not function:
        parser.add_method_arguments(type(function), "__call__", as_group=False)
    return parser
