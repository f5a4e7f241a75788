"""What a fuzzed client sends: valid requests, one behind the other, broken in some places and cut into pieces. Pure."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, takewhile

HOT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
JSON = b"Content-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"

LAST = HOT + b"Content-Length: 5\r\nConnection: close\r\nAuthorization: Bearer known\r\n\r\nlater"
"""A plain request after which the connection ends."""

PLAIN = {
    HOT + JSON + b"Authorization: Bearer known\r\nContent-Length: 13\r\n\r\n" + b"{'a': 'whole'": 200,
    HOT + JSON + b"Authorization: Bearer known\r\nContent-Length: 9\r\n\r\n" + b"{stream:1": 200,
    HOT + JSON + b"Authorization: Bearer stranger\r\nContent-Length: 2\r\n\r\n{}": 200,
    HOT
    + b"Content-Length: 3\r\nConnection: upgrade\r\nUpgrade: h2c\r\nAuthorization: Bearer known\r\n\r\nbig": 200,
    b"POST /v1/chat/completions HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\n1": 200,
    b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nauthorization: Bearer known\r\ncontent-length: 0\r\n\r\n": 200,
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAccept: */*\r\nUser-Agent: fuzz\r\n\r\n": 200,
    b"PATCH / HTTP/1.1\r\nHost: x\r\n\r\n": 200,
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n": 404,
    b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\nignored": 200,
    b"\r\n\r\nDELETE /a HTTP/1.1\r\nHost: x\r\n\r\n": 200,
    LAST: 200,
}
"""Requests whose end is known from their heads, with what each gets. Whatever follows, and however they are cut."""

REQUESTS = (
    *PLAIN,
    HOT + JSON + CHUNKED + b"5;e=1\r\nchunk\r\n3\r\n...\r\n0\r\nTrailer: t\r\n\r\n",
    HOT + JSON + b"Expect: 100-continue\r\nContent-Length: 4\r\n\r\nbody",
    b"GET /v1/models HTTP/1.0\r\n\r\n",
    b"GET http://x/absolute?a=b HTTP/1.1\r\nHost: x\r\nCookie: a=b\r\nCookie: c=d\r\n\r\n",
    b"GET /socket HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n\r\n",
    b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
)

NUMBERS = (
    b"", b"0", b"00", b"1", b"7", b"+5", b"-1", b"0x5", b"5,5", b"99999999999999999999", b"18446744073709551616", b"f" * 17,
)  # fmt: skip

TOKENS = (
    *NUMBERS, b"\r\n", b"\n",
    b"\r", b"\r\n\r\n", b"\n\n", b"\0", b" ", b"\t", b":", b",", b";", b"\x7f", b"\xff", b"\xc3\xa9",
    b"chunked", b"identity", b"gzip", b"close", b"keep-alive", b"HTTP/1.1", b"HTTP/2.0",
    b"Content-Length: 3\r\n", b"content-length: 0\r\n", b"Content-Length : 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding:\tchunked\r\n", b"transfer-encoding: chunked, identity\r\n", b"Connection: close\r\n",
    b"Host: y\r\n", b" folded: x\r\n", b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\n", b"Trailer: a\r\n",
    b"Proxy-Connection: close\r\n",
    b"Content-Encoding: gzip\r\n", b"Origin: https://a\r\n",
    b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n", b"x: " + b"a" * 9000 + b"\r\n", b"x: y\r\n" * 140, b"y" * 70_000,
)  # fmt: skip

NUMBER = re.compile(rb"[0-9]+")


@dataclass(frozen=True, slots=True)
class Input:
    """One client: what it sends piece by piece, how it ends, and whether it reads slowly.

    `statuses` are those of its first answers, as far as they are certain, and with `is_all` there is no further one.
    """

    pieces: tuple[bytes, ...]
    ending: str  # wait, late, fin, reset
    reads_slowly: bool
    statuses: tuple[int, ...]
    is_all: bool


def draw(rng: random.Random) -> Input:
    """One of them; half of the requests are left as they are, so that the others come deep enough."""
    requests = [rng.choice(REQUESTS) for _ in range(rng.choice((1, 1, 2, 2, 3, 5)))]
    if rng.random() < 0.3:
        requests = requests[:1] * len(requests)
    sent = [each if rng.random() < 0.5 else mutated(each, rng) for each in requests]
    certain = list(takewhile(PLAIN.__contains__, sent))
    is_all = len(certain) == len(sent)
    if LAST in certain:
        certain, is_all = certain[: certain.index(LAST) + 1], True
    return Input(
        pieces=tuple(cut(b"".join(sent), rng)), ending=rng.choice(("wait", "wait", "late", "fin", "reset")),
        reads_slowly=rng.random() < 0.1, statuses=tuple(PLAIN[each] for each in certain), is_all=is_all,
    )  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """It with one to three faults."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(FAULTS)(data, rng)
    return data


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    """Its pieces, none of them empty."""
    at = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 1, 2, 4))))})
    return [data[start:end] for start, end in pairwise(at)]


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(TOKENS) + data[at:]


def _add_field(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\r\n")
    return b"\r\n".join([*lines[:1], rng.choice(TOKENS).removesuffix(b"\r\n"), *lines[1:]])


def _remove(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 1, 2, 8, 30)) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[: at + rng.choice((1, 2, 8, 30, 200))] + data[at:]


def _double_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\r\n")
    at = rng.randrange(len(lines))
    return b"\r\n".join([*lines[: at + 1], *lines[at:]])


def _drop_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\r\n")
    del lines[rng.randrange(len(lines))]
    return b"\r\n".join(lines)


def _renumber(data: bytes, rng: random.Random) -> bytes:
    numbers = list(NUMBER.finditer(data))
    if not numbers:
        return data
    number = rng.choice(numbers)
    return data[: number.start()] + rng.choice(NUMBERS) + data[number.end() :]


def _splice(data: bytes, rng: random.Random) -> bytes:
    other = rng.choice(REQUESTS)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


def _end(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


FAULTS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _insert, _insert, _add_field, _remove, _repeat, _double_line, _drop_line, _renumber, _splice, _end,
)  # fmt: skip
