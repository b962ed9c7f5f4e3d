"""What README and docs tell people to type works: Python blocks as they stand, commands as far as they
parse."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs/examples"  # each of these pages is one program: tests/test_examples.py runs it
DOCUMENTS = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent != EXAMPLES),
    *ROOT.glob("CONTRIBUTING.md"),
]
LOOPS = ["co2_loss(", "conic_loss("]
EPOCHS = "range(20)"


def blocks(language: str) -> list[Any]:
    """Every fenced block of that language in the documents."""
    found = []
    for document in DOCUMENTS:
        fenced = re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
        found += [pytest.param(text, id=f"{document.stem}-{place}") for place, text in enumerate(fenced)]
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The networks are so small that more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(code: str, epochs: int = 20) -> tuple[dict[str, Any], str]:
    """A block in a namespace of its own: what it defined, and what it printed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code.replace(EPOCHS, f"range({epochs})"), "README.md", "exec"), namespace)
    return namespace, printed.getvalue()


def loop(call: str) -> str:
    """README's training loop with that call."""
    every = (block.values[0] for block in blocks("python"))
    (code,) = (code for code in every if call in code and code.count(EPOCHS) == 1)
    return code


def moved(before: torch.nn.Module, after: torch.nn.Module) -> list[float]:
    """How far each parameter has gone, relative to where it was."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return [((y - x).norm() / x.norm().clamp(min=1e-3)).item() for x, y in pairs]


def numbers(name: str, printed: str) -> list[float]:
    """The values that a loop printed, an epoch each."""
    return [float(number) for number in re.findall(rf"{name} (\d+\.\d+)", printed)]


@pytest.mark.parametrize("code", [block for block in blocks("python") if EPOCHS not in block.values[0]])
def test_short_blocks_run(code: str) -> None:
    run(code)


def test_long_blocks_are_the_loops() -> None:
    long = [block.values[0] for block in blocks("python") if EPOCHS in block.values[0]]
    assert [call for code in long for call in LOOPS if call in code] == LOOPS


@pytest.mark.parametrize(("mixed_precision", "epochs"), [(False, 8), (True, 4)])
def test_the_moco_loop_trains_both_encoders(mixed_precision: bool, epochs: int) -> None:
    pytest.importorskip("sklearn")
    code = loop("co2_loss(")
    assert code.count("mixed_precision = False") == 1
    code = code.replace("mixed_precision = False", f"mixed_precision = {mixed_precision}")
    start, _ = run(code, epochs=0)
    end, printed = run(code, epochs)

    assert min(moved(start["encoder"], end["encoder"])) > 1e-3
    assert min(moved(start["momentum_encoder"], end["momentum_encoder"])) > 1e-4
    assert min(moved(end["encoder"], end["momentum_encoder"])) > 1e-5  # it lies behind
    losses = numbers("loss", printed)
    assert len(losses) == epochs
    assert losses[-1] < losses[1] - 0.3  # the first epoch replaces the queue's random keys by real ones
    assert numbers("top-1", printed)[-1] > 0.2  # of 1025 keys
    assert end["queue"].pointer.item() == epochs * 14 * 128 % 1024


def test_the_conic_loop_trains_encoder_and_classifier() -> None:
    pytest.importorskip("sklearn")
    code = loop("conic_loss(")
    start, _ = run(code, epochs=0)
    end, printed = run(code, epochs=6)

    assert min(moved(start["encoder"], end["encoder"])) > 1e-3
    before, after = (each["classifier"].read(torch.arange(1797))[0] for each in (start, end))
    assert ((after - before).norm(dim=1) > 1e-3).all()  # of every instance, active or not
    losses = numbers("loss", printed)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 1


def commands() -> list[str]:
    """The lines of shell blocks, without comments."""
    lines = (line for block in blocks("sh") for line in block.values[0].splitlines())
    return list(dict.fromkeys(" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()))


def understand(words: list[str]) -> None:
    """Parses a command of the trainer without running it."""
    from train_ref.__main__ import main
    from train_ref.commands import COMMANDS
    from train_ref.parsing import parser_of

    command, rest = COMMANDS[words[0]], words[1:]
    if words[0] == "fit":
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--print_config"])
        assert stopped.value.code == 0
        return
    if command.choices:
        command, rest = command.choices[rest[0]], rest[1:]
    parser_of(command.function(), words[0]).parse_args(rest)


@pytest.mark.parametrize("command", [each for each in commands() if each])
def test_commands_are_what_they_are_called(command: str) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "make":
        if not (ROOT / "Makefile").exists():
            pytest.skip("the Makefile is in the source only")
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "contrastive-ops-train" or words[:3] == ["python", "-m", "train_ref"]:
        pytest.importorskip("lightning")
        understand(words[1:] if words[0] == "contrastive-ops-train" else words[3:])
    elif words[0] == "torchrun":
        pytest.importorskip("lightning")
        _, module, *rest = words[words.index("-m") :]
        assert module == "train_ref"
        understand(rest)
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), f"there is no module {words[2]}"
    else:
        assert words[:2] == ["pip", "install"]  # as the Makefile and continuous integration do
