"""Hooks of MkDocs: the site has what stands outside docs/ too, and formulas that need no script.

Documents link to each other, and to the repository's files, by paths that a forge follows. Here such a link
goes to the page where the site has one, and to the file in the repository elsewhere; one to nothing is a
warning, which ends the build.
"""

from __future__ import annotations

import html
import logging
import os
import posixpath
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"
# Files outside docs/ that are the site's, and where. A page README.md would take the place of index.md.
OUTSIDE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
} | {
    path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix()
    for suffix in ("md", "png")
    for path in sorted((ROOT / "bench/results").glob(f"*.{suffix}"))
}
# Browsers draw MathML well only with a font that tells them how, and not every system has one. The stylesheet
# offers this one, of ziamath's, which is loaded where a page has formulas and the system lacks such a font.
FONT = "assets/STIXTwoMath-Regular.ttf"
# What only the site's own building needs.
UNSEEN = ("docs/site/",)

CODE = r"^( *)```.*?^\1```|`[^`]*`"
CODE_OR_LINK = re.compile(rf"{CODE}|(?P<open>\]\()(?P<target>[^)\s]+)(?=\))", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

log = logging.getLogger("mkdocs.hooks.site")  # MkDocs counts the warnings below its own name


def repository() -> str:
    """The address of the repository."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return pyproject["project"]["urls"]["Repository"]


def place(path: str) -> str | None:
    """Where the site has a file of the repository; None: nowhere."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path.startswith(DOCS) and not path.startswith(UNSEEN) and (ROOT / path).is_file():
        return path.removeprefix(DOCS)
    return None


def source(place_: str) -> str:
    """The file of the repository that the site has in a place."""
    return next((path for path, there in OUTSIDE.items() if there == place_), DOCS + place_)


def link(target: str, document: str) -> str:
    """A link's target on the site, from the target that it has in a document of the repository.

    Raises:
        FileNotFoundError: the repository has no such file.
    """
    path, mark, anchor = target.partition("#")
    if not path or re.match(r"[a-z][a-z0-9+.-]*:", path):
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(document), path))
    if path.startswith("../") or not (ROOT / path).exists():
        raise FileNotFoundError(f"{document} links to {target}, and there is no {path}")
    there = place(path)
    if there is None:
        return f"{repository()}/{'tree' if (ROOT / path).is_dir() else 'blob'}/HEAD/{path}{mark}{anchor}"
    here = place(document) or ""
    return posixpath.relpath(there, posixpath.dirname(here) or ".") + mark + anchor


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.repo_url, config.repo_name = repository(), "Repository"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    sources = {there: ROOT / path for path, there in OUTSIDE.items()}
    sources[FONT] = Path(find_spec("ziamath").origin).parent / "fonts" / Path(FONT).name
    for there, path in sources.items():
        files.append(File.generated(config, there, abs_src_path=os.fspath(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    document = source(page.file.src_uri)

    def replaced(found: re.Match[str]) -> str:
        if found["target"] is None:
            return found[0]
        try:
            return found["open"] + link(found["target"], document)
        except FileNotFoundError as error:
            log.warning(str(error))
            return found[0]

    return CODE_OR_LINK.sub(replaced, markdown)


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Formulas become MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert

    def drawn(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]).strip(), display=display)

    content = FORMULA.sub(drawn, content)
    if 'class="arithmatex"' in content:
        log.warning(f"{source(page.file.src_uri)} has a formula that was not understood")
    return content
