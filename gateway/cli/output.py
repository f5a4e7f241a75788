"""Owns what commands print: results to standard output, progress and errors to standard error.

What is printed is decided by the commands.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


class Refused(Exception):
    """A command can't go on. The message is one sentence that says what to do next; exit code 1."""


def stdout() -> Console:
    """Made at each use, not at import: tests and redirections replace the streams."""
    return Console(highlight=False, soft_wrap=True)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> None:
    """A table for people; a column named `>name` is aligned to the right. `empty` is said without rows."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(
            column.lstrip(">"), justify="right" if column.startswith(">") else "left", no_wrap=True
        )
    count = 0
    for row in rows:
        table.add_row(*(escape("" if cell is None else str(cell)) for cell in row))
        count += 1
    if not count:
        print(empty)
        return
    # A pipe has no width: cells that were cut off would be worse than a long line.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=1000)
    console.print(table)


def bar(share: float, width: int = 20) -> str:
    """`share` of 0..1 as a bar of eighths of a block."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def when(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M")
