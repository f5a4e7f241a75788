"""The client's side of a turn: raw HTTP/1.1 onto the client's transport, so that a chunk costs one write and no task.

aiohttp parses the request and keeps the connection; an answer of a turn is written here, head included, and aiohttp is
handed a `Relayed` that has nothing left to write. Bytes that wait for a slow client are never more than one chunk above the
transport's limit, because the lifecycle pauses the engine when `is_full`.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Protocol, cast

from aiohttp import web

EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold events back
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

    def start(self, headers: Mapping[str, str]) -> None:
        """Send status 200 and the head of a stream."""
        ...

    def write(self, data: bytes) -> None:
        """Send some of a stream."""
        ...

    def finish(self, data: bytes = b"") -> None:
        """Send the last of a stream."""
        ...

    def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send a whole answer at once."""
        ...

    async def drained(self) -> None:
        """Wait until a slow client has read what waits for it. Raises ClientGone."""
        ...


class HttpDownstream:
    """Downstream over the transport of an aiohttp request."""

    __slots__ = (
        "_buffer_bytes",
        "_chunked",
        "_is_http_11",
        "_protocol",
        "_transport",
        "is_started",
        "keep_alive",
        "stall_s",
    )

    def __init__(self, request: web.Request, *, stall_s: float, keeps_alive: bool = True) -> None:
        """`stall_s`: a client that reads nothing for this long is taken as gone."""
        self.stall_s = stall_s
        protocol = request.protocol
        assert isinstance(protocol, ClientProtocol)
        self._protocol = protocol
        self._buffer_bytes = protocol.buffer_bytes
        self._transport: Any = request.transport
        self._is_http_11 = request.version >= (1, 1)
        self._chunked = False
        self.keep_alive = request.keep_alive and keeps_alive
        self.is_started = False

    @property
    def is_gone(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    @property
    def is_full(self) -> bool:
        # Not `writing_paused`: uvloop says that at the end of a tick, in which an engine can send 8 MB.
        return self._transport is not None and self._transport.get_write_buffer_size() > self._buffer_bytes

    def start(self, headers: Mapping[str, str]) -> None:
        self.is_started = True
        self._chunked = self._is_http_11
        if not self._chunked:  # HTTP/1.0 knows no chunks: the end of the connection ends the body
            self.keep_alive = False
        framing = {"transfer-encoding": "chunked"} if self._chunked else {}
        self._send(self._head(200, {**headers, **framing}))

    def write(self, data: bytes) -> None:
        self._send(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def finish(self, data: bytes = b"") -> None:
        if self._chunked:
            last = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            self._send(last + b"0\r\n\r\n")
        elif data:
            self._send(data)

    def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.is_started = True
        self._send(self._head(status, {**headers, "content-length": str(len(body))}) + body)

    async def drained(self) -> None:
        protocol = self._protocol
        # To the end of this tick, when uvloop writes: most often the socket takes it all.
        await asyncio.sleep(0)
        left = self._transport.get_write_buffer_size()
        writable = asyncio.Event()
        protocol.when_writable(writable.set)
        try:
            while protocol.writing_paused and not self.is_gone:
                try:
                    async with asyncio.timeout(self.stall_s):
                        await writable.wait()
                except TimeoutError:
                    before, left = left, self._transport.get_write_buffer_size()
                    if left >= before:
                        self._transport.abort()
                        raise ClientGone("the client reads nothing") from None
        finally:
            protocol.when_writable(None)
        if self.is_gone:
            raise ClientGone("the client left")

    def _send(self, data: bytes) -> None:
        if not self.is_gone:
            self._transport.write(data)

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines.extend(f"{name}: {value}" for name, value in headers.items())
        if not self.keep_alive:
            lines.append("connection: close")
        elif not self._is_http_11:
            lines.append("connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


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


BadRequestHandler = Callable[[int, BaseException | None, str | None], web.Response]


class ClientProtocol(web.RequestHandler):
    """aiohttp's connection, which also tells when a slow client reads again and renders errors in our shapes."""

    __slots__ = ("_on_bad_request", "_on_writable", "buffer_bytes")

    def __init__(
        self, manager: Any, *, on_bad_request: BadRequestHandler, buffer_bytes: int, **options: Any
    ) -> None:
        """`buffer_bytes`: what may wait for a slow client before its engine is paused."""
        super().__init__(manager, **options)
        self.buffer_bytes = buffer_bytes
        self._on_writable: Callable[[], None] | None = None
        self._on_bad_request = on_bad_request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # uvloop's transports are no subclasses of asyncio's.
        cast("asyncio.WriteTransport", transport).set_write_buffer_limits(high=self.buffer_bytes)

    def when_writable(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` when the client has read enough, or is gone."""
        self._on_writable = callback

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._on_writable is not None:
            self._on_writable()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if self._on_writable is not None:
            self._on_writable()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """What aiohttp refuses before any handler is asked, as an unknown `Expect`, gets our shape too."""
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            resp = self._on_bad_request(resp.status, resp, None)
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP, or escaped every handler: one answer in our shape, and the connection ends."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        answer = self._on_bad_request(status, exc, message)
        answer.force_close()
        return answer
