"""Tables of the reports, and their place in the README and other documents."""

from collections.abc import Iterable, Sequence
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def parts(document: Path, name: str) -> tuple[str, str, str]:
    """A document up to its first marker of that name and with it, what stands between, and the rest."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, found, rest = document.read_text().partition(begin)
    between, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise SystemExit(f"{document} lacks the markers {begin.rstrip()} and {end}")
    return before + begin, between.removesuffix("\n"), end + after


def replace(document: Path, name: str, text: str) -> None:
    """Puts text between a document's markers of that name."""
    before, _, after = parts(document, name)
    document.write_text(f"{before}{text}\n{after}")


def replace_in_readme(name: str, text: str) -> None:
    replace(README, name, text)


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
