"""The bytes around an answer: status line, headers in uvicorn's order, chunk framing, error bodies.

What is inside an answer belongs to the surface modules (`chat`, `completion`, ...).
"""

import json
import time
from collections.abc import Mapping
from email.utils import formatdate
from typing import Final

import orjson

REASONS: Final[dict[int, bytes]] = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    422: b"Unprocessable Entity",
    429: b"Too Many Requests",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    503: b"Service Unavailable",
}
JSON: Final = b"application/json"
DONE: Final = b"data: [DONE]\n\n"
END: Final = b"0\r\n\r\n"
_HEX: Final = [b"%x\r\n" % size for size in range(4096)]

BUSY: Final = (
    "The engine is currently busy and cannot accept new requests. "
    "Please try again later or on a different instance."
)
CORE_DEAD: Final = "EngineCore encountered an issue. See stack trace (above) for the root cause."
DRAINING: Final = "cannot schedule new futures after shutdown"


class Refusal(Exception):
    """An answer that ends a request at once: an error status and its JSON body."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


def error_fields(message: str, kind: str, param: str | None, code: int) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> Refusal:
    return Refusal(status, orjson.dumps(error_fields(message, kind, param, status)))


def canonical_error(status: int, message: str | None = None) -> tuple[str, str, str | None, int]:
    """(message, type, param, code) that vLLM answers for a status; any status may be asked for."""
    known: dict[int, tuple[str, str, str | None]] = {
        400: (
            "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
            "BadRequestError",
            "max_tokens",
        ),
        404: ("The model `nope` does not exist. Valid aliases: smollm2-135m.", "NotFoundError", "model"),
        500: (CORE_DEAD, "InternalServerError", None),
        503: (BUSY, "Service Unavailable", None),
    }
    default, kind, param = known.get(status, (f"status {status}", "InternalServerError", None))
    return message or default, kind, param, status


def error_event(status: int, message: str | None = None) -> bytes:
    """An error inside a stream; vLLM writes it with json.dumps, hence the spaces."""
    return b"data: " + json.dumps(error_fields(*canonical_error(status, message))).encode() + b"\n\n"


class Stamp:
    """The first header lines and `created`, made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._date = b""

    def now(self) -> int:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._date = b"\r\ndate: " + formatdate(second, usegmt=True).encode() + b"\r\nserver: uvicorn\r\n"
        return second

    def head(self, status: int) -> bytes:
        self.now()
        return b"HTTP/1.1 %d %b%b" % (status, REASONS.get(status, b""), self._date)

    def whole(
        self,
        status: int,
        body: bytes,
        *,
        content_type: bytes | None = JSON,
        first: bytes = b"",
        last: bytes = b"",
    ) -> bytes:
        """A complete answer; `first` goes before content-length (allow), `last` after vary (x-request-id)."""
        kind = b"" if content_type is None else b"content-type: %b\r\n" % content_type
        return b"%b%bcontent-length: %d\r\n%bvary: Origin\r\n%b\r\n%b" % (
            self.head(status), first, len(body), kind, last, body,
        )  # fmt: skip

    def stream_head(self, last: bytes = b"") -> bytes:
        return (
            b"%bcontent-type: text/event-stream; charset=utf-8\r\nvary: Origin\r\n%b"
            b"transfer-encoding: chunked\r\n\r\n" % (self.head(200), last)
        )


def chunk(event: bytes) -> bytes:
    size = len(event)
    return b"%b%b\r\n" % (_HEX[size] if size < 4096 else b"%x\r\n" % size, event)


def event_line(name: str, fields: Mapping[str, object]) -> bytes:
    """A named server-sent event, as /v1/responses and /v1/messages send them."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(fields))


def inner(text: str) -> bytes:
    """JSON string escapes of text without the quotes, so that pieces can be joined before quoting."""
    return orjson.dumps(text)[1:-1]
