"""Every command explains itself, and the calls that its help shows are calls that it takes."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from train_ref import __main__ as command_line
from train_ref import report, training
from train_ref.commands import COMMANDS, STUDIES, Command
from train_ref.parsing import parser_of
from train_ref.training import recipe_names

from .conftest import RECIPES

CALLS = [[name] for name in COMMANDS] + [["study", name] for name in STUDIES]
RUNNABLE = [call for call in CALLS if call != ["study"]]


def command_of(call: list[str]) -> Command:
    *groups, name = call
    return (STUDIES if groups else COMMANDS)[name]


@pytest.fixture
def help_of(train_ref, capsys):
    def run(*call: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            train_ref(*call, "--help")
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return run


def examples_in(text: str) -> list[str]:
    _, found, examples = text.partition("\nexamples:\n")
    assert found
    return [line.strip() for line in examples.splitlines()]


@pytest.mark.parametrize("call", RUNNABLE, ids=" ".join)
def test_every_command_has_a_help_with_description_options_and_examples(help_of, call):
    text = help_of(*call)
    usage, description, *_ = text.split("\n\n")
    program = f"python -m train_ref {' '.join(call)}"
    assert usage.startswith(f"usage: {program}")
    assert description[0].isupper()
    assert description.endswith(".")
    assert "--" in text
    assert len(text.splitlines()) < 240  # a few screens
    examples = examples_in(text)
    assert 1 <= len(examples) <= 3
    assert all(example.startswith(program) for example in examples)


@pytest.mark.parametrize("call", RUNNABLE, ids=" ".join)
def test_the_examples_of_a_help_are_understood(help_of, train_ref, monkeypatch, tmp_path, call):
    command, ran = command_of(call), []
    monkeypatch.setattr(
        training.ReferenceCLI, "fit", lambda self, **settings: ran.append(self), raising=False
    )
    monkeypatch.setattr(report, "put", lambda source, target: ran.append(target) or [])
    for example in examples_in(help_of(*call)):
        words = shlex.split(example)[len(call) + 3 :]  # after python -m train_ref
        if command.parses:
            train_ref(*call, *words)
        else:
            ran.append(parser_of(command.function(), "").parse_args(words))
    assert len(ran) == len(command.examples)


@pytest.mark.parametrize(("call", "commands"), [([], COMMANDS), (["study"], STUDIES)], ids=["all", "study"])
def test_the_commands_are_listed_with_a_line_each(help_of, call, commands):
    text = help_of(*call)
    assert f"{{{','.join(commands)}}}" in text.partition("\n\n")[0]  # the usage
    for name, command in commands.items():
        assert f"  {name} " in text
        assert command.purpose in " ".join(text.split())


def test_the_list_of_commands_comes_at_once():
    """Nothing is imported for it that takes time."""
    code = (
        "import sys, train_ref.__main__; assert not {'torch', 'lightning', 'jsonargparse'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=RECIPES.parents[1], check=True)


@pytest.mark.parametrize("call", [[], ["linear"], ["fit"]], ids=" ".join)
def test_help_in_a_narrow_terminal(help_of, monkeypatch, call):
    monkeypatch.setenv("COLUMNS", "80")
    assert help_of(*call).startswith("usage: python -m train_ref")


def test_sampling_is_the_study_of_that_name(help_of):
    assert COMMANDS["sampling"] is STUDIES["sampling"]
    assert help_of("sampling").replace("train_ref sampling", "train_ref study sampling").split() == (
        help_of("study", "sampling").split()
    )


def test_percent_signs_are_prose(capsys):
    def function(share: str = "10 %", other: str = "%s") -> None:
        """Takes 60 % of all.

        Args:
            share: after 60 % and a tenth %(of) it, 100%.
            other: %d
        """

    with pytest.raises(SystemExit):
        parser_of(function, "it", ["--share '1 %'"]).parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Takes 60 % of all." in text
    assert "after 60 % and a tenth %(of) it, 100%. (type: str, default: 10 %)" in text
    assert "%d (type: str, default: %s)" in text
    assert text.endswith("it --share '1 %'")


@pytest.mark.parametrize(
    ("started_as", "called"),
    [
        ("/somewhere/bin/contrastive-ops-train", "contrastive-ops-train"),
        ("C:\\Scripts\\contrastive-ops-train.exe", "contrastive-ops-train"),
        ("/somewhere/train_ref/__main__.py", "python -m train_ref"),
    ],
)
def test_help_names_the_program_as_it_was_started(help_of, monkeypatch, started_as, called):
    monkeypatch.setattr(sys, "argv", [started_as])
    assert help_of().startswith(f"usage: {called} ")
    text = help_of("knn")
    assert text.startswith(f"usage: {called} knn ")
    assert all(example.startswith(f"{called} knn ") for example in examples_in(text))
    with pytest.raises(SystemExit, match=f"error: a command is missing: {called} takes one of fit, "):
        command_line.main([])


def test_fit_lists_the_recipes(help_of):
    words = help_of("fit").replace(",", " ").split()
    assert set(recipe_names()) <= set(words)
    assert {"--model.temperature", "--data.dataset", "--ckpt_path", "--evaluation.k"} <= set(words)


def test_what_is_not_installed_is_named(train_ref, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    for name in [name for name in sys.modules if name.startswith("train_ref.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"torchvision is missing.*contrastive-ops\[train\]"):
        train_ref("knn", "last.ckpt")
