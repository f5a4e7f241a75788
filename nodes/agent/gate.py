"""What of a gateway's requests an engine gets: only those it is for, whole, and without what was meant for us.

Pure. The gateway writes requests of one shape; anything that has another one, or could mean two things, is refused. So
whoever gets past the listener still reaches no more of an engine than turns need: no management route, no other host.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATHS = frozenset(
    {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/responses"),
        ("POST", "/tokenize"),
        ("GET", "/health"),
    }
)

HEAD_BYTES_MAX = 8192
"""The gateway's heads have some 300."""

BODY_BYTES_MAX = 2**30
OWN_PREFIX = "x-poolgate-"
REFUSED_HEADERS = frozenset({"transfer-encoding", "upgrade", "expect", "te", "trailer"})

REQUEST_LINE = re.compile(rb"(GET|POST) (/[!-~]{0,1024}) HTTP/1\.1")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}):[ \t]*([ -~]*?)[ \t]*")
LENGTH = re.compile(r"[0-9]{1,10}")


class Answered(Exception):
    """The request is answered here, and its connection ends."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self.status = status
        self.body = body
        super().__init__(str(body))


def refusal(status: int, words: str) -> Answered:
    """401: who are you; 403: not that; 502: no engine."""
    return Answered(status, {"error": words})


@dataclass(frozen=True, slots=True)
class Head:
    """A request's head; the names of `fields` are in lower case, and each stands there once."""

    method: str
    path: str
    fields: dict[str, str]


def read_head(data: bytes) -> Head:
    """The head, without its last empty line. Raises Answered for what the gateway would not write."""
    first, *lines = data.split(b"\r\n")
    asked = REQUEST_LINE.fullmatch(first)
    if asked is None:
        raise refusal(403, "no request of a gateway")
    fields: dict[str, str] = {}
    for line in lines:
        field = FIELD.fullmatch(line)
        if field is None:
            raise refusal(403, "a header of another shape")
        name = field[1].decode().lower()
        if name in fields or name in REFUSED_HEADERS:
            raise refusal(403, "a header that gateways don't send")
        fields[name] = field[2].decode()
    return Head(asked[1].decode(), asked[2].decode(), fields)


class RequestGate:
    """Reads the requests of one connection, one after the other. `allows` judges each head; it raises Answered."""

    def __init__(self, allows: Callable[[Head], None]) -> None:
        self._allows = allows
        self._head = bytearray()
        self._left = 0  # bytes of a body that are still to come

    def feed(self, data: bytes) -> bytes:
        """What the engine gets of it. Raises Answered."""
        passed = []
        while data:
            if self._left:
                body, data = data[: self._left], data[self._left :]
                self._left -= len(body)
                passed.append(body)
                continue
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end > HEAD_BYTES_MAX or (end < 0 and len(self._head) > HEAD_BYTES_MAX):
                raise refusal(403, "a head that is too long")
            if end < 0:
                break
            head, data = bytes(self._head[:end]), bytes(self._head[end + 4 :])
            self._head.clear()
            passed.append(self._judged(read_head(head)))
        return b"".join(passed)

    def _judged(self, head: Head) -> bytes:
        self._allows(head)
        if (head.method, head.path) not in PATHS:
            raise refusal(403, "an engine is not asked this from outside")
        length = head.fields.get("content-length", "0")
        if LENGTH.fullmatch(length) is None or int(length) > BODY_BYTES_MAX:
            raise refusal(403, "a body of no length, or too long")
        self._left = int(length)
        lines = [f"{name}: {value}" for name, value in head.fields.items() if not name.startswith(OWN_PREFIX)]
        return "\r\n".join((f"{head.method} {head.path} HTTP/1.1", *lines, "", "")).encode()
