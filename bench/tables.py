"""A benchmark's rows as text for a terminal, and as its part of RESULTS.md."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HEAD = "Written by `make bench` ({}); how to read it, and what is not compared, is in bench/README.md."


@dataclass(frozen=True, slots=True)
class Row:
    """One number: its median over the rounds, and the least and the most."""

    name: str
    unit: str
    median: float
    least: float
    most: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def as_text(rows: Sequence[Row]) -> str:
    """Columns for a terminal."""
    width = max(len(row.name) for row in rows)
    return "\n".join(
        f"{row.name:<{width}}  {_plain(row.median):>9} {row.unit}   ({_plain(row.least)} - {_plain(row.most)})"
        for row in rows
    )


def rows_as_markdown(made_by: str, about: Mapping[str, str], rows: Sequence[Row], *, rounds: int) -> str:
    """The text of one benchmark's part."""
    lines = [
        HEAD.format(made_by),
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        f"- rounds: {rounds}",
        "",
    ]
    lines += ["| | median | least | most | unit |", "|---|---:|---:|---:|---|"]
    lines += [
        f"| {row.name} | {_plain(row.median)} | {_plain(row.least)} | {_plain(row.most)} | {row.unit} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def write_section(path: Path, title: str, text: str) -> None:
    """Put a part under its title, in the place of the one that stood there; the other parts stay."""
    old = path.read_text() if path.exists() else ""
    parts = {part.partition("\n")[0]: part for part in f"\n{old}".split("\n# ") if part.strip()}
    parts[title] = f"{title}\n\n{text.strip()}\n"
    path.write_text("\n".join(f"# {part.strip()}\n" for part in parts.values()))


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
