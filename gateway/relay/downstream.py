"""The client's side of a turn: raw HTTP/1.1 onto the client's transport, so that a chunk costs one write and no task.

Whoever parsed the request, an answer of a turn is written here, head included. aiohttp, where it was that, is handed a
`Relayed` that has nothing left to write. Bytes that wait for a slow client are never more than one chunk above the
transport's limit, because the lifecycle pauses the engine when `is_full`.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final, Protocol

from aiohttp import web

from billing.limits.headers import NOTHING_TOLD, Told

EVENT_STREAM: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold events back
}


END_OF_HEAD: Final = b"\r\n"
KEEP_ALIVE: Final = b"connection: keep-alive\r\n\r\n"
CLOSE: Final = b"connection: close\r\n\r\n"
"""How a head ends: HTTP/1.1 keeps a connection unless it says otherwise, HTTP/1.0 does not."""

STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class ClientGone(Exception):
    """The client left, or read nothing for so long that it is taken as gone."""


class Downstream(Protocol):
    """Where a turn's answer goes."""

    @property
    def is_started(self) -> bool:
        """The status was sent: from now on a failure can only be an event."""
        ...

    @property
    def is_gone(self) -> bool:
        """Nobody reads any more."""
        ...

    @property
    def is_full(self) -> bool:
        """The client is slower than the engine: stop until `drained`."""
        ...

    def start(self, headers: dict[str, str], told: Told = NOTHING_TOLD) -> None:
        """Send status 200 and the head of a stream; `told` are more headers, which many answers share."""
        ...

    def write(self, data: bytes) -> None:
        """Send some of a stream."""
        ...

    def finish(self, data: bytes = b"") -> None:
        """Send the last of a stream."""
        ...

    def answer(self, status: int, headers: dict[str, str], body: bytes, told: Told = NOTHING_TOLD) -> None:
        """Send a whole answer at once; `told` as in `start`."""
        ...

    async def drained(self) -> None:
        """Wait until a slow client has read what waits for it. Raises ClientGone."""
        ...


