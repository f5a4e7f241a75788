"""The head of a request that the edge serves by itself, read by a grammar narrower than HTTP's. Pure.

Whatever is not plainly one of those requests gives None and goes to aiohttp, whose parser (llhttp) takes or refuses it. So
nothing has to be tolerated here, and one head can't mean two things: each field once, no folding, no bare CR or LF, no NUL,
one length of digits, no coding of the transfer, no upgrade and no expectation.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from gateway.lengths import body_bytes

HEAD = re.compile(
    rb"(POST|GET|HEAD|PUT|PATCH|DELETE|OPTIONS) (/[!-~]*|\*) HTTP/1\.([01])\r\n"
    rb"((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n)+)\r\n"
)

LENGTH_DIGITS_MAX = 15
LENGTH = re.compile(rb"[0-9]{1,%d}" % LENGTH_DIGITS_MAX)

NOT_PLAIN = frozenset({b"transfer-encoding", b"expect", b"trailer", b"proxy-connection"})
"""Where one of these stands, a request may not end where its length says, its answer not be one answer, or its connection
not go on: llhttp takes `proxy-connection` for `connection`."""

CONNECTION_OPTIONS = frozenset({b"close", b"keep-alive", b"upgrade", b"te", b"http2-settings"})
"""What may stand in `connection`. An upgrade to anything but a websocket is not offered, and so it is ignored."""

BOTH_ENDS = frozenset({b"close", b"keep-alive"})
"""Of which HTTP/1.0's readers believe one or the other."""

JSON_TYPES = (b"", b"application/json", b"application/json; charset=utf-8", b"application/json;charset=utf-8")
"""What a body may be called here; other names of JSON are aiohttp's to judge."""

HEADERS_MAX = 128
"""As aiohttp's: a request with more is refused there."""


@dataclass(slots=True)
class Head:
    """One request's head, and where the request ends.

    `before` and `after` are the head's bytes around the digits of its length, by which the same head is known again with
    another length. What the edge finds out from the fields is kept here for requests with the same ones: `digest` of the key
    that it presents, the route that it is `for_`, `own_lines` of each answer to it, and `body_bytes_max`, which holds for
    the next body as well. The fields themselves are not kept with it (`slim`): thousands of connections have one each.
    """

    method: bytes
    target: bytes
    is_http_11: bool
    keep_alive: bool
    size: int
    body_bytes: int
    fields: dict[bytes, bytes] = field(repr=False)
    before: bytes = field(repr=False, default=b"")
    after: bytes = field(repr=False, default=b"")
    digest: bytes = field(repr=False, default=b"")
    for_: Any = None
    own_lines: bytes = b""
    body_bytes_max: int = 0
    is_keyed: bool = False  # it has an Idempotency-Key
    hints: Any = None  # what its headers ask of the node

    @property
    def is_plain_json(self) -> bool:
        """A JSON body as it is, whose length is known."""
        fields = self.fields
        return (
            b"content-length" in fields
            and fields.get(b"content-type", b"").lower() in JSON_TYPES
            and fields.get(b"content-encoding", b"identity") == b"identity"
        )

    def slim(self) -> None:
        """Let go of the fields, which `all_fields` reads anew from the head's own bytes."""
        self.is_keyed = b"idempotency-key" in self.fields
        self.fields = {}

    def all_fields(self) -> dict[bytes, bytes]:
        """The fields, also of a slim one."""
        if self.fields:
            return self.fields
        again = read_head(b"%b0%b" % (self.before, self.after))
        assert again is not None
        return again.fields

    def body_again(self, data: bytes) -> bytes | None:
        """The body, where `data` is one whole request whose head is this one but for the digits of the length."""
        length = body_bytes(data, self.before, self.after) if self.before else -1
        return data[len(data) - length :] if 0 <= length <= self.body_bytes_max else None


def read_head(raw: bytes) -> Head | None:
    """The head that `raw` is, its empty line included; None where it is anything but plain."""
    match = HEAD.fullmatch(raw)
    if match is None:
        return None
    lines = match[4].split(b"\r\n")
    lines.pop()
    if len(lines) > HEADERS_MAX:
        return None
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        fields[name.lower()] = value.strip(b" \t")
    if len(fields) < len(lines) or not fields.get(b"host") or not NOT_PLAIN.isdisjoint(fields):
        return None
    length = fields.get(b"content-length", b"0")
    options = {option.strip() for option in fields.get(b"connection", b"keep-alive").lower().split(b",")}
    if LENGTH.fullmatch(length) is None or not options <= CONNECTION_OPTIONS or options >= BOTH_ENDS:
        return None
    if fields.get(b"upgrade", b"").lower() == b"websocket":
        return None
    is_http_11 = match[3] == b"1"
    keep_alive = b"close" not in options and (
        is_http_11 or (b"keep-alive" in options and b"connection" in fields)
    )
    head = Head(match[1], match[2], is_http_11, keep_alive, len(raw), int(length), fields)
    if b"content-length" in fields:
        head.before, head.after = _around_length(raw, length)
    return head


def _around_length(raw: bytes, length: bytes) -> tuple[bytes, bytes]:
    """The bytes before and after the digits of `content-length`, a field that stands in `raw` once."""
    name = raw.lower().index(b"\r\ncontent-length:") + len(b"\r\ncontent-length:")
    start = raw.index(length, name)
    return raw[:start], raw[start + len(length) :]
