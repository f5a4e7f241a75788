"""The captured exchanges with a real vLLM (tests/captures), read back into requests, answers and events."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "captures"


@dataclass(frozen=True)
class Exchange:
    """One captured request and the engine's answer to it."""

    name: str
    method: str
    path: str
    request_body: bytes
    request_headers: dict[str, str]
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def events(self) -> list[bytes]:
        return [event for event in self.body.split(b"\n\n") if event]


def names() -> list[str]:
    """Every capture that has a request and an answer."""
    return sorted(path.stem for path in FOLDER.glob("*.req") if path.with_suffix(".resp").exists())


def load(name: str) -> Exchange:
    head, _, body = (FOLDER / f"{name}.req").read_bytes().partition(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    answer_head, _, answer = (FOLDER / f"{name}.resp").read_bytes().partition(b"\r\n\r\n")
    status_line, *answer_fields = answer_head.decode().split("\r\n")
    headers = _fields(answer_fields)
    if headers.get("transfer-encoding") == "chunked":
        answer = _dechunked(answer)
    method, path, _ = line.split(" ")
    return Exchange(
        name, method, path, body, _fields(fields), int(status_line.split(" ")[1]), headers, answer
    )


def data_of(event: bytes) -> Any:
    """The JSON of an event, None for `[DONE]` and comments."""
    for line in event.split(b"\n"):
        if line.startswith(b"data: {"):
            return json.loads(line[6:])
    return None


def _fields(lines: list[str]) -> dict[str, str]:
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def _dechunked(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return body
        body, data = body + data[:length], data[length + 2 :]
    return body
