"""The documentation's site, as far as it can be told without building it: `make docs` tells the rest."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import contrastive_ops
from bench.files import DROP_IN

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "mkdocs.yml"
HOOKS = ROOT / "docs/site/hooks.py"

if not CONFIG.exists():
    pytest.skip("the site is made of the source", allow_module_level=True)


def load_hooks() -> Any:
    specification = importlib.util.spec_from_file_location("site_hooks", HOOKS)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


hooks = load_hooks()


def config() -> dict[str, Any]:
    return pytest.importorskip("yaml").safe_load(CONFIG.read_text())


def leaves(nav: Any) -> Iterator[str]:
    """The pages of a navigation, in its order."""
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(each)


def documents() -> list[str]:
    """The documents of the repository that are pages of the site."""
    in_docs = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    return in_docs + [path for path in hooks.OUTSIDE if path.endswith(".md")]


def served(document: str, markdown: str) -> str:
    """The text of a document as the hook hands it to MkDocs."""
    page = SimpleNamespace(file=SimpleNamespace(src_uri=hooks.place(document)))
    return hooks.on_page_markdown(markdown, page=page)


def test_the_navigation_has_every_page_once() -> None:
    pages = [hooks.place(document) for document in documents() if not document.startswith("bench/")]
    assert sorted(leaves(config()["nav"])) == sorted(pages)


@pytest.mark.parametrize("document", documents())
def test_links_lead_somewhere(document: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mkdocs"):
        served(document, (ROOT / document).read_text())
    assert not caplog.messages


def test_every_place_has_its_source() -> None:
    for document in documents():
        assert hooks.source(hooks.place(document)) == document


REPOSITORY = hooks.repository()


@pytest.mark.parametrize(
    ("document", "target", "expected"),
    [
        ("docs/index.md", "losses.md", "losses.md"),
        ("docs/index.md", "losses.md#nt-xent-over-a-batch", "losses.md#nt-xent-over-a-batch"),
        ("docs/drop_in/moco.md", "../distributed.md", "../distributed.md"),
        ("docs/drop_in/moco.md", "../../README.md#limits", "../readme.md#limits"),
        ("docs/drop_in/moco.md", "moco_v3.md", "moco_v3.md"),
        ("README.md", "docs/figures/fused.png", "figures/fused.png"),
        ("README.md", "CONTRIBUTING.md", "contributing.md"),
        ("README.md", "train_ref/recipes", f"{REPOSITORY}/tree/HEAD/train_ref/recipes"),
        ("CONTRIBUTING.md", "constraints.txt", f"{REPOSITORY}/blob/HEAD/constraints.txt"),
        ("docs/architecture.md", "../csrc/row_math.h", f"{REPOSITORY}/blob/HEAD/csrc/row_math.h"),
        ("docs/architecture.md", "site/hooks.py", f"{REPOSITORY}/blob/HEAD/docs/site/hooks.py"),
        ("docs/architecture.md", "#to-add-a-loss", "#to-add-a-loss"),
        ("docs/architecture.md", "https://arxiv.org/abs/2010.02217", "https://arxiv.org/abs/2010.02217"),
    ],
)
def test_a_link_is_the_sites(document: str, target: str, expected: str) -> None:
    assert hooks.link(target, document) == expected


@pytest.mark.parametrize("target", ["nowhere.md", "../nowhere.md", "../../outside.md", "figures/none.png"])
def test_a_link_to_nothing_is_a_warning(target: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FileNotFoundError, match=r"docs/index\.md links to"):
        hooks.link(target, "docs/index.md")
    with caplog.at_level(logging.WARNING, "mkdocs"):
        served("docs/index.md", f"[a]({target})")
    assert len(caplog.messages) == 1


def test_code_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    code = "a `x[0](nowhere.md)`\n\n```python\nx[0](nowhere.md)\n```\n\n  ```\n  x[0](nowhere.md)\n  ```\n"
    linked = f"{code}\n[`code`](../README.md), ![a picture](figures/fused.png)\n"
    with caplog.at_level(logging.WARNING, "mkdocs"):
        text = served("docs/index.md", linked)
    assert text == linked.replace("../README.md", "readme.md")
    assert not caplog.messages


def test_the_reference_has_every_public_name_once() -> None:
    pages = [page.read_text() for page in (ROOT / "docs/api").glob("*.md")]
    named = re.compile(r"^::: contrastive_ops\.(\w+)$", re.MULTILINE)
    found = [name for page in pages for name in named.findall(page)]
    assert sorted(found) == sorted(contrastive_ops.__all__)


@pytest.mark.parametrize("page", sorted(DROP_IN.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_for_another_project_shows_lines_and_equality(page: Path) -> None:
    text = page.read_text()
    diffs = re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert any({"-", "+"} <= {line[:1] for line in diff.splitlines()} for diff in diffs)
    (block, *_) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert re.search(r"assert_close\(ours, theirs\)", block)
    assert re.search(r"assert_close\(our_gradients?, their_gradients?\)", block)


def test_a_warning_ends_the_build() -> None:
    settings = config()
    assert settings["strict"] is True
    checks = settings["validation"]["nav"] | settings["validation"]["links"]
    assert set(checks.values()) == {"warn"}
    (build,) = re.findall(r"^\t.*mkdocs build.*$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert not re.search(r"\s(-q|--quiet|--no-strict)\b", build)  # quiet warnings are not counted


def test_nothing_is_fetched_from_elsewhere() -> None:
    settings = config()
    assert settings["theme"]["font"] is False
    assert not any(re.match(r"(https?:)?//", each) for each in settings.get("extra_css", []))
    assert "extra_javascript" not in settings
    for path in (ROOT / "docs/site/theme").rglob("*.*"):
        assert not re.search(r"(src=|url\()\W*(https?:)?//", path.read_text()), path
