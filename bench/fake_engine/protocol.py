"""HTTP/1.1 on one socket, as uvicorn behaves: keep-alive of five seconds, a half-close ends the request.

It parses requests and writes bytes; what a path means is in `routes`.
"""

import asyncio
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from random import getrandbits
from typing import TYPE_CHECKING, cast

import httptools

from bench.fake_engine import routes

if TYPE_CHECKING:
    from bench.fake_engine.engine import Engine
    from bench.fake_engine.turns import Turn

PIPELINE_MAX = 16
INVALID = b"Invalid HTTP request received."


@dataclass(slots=True)
class Request:
    method: str = ""
    path: str = ""
    query: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    keep_alive: bool = True

    def header(self, name: bytes) -> str | None:
        for key, value in self.headers:
            if key == name:
                return value.decode("latin-1")
        return None


FULL_BYTES = 2**20


class Connection(asyncio.Protocol):
    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.is_paused = False
        self.last_headers = b""
        self.turn: Turn | None = None
        self.drip_gap_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._request = Request()
        self._chunks: list[bytes] = []
        self._is_busy = False
        self._keeps_alive = True
        self._queue: deque[Request] = deque(maxlen=PIPELINE_MAX)
        self._idle_since = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._dripping = deque[int]()
        self._after_drip: str = ""

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class does not derive from it
        self.engine.connections += 1

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError:
            plain = b"text/plain; charset=utf-8"
            answer = self.engine.stamp.whole(400, INVALID, content_type=plain, last=b"connection: close\r\n")
            self.write(answer)
            self.drop()

    def eof_received(self) -> bool:
        return False  # a half-closed client is gone: the transport closes, the turn is aborted

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.engine.connections -= 1
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self.turn is not None:
            self.turn.client_left()
            self.turn = None

    @property
    def is_full(self) -> bool:
        """More waits for the client than it will take in a while."""
        return self._transport is not None and self._transport.get_write_buffer_size() > FULL_BYTES

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False
        if self.turn is not None:
            self.turn.flush()

    # httptools

    def on_message_begin(self) -> None:
        self._request = Request()
        self._chunks = []

    def on_url(self, url: bytes) -> None:
        path, _, self._request.query = url.partition(b"?")
        self._request.path += path.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._request.method = self._parser.get_method().decode()
        self._request.keep_alive = self._parser.should_keep_alive()
        if self._request.header(b"expect") == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        request = self._request
        request.body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        if self._is_busy:
            self._queue.append(request)
        else:
            self._handle(request)

    # what turns and routes use

    def write(self, data: bytes) -> None:
        if self._transport is None:
            return
        if self.drip_gap_s:
            if not self._dripping:
                self.engine.wheel.at(self.engine.loop.time() + self.drip_gap_s, self._drip)
            self._dripping.extend(data)
        else:
            self._transport.write(data)

    def answer(
        self, status: int, body: bytes, content_type: bytes | None = b"application/json", first: bytes = b""
    ) -> None:
        self.write(
            self.engine.stamp.whole(
                status, body, content_type=content_type, first=first, last=self.last_headers
            )
        )
        self.done()

    def done(self) -> None:
        """The answer is complete: next request, idle, or close."""
        self.turn = None
        if self._dripping:
            self._after_drip = "done"
            return
        self.drip_gap_s = 0.0
        self._is_busy = False
        if self._transport is None:
            return
        if not self._keeps_alive:
            self._transport.close()
        elif self._queue:
            self._handle(self._queue.popleft())
        else:
            self._idle_since = self.engine.loop.time()
            if self._idle_timer is None:
                wait_s = self.engine.knobs.keep_alive_ms / 1000
                self._idle_timer = self.engine.loop.call_later(wait_s, self._close_idle)

    def drop(self) -> None:
        """FIN after what was written."""
        self.turn = None
        if self._dripping:
            self._after_drip = "drop"
        elif self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """RST, losing what was not sent yet."""
        self.turn = None
        if self._transport is None:
            return
        handle = self._transport.get_extra_info("socket")
        with socket.socket(fileno=os.dup(handle.fileno())) as twin:
            twin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _handle(self, request: Request) -> None:
        self._is_busy = True
        self._keeps_alive = request.keep_alive
        self.last_headers = b""
        if self.engine.config.request_id_headers:
            given = request.header(b"x-request-id") or f"{getrandbits(128):032x}"
            self.last_headers = b"x-request-id: %b\r\n" % given.encode("latin-1")
        if not request.keep_alive and request.header(b"connection") is not None:
            self.last_headers += b"connection: close\r\n"
        routes.handle(self.engine, self, request)

    def _close_idle(self) -> None:
        self._idle_timer = None
        if self._is_busy or self._transport is None:
            return
        left_s = self._idle_since + self.engine.knobs.keep_alive_ms / 1000 - self.engine.loop.time()
        if left_s <= 0.0005:
            self._transport.close()
        else:
            self._idle_timer = self.engine.loop.call_later(left_s, self._close_idle)

    def _drip(self, now: float) -> None:
        if self._transport is None:
            self._dripping.clear()
            return
        self._transport.write(bytes((self._dripping.popleft(),)))
        if self._dripping:
            self.engine.wheel.at(now + self.drip_gap_s, self._drip)
        elif self._after_drip:
            what, self._after_drip = self._after_drip, ""
            if what == "done":
                self.done()
            else:
                self.drop()
