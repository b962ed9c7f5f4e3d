"""The examples of docs/examples run, and their pages tell what they print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

examples = pytest.importorskip("bench.examples")  # without matplotlib there are no pictures
pytest.importorskip("sklearn")
pytest.importorskip("rocksdict")

EXAMPLES = sorted(examples.EXAMPLES.glob("*.py"))


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> Iterator[None]:
    """An example sets the number of threads and the seed, as programs do."""
    threads, numbers = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_a_page_tells_what_its_example_prints(example: Path, tmp_path: Path) -> None:
    page = examples.page(example, tmp_path, "this machine")
    written = example.with_suffix(".md").read_text(encoding="utf-8")
    assert examples.comparable(written) == examples.comparable(page)
    for picture in tmp_path.iterdir():
        assert (examples.FIGURES / picture.name).exists(), f"it lacks {picture.name}"


def test_there_is_a_page_for_every_example_and_no_other() -> None:
    pages = sorted(page.stem for page in examples.EXAMPLES.glob("*.md"))
    assert pages == [example.stem for example in EXAMPLES] != []


CELLS = """\
# %% [markdown]
# # A title
#
# Text.

# %%
from time import perf_counter_ns

# %% tags=["measured"]
print(f"{perf_counter_ns()} ns")
"""


def page_of(folder: Path, content: str, machine: str = "a machine") -> str:
    example = folder / "example.py"
    example.write_text(content, encoding="utf-8")
    return examples.page(example, folder, machine)


def test_a_page_has_text_code_and_outputs_in_their_order(tmp_path: Path) -> None:
    page = page_of(tmp_path, CELLS)
    parts = ("# A title\n\nText.\n", "```python\nfrom time", "```python\nprint(", " ns\n```\n", "a machine\n")
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    assert "# %%" not in page


def test_runs_may_differ_in_what_was_measured(tmp_path: Path) -> None:
    one, other = (page_of(tmp_path, CELLS, machine) for machine in ("one machine", "another"))
    assert one != other
    assert examples.comparable(one) == examples.comparable(other)
    assert examples.comparable(one) != examples.comparable(one.replace(" ns\n```", " ms\n```"))


def test_runs_may_not_differ_in_anything_else(tmp_path: Path) -> None:
    content = CELLS.replace(' tags=["measured"]', "")
    one, other = (page_of(tmp_path, content) for _ in range(2))
    assert examples.comparable(one) != examples.comparable(other)


def test_pictures_are_of_their_cells(tmp_path: Path) -> None:
    drawing = '# %%\nimport matplotlib.pyplot as plt\nplt.figure().suptitle("{}")\nplt.show()\n'
    page = page_of(tmp_path, drawing.format("One") + drawing.format("Two"))
    shown = re.findall(r"!\[(\w+)\]\(\.\./figures/(.+)\)", page)
    assert [title for title, _ in shown] == ["One", "Two"]
    assert sorted(name for _, name in shown) == sorted(file.name for file in tmp_path.glob("*.png"))


@pytest.mark.parametrize("content", ["x = 1\n# %%\n", "", "# %% a name\nx = 1\n", "# %% [raw]\n# x\n"])
def test_a_file_of_other_cells_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cell"):
        page_of(tmp_path, content)


def test_an_error_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        page_of(tmp_path, CELLS + "\n# %%\nx = 1\nx / 0\n")
    assert raised.traceback[-1].lineno + 1 == CELLS.count("\n") + 4
