"""Owns how progress looks: a spinner with elapsed seconds on a terminal, plain lines elsewhere.

What the steps are is their owners' affair.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

# Without a terminal nobody sees a spinner: a line this often shows that it still goes on.
LINE_EVERY_S = 10.0

Say = Callable[[str], None]


class Steps:
    """Named steps, one after the other, each told when it begins, goes on and is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        encoding = (console.encoding or "").lower()
        self._mark = "✓" if encoding.startswith("utf") else "ok"

    def tell(self, words: str, *, style: str = "") -> None:
        """A line between steps."""
        self._console.print(escape(words), style=style or None)

    @contextmanager
    def step(self, title: str) -> Iterator[Say]:
        """The yielded function says what is being done or waited for; the last words stay in the closing line
        when they begin with `=`."""
        began = time.monotonic()
        closing = ""
        show = self._spinner if self._console.is_terminal else self._lines
        with show(title, began) as show_words:

            def say(words: str) -> None:
                nonlocal closing
                if words.startswith("="):
                    closing = words[1:]
                else:
                    show_words(words)

            yield say
        took = f"{time.monotonic() - began:.1f} s"
        self._console.print(
            f"[green]{self._mark}[/] {escape(title)} [dim]{took}[/] {escape(closing)}".rstrip()
        )

    @contextmanager
    def _spinner(self, title: str, began: float) -> Iterator[Say]:
        with self._console.status(f"{escape(title)} …") as status:

            def say(words: str) -> None:
                elapsed = time.monotonic() - began
                status.update(f"{escape(title)} … {elapsed:.0f} s [dim]{escape(words[:100])}[/]")

            yield say

    @contextmanager
    def _lines(self, title: str, began: float) -> Iterator[Say]:
        self._console.print(escape(f"  {title} ..."))
        last = time.monotonic()

        def say(words: str) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_EVERY_S:
                last = time.monotonic()
                self._console.print(escape(f"  {title} ... {last - began:.0f} s {words}".rstrip()))

        yield say
