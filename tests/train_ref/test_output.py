"""What is printed never stops the work."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from train_ref.output import lasting_output


def stream(number: int, encoding: str = "utf-8") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_text_that_an_encoding_lacks_is_written_with_question_marks(monkeypatch, tmp_path, encoding):
    file = tmp_path / "told"
    with file.open("wb") as target:
        monkeypatch.setattr(sys, "stdout", stream(target.fileno(), encoding))
        with lasting_output():
            print("τ = 0.1")
    assert file.read_text(encoding=encoding) == ("τ = 0.1\n" if encoding == "utf-8" else "? = 0.1\n")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_work_goes_on_when_nobody_reads_any_more(monkeypatch, name):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, name, stream(writer))
    with lasting_output():
        print("one", file=getattr(sys, name), flush=True)
        assert os.read(reader, 100) == b"one\n"
        os.close(reader)
        print("two", file=getattr(sys, name), flush=True)
        print("three", file=getattr(sys, name))
    os.close(writer)


def test_that_standard_output_was_lost_is_told_when_the_work_is_done(monkeypatch):
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(sys, "stdout", stream(full.fileno()))
        done = []

        @lasting_output()
        def work():
            print("lost", flush=True)
            done.append("work")

        with pytest.raises(SystemExit, match="standard output could not be written: No space left"):
            work()
        assert done


def test_standard_output_may_be_closed_or_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_output():
        print("nowhere")
        assert not sys.stdout.isatty()
    assert sys.stdout is None
    replaced = io.StringIO()
    monkeypatch.setattr(sys, "stdout", replaced)
    with lasting_output():
        print("τ")
    assert replaced.getvalue() == "τ\n"


def test_files_are_written_and_read_in_utf_8():
    """Without an encoding, Python takes that of the locale."""
    package = Path(__file__).parents[2]
    for folder in ("train_ref", "bench"):
        for file in (package / folder).rglob("*.py"):
            for line in file.read_text(encoding="utf-8").splitlines():
                if ".read_text(" in line or ".write_text(" in line:
                    assert "utf-8" in line or "/proc/" in line, f"{file}: {line}"
