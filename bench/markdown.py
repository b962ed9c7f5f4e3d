"""Tables of the reports, and their place in the README."""

from collections.abc import Iterable, Sequence
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def replace_in_readme(name: str, text: str) -> None:
    """Puts text between the README's markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = README.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise SystemExit(f"{README} lacks the markers {begin} and {end}")
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
