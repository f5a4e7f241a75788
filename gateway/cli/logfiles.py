"""Owns the log files of `poolgate up`'s children: bounded in size, and followed for what a person must see.

What is logged is the children's affair.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

LOG_BYTES_MAX = 10 * 2**20
READ_BYTES_MAX = 256 * 1024
SHOWN_AT_ONCE_MAX = 5
LOUD = ("warning", "error", "critical")
# `12:00:00.123 warning gateway: words`, as config/logs.py writes for people.
HUMAN_LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} (?P<level>\w+) +(?P<process>[^:]+): (?P<words>.*)")


@dataclass(slots=True)
class LogFile:
    """The log of one child. It writes by itself, so a slow terminal never holds it up."""

    path: Path
    _offset: int = field(default=0, init=False)

    def open(self) -> BinaryIO:
        """For the child; appends, so that `bound` may cut the file under it."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        stream = self.path.open("ab")
        self._offset = max(self._offset, os.fstat(stream.fileno()).st_size)
        return stream

    def bound(self) -> None:
        """Past LOG_BYTES_MAX the file becomes `.1`. Copied and cut, because the child keeps it open."""
        if self._size() > LOG_BYTES_MAX:
            shutil.copyfile(self.path, self.path.with_suffix(self.path.suffix + ".1"))
            os.truncate(self.path, 0)
            self._offset = 0

    def loud_lines(self) -> list[str]:
        """Warnings and errors since the last call, for people; at most a few, then how many more."""
        loud = []
        for line in self._new_lines():
            level, words = read_line(line)
            if level in LOUD:
                loud.append(words)
        if len(loud) > SHOWN_AT_ONCE_MAX:
            loud[SHOWN_AT_ONCE_MAX:] = [f"and {len(loud) - SHOWN_AT_ONCE_MAX} more in {self.path}"]
        return loud

    def tail(self, lines: int = 15) -> str:
        try:
            with self.path.open("rb") as stream:
                stream.seek(max(0, self._size() - 200 * lines))
                text = stream.read().decode(errors="replace")
        except OSError:
            return "(no log)"
        return "\n".join(text.strip().splitlines()[-lines:]) or "(nothing)"

    def _new_lines(self) -> list[str]:
        size = self._size()
        if size <= self._offset:
            self._offset = size
            return []
        with self.path.open("rb") as stream:
            # Past this much nobody could read it on a terminal anyway.
            self._offset = max(self._offset, size - READ_BYTES_MAX)
            stream.seek(self._offset)
            data = stream.read(READ_BYTES_MAX)
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0


def read_line(line: str) -> tuple[str, str]:
    """Level and words of a log line in either format; what is neither (a traceback's lines) has no level."""
    if match := HUMAN_LINE.fullmatch(line):
        return match["level"], f"{match['process']}: {match['words']}"
    if line.startswith("{"):
        try:
            fields = json.loads(line)
            return str(fields["level"]), f"{fields['process']}: {fields['message']}"
        except (ValueError, KeyError, TypeError):
            return "", ""
    return "", ""
