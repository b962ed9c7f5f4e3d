"""Tables of the reports, and their place in documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def parts(document: Path, name: str) -> tuple[str, str, str]:
    """A document up to its first marker of that name and with it, what stands between, and the rest."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    between, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise SystemExit(f"error: {document} lacks the markers {begin.rstrip()} and {end}")
    return before + begin, between.removesuffix("\n"), end + after


def replace(document: Path, name: str, text: str) -> None:
    """Puts text between a document's markers of that name."""
    before, _, after = parts(document, name)
    document.write_text(f"{before}{text}\n{after}", encoding="utf-8")


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right."""
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
