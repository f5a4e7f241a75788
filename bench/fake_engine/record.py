"""What the engine remembers of the requests it saw, for `GET /_fake/record`; bounded, oldest out first."""

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
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


@dataclass(slots=True)
class Record:
    is_on: bool
    keeps_bodies: bool
    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=ENTRIES_MAX))

    def open(self, path: str, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Entry | None:
        if not self.is_on:
            return None
        named = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        entry = Entry(path, named.get("x-request-id"), named, hashlib.sha256(body).hexdigest())
        if self.keeps_bodies:
            entry.body = _parsed(body)
        self.entries.append(entry)
        return entry

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries]


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace")
