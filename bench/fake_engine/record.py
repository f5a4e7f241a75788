"""What the engine remembers of the requests it saw, for `GET /_fake/record`; bounded, oldest out first.

With a file (`--record-file`) each one is also written down when it begins and when it ends, so that what an engine did
outlives its own SIGKILL.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

ENTRIES_MAX = 20_000


@dataclass(slots=True)
class Entry:
    """One request. `how` is how it ended: finished, client_closed, aborted, refused, or the fault's kind."""

    path: str
    request_id: str | None
    headers: dict[str, str]
    body_sha256: str
    body: Any = None
    model: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0  # produced by the engine
    tokens_written: int = 0  # of those, written to the socket
    status: int | None = None
    finished: bool = False
    aborted: bool = False
    how: str | None = None
    serial: int = 0  # the how-manieth of its process
    events: list[str] = field(default_factory=list)  # of a stream, as written; with the knob record_events


@dataclass(slots=True)
class Record:
    is_on: bool
    keeps_bodies: bool
    file: Path | None = None
    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=ENTRIES_MAX))
    _fd: int = -1
    _opened: int = 0

    def __post_init__(self) -> None:
        if self.file is not None:
            self._fd = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def open(self, path: str, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Entry | None:
        if not self.is_on:
            return None
        named = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        self._opened += 1
        entry = Entry(
            path, named.get("x-request-id"), named, hashlib.sha256(body).hexdigest(), serial=self._opened
        )
        if self.keeps_bodies:
            entry.body = _parsed(body)
        self.entries.append(entry)
        return entry

    def note(self, entry: Entry | None) -> None:
        """Write down where it is now, in one write: a reader takes the last line of each (pid, serial)."""
        if self._fd >= 0 and entry is not None:
            row = {name: value for name, value in asdict(entry).items() if name != "headers"}
            os.write(self._fd, orjson.dumps({"pid": os.getpid(), **row}) + b"\n")

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries]


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace")
