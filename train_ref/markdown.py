"""Tables of the reports, and their place in documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .errors import UsageError
from .files import write_text


def parts(document: Path, name: str) -> tuple[str, str, str]:
    """A document up to its first marker of that name and with it, what stands between, and the rest."""
    return split(document.read_text(encoding="utf-8"), name, document)


def split(content: str, name: str, document: Path) -> tuple[str, str, str]:
    """`parts` of a document that has been read."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, found, rest = content.partition(begin)
    between, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise UsageError(f"document: {document} lacks the markers {begin.rstrip()} and {end}")
    return before + begin, between.removesuffix("\n"), end + after


def replace(document: Path, texts: Mapping[str, str]) -> None:
    """Puts texts between a document's markers of their names: all, or none where one is missing."""
    try:
        content = document.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"document: {document} is no text in UTF-8: {error}") from error
    for name, text in texts.items():
        before, _, after = split(content, name, document)
        content = f"{before}{text}\n{after}"
    write_text(document, content)


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right."""
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
