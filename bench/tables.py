"""A benchmark's rows as text for a terminal and as Markdown for RESULTS.md."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

HEAD = """\
# What a request costs

Written by `make bench` (bench/cost.py); how to read it, and what is not compared, is in bench/README.md.
"""


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


def as_markdown(about: Mapping[str, str], rows: Sequence[Row], *, rounds: int) -> str:
    """The whole of RESULTS.md."""
    lines = [HEAD, *(f"- {name}: {value}" for name, value in about.items()), f"- rounds: {rounds}", ""]
    lines += ["| | median | least | most | unit |", "|---|---:|---:|---:|---|"]
    lines += [
        f"| {row.name} | {_plain(row.median)} | {_plain(row.least)} | {_plain(row.most)} | {row.unit} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