class ClientConnection(Protocol):
    """The connection of a client, whichever protocol owns it."""

    transport: Any
    buffer_bytes: int

    @property
    def writing_paused(self) -> bool:
        """More waits for the client than may."""
        ...

    def when_writable(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` when the client has read enough, or is gone."""
        ...


class HttpDownstream:
    """Downstream over a client's transport, for one answer."""

    __slots__ = (
        "_buffer_bytes",
        "_chunked",
        "_connection",
        "_ending",
        "_is_http_11",
        "_transport",
        "_waiting_most",
        "is_started",
        "keep_alive",
        "stall_s",
    )

    def __init__(
        self,
        connection: ClientConnection,
        *,
        is_http_11: bool,
        keep_alive: bool,
        stall_s: float,
        own_lines: bytes = b"",
    ) -> None:
        """`stall_s`: a client that reads nothing for this long is taken as gone. `own_lines`: headers that each answer on
        this connection has, as they stand in a head."""
        # What each piece of a stream needs comes first, to lie together.
        self._transport: Any = connection.transport
        self._buffer_bytes = connection.buffer_bytes
        self._chunked = False
        # What waits for the client is at most this, in bytes; how much it is before the first is not known.
        self._waiting_most = connection.buffer_bytes + 1
        self._connection = connection
        self._is_http_11 = is_http_11
        self._ending = own_lines
        self.stall_s = stall_s
        self.keep_alive = keep_alive
        self.is_started = False

    @property
    def is_gone(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    @property
    def is_full(self) -> bool:
        # Not `writing_paused`: uvloop says that at the end of a tick, in which an engine can send 8 MB. The transport
        # is asked only where so much can have come together since it was asked last.
        transport = self._transport
        if transport is None or self._waiting_most <= self._buffer_bytes:
            return False
        self._waiting_most = transport.get_write_buffer_size()
        return self._waiting_most > self._buffer_bytes

    def start(self, headers: dict[str, str], told: Told = NOTHING_TOLD) -> None:
        self.is_started = True
        self._chunked = self._is_http_11
        if not self._chunked:  # HTTP/1.0 knows no chunks: the end of the connection ends the body
            self.keep_alive = False
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        self._send(b"".join((STATUS_LINES[200], lines_of(headers), told.lines, framing, self._ended_head())))

    def write(self, data: bytes) -> None:
        self._send(chunk_of(data) if self._chunked else data)

    def write_on(self, data: bytes) -> None:
        """`write`, right after `is_gone` said that somebody is there."""
        piece = chunk_of(data) if self._chunked else data
        self._waiting_most += len(piece)
        self._transport.write(piece)

    def finish(self, data: bytes = b"") -> None:
        if self._chunked:
            self._send(chunk_of(data) + b"0\r\n\r\n" if data else b"0\r\n\r\n")
        elif data:
            self._send(data)

    def answer(self, status: int, headers: dict[str, str], body: bytes, told: Told = NOTHING_TOLD) -> None:
        self.is_started = True
        self._send(
            b"%b%b%bcontent-length: %d\r\n%b%b"
            % (STATUS_LINES[status], lines_of(headers), told.lines, len(body), self._ended_head(), body)
        )

    def _ended_head(self) -> bytes:
        """The last lines of a head: what this connection's answers have, and whether it is kept."""
        if self.keep_alive and self._is_http_11:
            return self._ending + END_OF_HEAD
        return self._ending + (KEEP_ALIVE if self.keep_alive else CLOSE)

    async def drained(self) -> None:
        connection, transport = self._connection, self._transport
        # To the end of this tick, when uvloop writes: most often the socket takes it all.
        await asyncio.sleep(0)
        left = transport.get_write_buffer_size()
        writable = asyncio.Event()
        connection.when_writable(writable.set)
        try:
            while connection.writing_paused and not self.is_gone:
                try:
                    async with asyncio.timeout(self.stall_s):
                        await writable.wait()
                except TimeoutError:
                    before, left = left, transport.get_write_buffer_size()
                    if left >= before:
                        transport.abort()
                        raise ClientGone("the client reads nothing") from None
        finally:
            connection.when_writable(None)
        if self.is_gone:
            raise ClientGone("the client left")

    def _send(self, data: bytes) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closing():
            self._waiting_most += len(data)
            transport.write(data)


def is_gone(down: Downstream) -> bool:
    """Nobody reads any more. Compiled, what most are is asked straight, and any other by the name of what is asked."""
    if isinstance(down, HttpDownstream):
        return down.is_gone
    return down.is_gone


def send_on(down: Downstream, data: bytes) -> bool:
    """Send some of a stream to who is not gone, in the same two ways. Returns whether more waits now than may."""
    if isinstance(down, HttpDownstream):
        down.write_on(data)
        return down.is_full
    down.write(data)
    return down.is_full


SIZES: Final = 1024
SIZE_LINES: Final = [b"%x\r\n" % size for size in range(SIZES)]
"""How chunks of a usual size begin."""


def chunk_of(data: bytes) -> bytes:
    """An HTTP chunk."""
    size = len(data)
    line = SIZE_LINES[size] if size < SIZES else b"%x\r\n" % size
    return b"%b%b\r\n" % (line, data)


def lines_of(headers: dict[str, str]) -> bytes:
    """Headers as they stand in a head, each with its end of line."""
    lines = ""
    for name, value in headers.items():
        lines += f"{name}: {value}\r\n"
    return lines.encode("latin-1")


def whole_head(status: int, headers: dict[str, str]) -> bytes:
    """A head with just these headers."""
    return b"".join((STATUS_LINES[status], lines_of(headers), b"\r\n"))


class Relayed(web.StreamResponse):
    """What a handler returns to aiohttp when the answer was already written; a broken one ends the connection."""

    def __init__(self, down: HttpDownstream, *, whole: bool) -> None:
        super().__init__()
        self._down = down
        self._relayed_keep_alive = down.keep_alive and whole

    @property
    def keep_alive(self) -> bool:
        return self._relayed_keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing to send."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing to send, but the connection's next request waits until this answer was read."""
        if self._down.is_full:
            with suppress(ClientGone):
                await self._down.drained()
