"""One engine's output in a file of bounded size, with the one before it kept beside it.

The engine writes to the file itself, so nothing is lost when the agent dies; what its last words mean is
left to people.
"""

import os
import shutil
from pathlib import Path
from typing import IO

LOG_BYTES_MAX = 16 * 2**20  # vLLM writes about 10 KB at its start and a line each 10 s under load
TAIL_BYTES = 16_384


class EngineLog:
    """`path`, and `path`.1 with what was there before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._older = path.with_name(path.name + ".1")

    def open(self) -> IO[bytes]:
        """A new file for a new process; the last one's stays as .1."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.replace(self._older)
        return self.path.open("ab")

    def keep_bounded(self) -> None:
        """Copy and truncate in place: the engine holds the file open, and appends from its new end."""
        if self.path.stat().st_size > LOG_BYTES_MAX:
            shutil.copyfile(self.path, self._older)
            os.truncate(self.path, 0)

    def last_words(self, lines: int = 6) -> str:
        """The last lines that say something."""
        with self.path.open("rb") as log:
            log.seek(max(0, self.path.stat().st_size - TAIL_BYTES))
            text = log.read().decode(errors="replace")
        said = [line.rstrip() for line in text.splitlines() if line.strip()]
        return "\n".join(said[-lines:])
