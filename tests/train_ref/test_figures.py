"""The figures of studies and validations have shared axes and one legend, and are functions of their JSON."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from train_ref import report
from train_ref.commands import STUDIES
from train_ref.figures import one_legend, save
from train_ref.validate import SMALLEST_DIFFERENCE, draw

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"


def kept(name: str) -> dict:
    return json.loads((FIGURES / f"{name}.json").read_text())


@functools.cache  # some take seconds
def figure_of(study: str) -> Figure:
    return STUDIES[study].function().figure(kept(study))


def legend_of(figure: Figure) -> list[str]:
    """The texts of the figure's one legend, of which no panel has another."""
    assert not [axes for axes in figure.axes if axes.get_legend()]
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def share(axis: str, *panels) -> bool:
    joined = getattr(panels[0], f"get_shared_{axis}_axes")()
    return all(joined.joined(one, other) for one, other in itertools.combinations(panels, 2))


@pytest.fixture(scope="module")
def validation():
    return draw(kept("validate-resnet18-float64"))


def test_differences_of_all_methods_have_one_scale_and_steps_are_shared(validation):
    verdicts = kept("validate-resnet18-float64")["verdicts"]
    differences = [axes for axes in validation.axes if axes.get_yscale() == "log"]
    curves = [axes for axes in validation.axes if axes.get_yscale() == "linear"]
    assert [axes.get_title() for axes in curves] == [verdict["method"] for verdict in verdicts]
    assert len(differences) == len(curves) == 10
    assert share("x", *validation.axes)
    assert share("y", *differences)
    assert not share("y", *curves[:2])
    bottom, top = differences[0].get_ylim()
    for axes, verdict in zip(differences, verdicts, strict=True):
        *lines, allowed = axes.get_lines()
        assert len(lines) == len(verdict["permuted"]) + 1
        assert list(allowed.get_ydata()) == [1e-8, 1e-8]
        assert all(bottom <= SMALLEST_DIFFERENCE <= y <= top for line in lines for y in line.get_ydata())


def test_a_validation_has_one_legend_and_says_what_is_seen(validation):
    assert legend_of(validation) == ["eager", "fused", "eager, other order of keys", "what validate allows"]
    said = " ".join(validation.get_suptitle().split())
    assert said.startswith("A resnet18 trains 100 steps in float64")
    assert "differ by 6e-15 at most" in said
    assert "are 5e-10 apart at most" in said


def test_in_float32_it_says_that_curves_part():
    figure = draw(kept("validate-resnet18"))
    assert "what validate allows" not in legend_of(figure)
    assert figure.get_suptitle().endswith("until all curves part.")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_one_legend_and_its_title(name):
    figure = figure_of(name)
    told = legend_of(figure)
    assert len(told) == len(set(told)) >= 2
    assert figure.get_suptitle()


@pytest.mark.parametrize("name", ["co2", "simclr"])
def test_rows_of_panels_have_their_columns_scale(name):
    panels = figure_of(name).axes
    upper, lower = panels[:3], panels[3:]
    assert all(share("y", *column) for column in zip(upper, lower, strict=True))
    assert share("x", *upper)
    assert share("x", *lower)
    assert all(axes.get_title() for axes in upper)
    assert not any(axes.get_title() for axes in lower)


@pytest.mark.parametrize(("name", "axes"), [("sampling", "xy"), ("toy", "xy"), ("batch_size", "x")])
def test_what_is_alike_is_on_the_same_axes(name, axes):
    panels = figure_of(name).axes
    assert all(share(axis, *panels) for axis in axes)


def test_losses_and_measures_are_against_the_same_weights():
    curves, *panels = figure_of("consistency").axes
    assert share("x", *panels)
    assert not share("x", curves, panels[0])


def test_a_figure_is_drawn_anew_to_the_same_bytes(tmp_path):
    for name in ("co2.json", "co2.png", "batch_size.json"):
        shutil.copy(FIGURES / name, tmp_path / name)
    drawn = []
    for _ in range(2):
        (tmp_path / "co2.png").write_bytes(b"")
        report.redraw(tmp_path)
        drawn.append((tmp_path / "co2.png").read_bytes())
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith(b"\x89PNG")
    assert not (tmp_path / "batch_size.png").exists()  # where there was no figure, there is none


def test_a_long_legend_has_several_lines(tmp_path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number in range(9):
        for axes in (left, right):
            axes.plot([0, 1], label=f"a line with a long name, which is number {number}")
    one_legend(figure)
    save(figure, tmp_path / "it.png")
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 9
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
