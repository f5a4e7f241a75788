"""Our own HTTP/1.1 connection to an engine: a raw asyncio protocol over llhttp, used again for turn after turn.

It owns sockets and bytes on the engine's side; what the bytes mean is `gateway.relay.taps`, and which engine to ask is
`nodes.routing`. Whoever asked is told by a callback what came of it, and once a sink is attached every piece of the body
goes straight to that: no task waits for an answer or wakes for a chunk.
"""

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

import httptools

from config.clock import monotonic
from config.defaults import Settings
from gateway.lengths import body_bytes
from gateway.relay.digits import NINE, ZERO
from nodes.reach import Direct, Reach

log = logging.getLogger("poolgate.relay")

Sink = Callable[[bytes], None]

READ_AHEAD_BYTES = 65536
"""What may come of a body before whoever asked lets more of it come: libuv reads up to 8 MB in one go."""

LINGER_S = 1.0
"""How long a finished stream's connection may take to bring its last chunk before it is closed instead of kept."""


class UpstreamLost(Exception):
    """The engine's connection ended, or spoke no HTTP, before its answer was whole."""


class ConnectFailed(UpstreamLost):
    """The engine could not be reached."""


class UpstreamConnection(asyncio.Protocol):
    """One connection; `begin` starts a turn on it and says who gets the news, `attach` lets the body flow."""

    __slots__ = (
        "_chunk_lacks", "_come", "_is_between_chunks", "_is_parsing", "_keeps_alive", "_lacking", "_linger",
        "_look_at_bytes", "_loop", "_news", "_parser", "_pool", "_sink", "buffered", "closed", "complete", "failure",
        "is_paused", "last_data_s", "parts", "status", "transport", "turns",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: "UpstreamPool | None" = None) -> None:
        # What each piece of a stream needs comes first, to lie together.
        self._loop = loop
        self._sink: Sink | None = None
        self.last_data_s = 0.0
        self.failure: UpstreamLost | None = None
        self.complete = True
        self.is_paused = False
        self._is_parsing = False  # llhttp has seen some of this answer, so it sees all but whole chunks of it
        self._is_between_chunks = False
        self._pool = pool
        self._news: Callable[[], None] | None = None
        self.transport: Any = None
        self.closed = False
        self.turns = 0
        self._parser = httptools.HttpResponseParser(self)
        self._lacking = 0  # bytes of a plain answer that are still to come
        self._chunk_lacks = 0  # bytes that the chunk which llhttp is in seems to lack
        self._keeps_alive = False
        self._look_at_bytes = READ_AHEAD_BYTES
        self._linger: asyncio.TimerHandle | None = None
        self.status = 0
        self.parts: list[bytes] = []
        self.buffered = 0
        self._come: list[bytes] = []  # of a stream, in what was read at once

    # --- the turn's side --------------------------------------------------------------------------------------

    def begin(self, request: bytes, news: Callable[[], None]) -> None:
        """Send one request. The caller releases the connection, or closes it, exactly once afterwards.

        `news` is called when something came that no sink got: a status, some of the body, its end or a failure. It must not
        raise. After READ_AHEAD_BYTES no more comes before `read_on`.
        """
        self.status = 0
        self._is_between_chunks = self._is_parsing = False
        self._lacking = self._chunk_lacks = 0
        self._news = news
        self.parts.clear()
        self.buffered = 0
        self._look_at_bytes = READ_AHEAD_BYTES
        self.complete = False
        self.turns += 1
        self.last_data_s = self._loop.time()
        self.transport.write(request)

    def post(self, path: str, request_id: str, body: bytes, news: Callable[[], None]) -> None:
        """`begin` with a POST as this connection's pool writes it: the way that it goes decides on a part of the head."""
        assert self._pool is not None
        self.begin(self._pool.request(path, request_id, body), news)

    @property
    def is_over(self) -> bool:
        """No more bytes will come for this turn."""
        return self.complete or self.failure is not None

    @property
    def was_stale(self) -> bool:
        """An idle connection that turned out to be closed already: the request may be sent again on a new one."""
        return self.turns > 1 and self.status == 0 and self.failure is not None

    def read_on(self) -> None:
        """Let more of the body come before it is read no more."""
        self._look_at_bytes = self.buffered + READ_AHEAD_BYTES
        self.resume()

    def take(self) -> bytes:
        """The body bytes that came so far, which are then forgotten."""
        data = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        self.parts.clear()
        self.buffered = 0
        return data

    def peek(self) -> bytes:
        """The body bytes that came so far, kept for `take`."""
        if len(self.parts) > 1:
            self.parts = [b"".join(self.parts)]
        return self.parts[0] if self.parts else b""

    def attach(self, sink: Sink) -> None:
        """From now on body bytes go to `sink` as they arrive; what is buffered stays for `take`."""
        self._sink = sink

    def pause(self) -> None:
        """Stop reading the engine's socket: the kernel's window fills and the engine waits."""
        if not self.is_paused and not self.closed:
            self.is_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read again; silence is counted from now."""
        if self.is_paused and not self.closed:
            self.is_paused = False
            self.last_data_s = self._loop.time()
            self.transport.resume_reading()

    def release(self) -> None:
        """The turn got all that it wanted. A connection that is clean goes back to its pool, any other one is closed.

        After `[DONE]` the last chunk's few bytes may still be on their way: they get LINGER_S to come.
        """
        self._sink = self._news = None
        if self.closed or self.is_paused or self.failure is not None or self._pool is None:
            self.close()
        elif self.complete:
            self._go_idle()
        else:
            self._linger = self._loop.call_later(LINGER_S, self.close)

    def _go_idle(self) -> None:
        self._end_linger()
        self.parts.clear()
        self.buffered = 0
        if self._keeps_alive and self._pool is not None:
            self._pool.put(self)
        else:
            self.close()

    def _end_linger(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None

    def close(self) -> None:
        """Close at once, unsent bytes and all. This is how an engine learns that its work is not wanted: vLLM aborts
        within 65 ms."""
        self._sink = self._news = None
        self._end_linger()
        if not self.closed:
            self.closed = True
            if self.transport is not None:
                self.transport.abort()

    # --- asyncio's side ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.complete or self.failure is not None:
            self.close()  # bytes that nobody asked for: this connection can't be trusted with another turn
            return
        self.last_data_s = self._loop.time()
        if self._is_parsing:
            if self._is_between_chunks and self._sink is not None:
                start, end = plain_chunk(data, 0)
                # One whole chunk, as most reads of a stream are.
                if end == len(data) and is_closed(data, end):
                    self._pass_on(data[start : end - 2])
                    return
            self._parse(data)
        elif self._lacking:
            self._take_plain(data)
        elif head_bytes := self._plain_head(data):
            self.status = 200
            self._keeps_alive = True
            if len(data) > head_bytes:
                self._take_plain(data[head_bytes:])
        else:
            self._is_parsing = True
            self._parse(data)
        if (self._sink is None or self.complete) and self._news is not None:
            self._news()

    def _plain_head(self, data: bytes) -> int:
        """Length of the plain head that an answer begins with, which `_lacking` is set from. 0: it is another one.

        Most are the one before but for the digits of their length, which takes a tenth of the time to see.
        """
        pool = self._pool
        if pool is not None and pool.before_length:
            length = body_bytes(data, pool.before_length, pool.after_length)
            if length > 0:  # all of it came at once, as most do
                self._lacking = length
                return len(data) - length
        match = PLAIN_HEAD.match(data)
        if match is None:
            return 0
        if pool is not None and match.end() <= HEAD_KEPT_MAX:
            pool.before_length, pool.after_length = data[: match.start(1)], data[match.end(1) : match.end()]
        self._lacking = int(match[1])
        return match.end() if self._lacking else 0

    def _take_plain(self, body: bytes) -> None:
        """Some of the body of an answer whose head was plain."""
        if len(body) > self._lacking:  # the beginning of an answer that nobody asked for
            body = body[: self._lacking]
            self._keeps_alive = False
        self._lacking -= len(body)
        self.complete = self._lacking == 0
        if self._sink is not None:
            self._pass_on(body)
            return
        self._buffer(body)
        if self.complete:
            self.resume()

    def _parse(self, data: bytes) -> None:
        """Whole plain chunks are cut out here; llhttp sees the rest, to which it is as if they had never been."""
        at = 0 if self._is_between_chunks else self._until_chunk(data)
        if at and not self._feed(data if at == len(data) else data[:at]):
            return
        if at < len(data):
            if self._is_between_chunks:
                bodies = self._come if self._sink is not None else []
                at = cut_chunks(data, at, bodies)
                if self._sink is None and bodies:
                    self._buffer(b"".join(bodies))
            if at < len(data):
                self._chunk_lacks = max(0, plain_chunk(data, at)[1] - len(data))
                self._is_between_chunks = False  # in the first line of a chunk llhttp says nothing
                if not self._feed(data[at:] if at else data):
                    return
        if self._come:
            body = self._come[0] if len(self._come) == 1 else b"".join(self._come)
            self._come.clear()
            self._pass_on(body)

    def _until_chunk(self, data: bytes) -> int:
        """How much of `data` llhttp sees before it is asked whether it is between chunks.

        A guess, by what looks like the first line of a chunk; where it is wrong llhttp sees the rest too.
        """
        end = self._chunk_lacks
        if not end:
            head_bytes = data.find(b"\r\n\r\n") + 4 if self.status == 0 else 0
            end = plain_chunk(data, head_bytes)[1]
        self._chunk_lacks = max(0, end - len(data))
        return end if 0 < end < len(data) else len(data)

    def _feed(self, data: bytes) -> bool:
        """To llhttp. False: the connection has failed, and nothing may follow."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self.complete:  # what is right behind the answer is no part of it: see on_message_begin
                self._keeps_alive = False
                if self._news is None:  # released already, and perhaps idle
                    self.close()
                return True
            if isinstance(error, httptools.HttpParserCallbackError):
                log.exception("a relay failed on an engine's answer", extra={"action": "relay_failed"})
                self._fail(UpstreamLost("the engine's answer could not be relayed"))
            else:
                self._fail(UpstreamLost(f"the engine's answer is not HTTP: {type(error).__name__}"))
        except httptools.HttpParserUpgrade:
            self._fail(UpstreamLost("the engine answered with an upgrade"))
        else:
            return True
        return False

    def _pass_on(self, body: bytes) -> None:
        """To whoever reads the stream, in pieces as large as they came."""
        if self._sink is None:
            return
        try:
            self._sink(body)
        except Exception:
            log.exception("a relay failed on an engine's answer", extra={"action": "relay_failed"})
            self._fail(UpstreamLost("the engine's answer could not be relayed"))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if not self.complete:
            self._fail(UpstreamLost("the engine closed the connection before its answer was whole"))

    def _fail(self, failure: UpstreamLost) -> None:
        if self.failure is None and not self.complete:
            self.failure = failure
        news = self._news
        self.close()
        if news is not None:
            news()

    def _buffer(self, body: bytes) -> None:
        """Keep it for `take`."""
        self.parts.append(body)
        self.buffered += len(body)
        if self.buffered >= self._look_at_bytes and not self.complete:
            self.pause()

    # --- llhttp's side ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:  # it must not become part of this turn, nor of the next one
            raise UpstreamLost("an answer that nobody asked for")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:  # 100 Continue and 103 Early Hints come before the answer
            self.status = status

    def on_body(self, body: bytes) -> None:
        if self._sink is not None:
            self._come.append(body)
        else:
            self._buffer(body)

    def on_chunk_header(self) -> None:
        self._is_between_chunks = False

    def on_chunk_complete(self) -> None:
        self._is_between_chunks = True

    def on_message_complete(self) -> None:
        self._is_between_chunks = False
        if self.status >= 200:
            self.complete = True
            if self._sink is None:
                self.resume()
            self._keeps_alive = self._parser.should_keep_alive()
            if self._linger is not None:
                self._go_idle()


HEAD_KEPT_MAX = 1024
"""Bytes of a head that may be kept to know the next one by."""

LENGTH_DIGITS_MAX = 9
PLAIN_HEAD = re.compile(
    rb"HTTP/1\.1 200 OK\r\n(?:(?:date|server): [\x20-\x7e]*\r\n)*"
    rb"content-length: (\d{1,%d})\r\n(?:(?:content-type|vary|x-request-id): [\x20-\x7e]*\r\n)*\r\n"
    % LENGTH_DIGITS_MAX
)
"""A head as vLLM's server writes it above a whole answer; llhttp need not see those. With another field it is not plain."""


SIZE_DIGITS_MAX: Final = 4
"""Of a chunk that is cut out here: a larger one costs llhttp nothing to speak of."""

CR: Final = 0x0D
LF: Final = 0x0A
A: Final = 0x61
F: Final = 0x66


def plain_chunk(data: bytes, at: int) -> tuple[int, int]:
    """Of the chunk that begins at `at`, where what is in it begins and where it ends, be that past `data`.

    Zeros: no chunk begins there, or one that is not plain: with more than its size in its first line, or its size written
    otherwise than usual. That its end is there and closes it is for `is_closed` to say.
    """
    size = 0
    for place in range(at, min(at + SIZE_DIGITS_MAX + 1, len(data) - 1)):
        byte = data[place]
        if ZERO <= byte <= NINE:
            size = size * 16 + byte - ZERO
        elif A <= byte <= F:
            size = size * 16 + byte - A + 10
        elif byte == CR and size and data[place + 1] == LF and data[at] != ZERO:
            return place + 2, place + 4 + size
        else:
            break
    return 0, 0


def is_closed(data: bytes, end: int) -> bool:
    """Whether a line ends there, as at the end of a chunk."""
    return data[end - 2] == CR and data[end - 1] == LF


def cut_chunks(data: bytes, at: int, bodies: list[bytes]) -> int:
    """Append what is in the whole plain chunks from `at` on. Returns where the last of these ends."""
    while True:
        start, end = plain_chunk(data, at)
        if not start or end > len(data) or not is_closed(data, end):
            return at
        bodies.append(data[start : end - 2])
        at = end


class Ways(Protocol):
    """How connections to engines are opened (`gateway.reach.ways`)."""

    async def open(self, reach: Reach, factory: Callable[[], asyncio.Protocol]) -> None:
        """Connect the protocol that `factory` makes. Raises OSError."""
        ...

    def head_lines(self, reach: Reach) -> bytes:
        """What each request's head has there beside what it has for any engine."""
        ...


class UpstreamPool:
    """Connections to one engine: the youngest idle one is used first, and those past `engine_idle_s` never again."""

    def __init__(
        self,
        host: str,
        port: int,
        settings: Settings,
        *,
        reach: Reach | None = None,
        ways: Ways | None = None,
    ) -> None:
        """`reach`: the way to it, of which `ways` opens connections; without these, straight to host and port."""
        self.host = host
        self.port = port
        self.reach = reach or Direct(host, port)
        self._ways = ways
        self._settings = settings
        self._idle: deque[tuple[UpstreamConnection, float]] = deque()
        self._closed = False
        self._heads: dict[str, bytes] = {}  # by path: there are five
        # Of the last plain head, around the digits of its length.
        self.before_length = self.after_length = b""

    def __repr__(self) -> str:
        return f"<UpstreamPool {self.host}:{self.port} idle={len(self._idle)}>"

    def idle(self) -> UpstreamConnection | None:
        """An idle connection that is young enough, if there is one."""
        oldest_s = monotonic() - self._settings.engine_idle_s
        while self._idle:
            connection, since_s = self._idle.pop()
            if connection.closed:
                continue
            if since_s < oldest_s:
                connection.close()
                self._drop_idle()  # the rest is older still
                return None
            return connection
        return None

    async def connect(self) -> UpstreamConnection:
        """A new connection. Raises ConnectFailed."""
        loop = asyncio.get_running_loop()
        connection = UpstreamConnection(loop, self)
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                if self._ways is None:
                    await loop.create_connection(lambda: connection, self.host, self.port)
                else:
                    await self._ways.open(self.reach, lambda: connection)
        except TimeoutError as error:
            raise ConnectFailed("connecting to the engine took too long") from error
        except OSError as error:
            raise ConnectFailed("the engine can't be reached") from error
        return connection

    def request(self, path: str, request_id: str, body: bytes) -> bytes:
        """One POST to the engine. Only these headers are sent: a client's own never reach an engine."""
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = (
                self._head("POST", path) + b"content-type: application/json\r\nx-request-id: "
            )
        return b"%b%b\r\ncontent-length: %d\r\n\r\n%b" % (head, request_id.encode(), len(body), body)

    def bare(self, path: str) -> bytes:
        """One GET to the engine."""
        return self._head("GET", path) + b"\r\n"

    def _head(self, method: str, path: str) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        more = self._ways.head_lines(self.reach) if self._ways is not None else b""
        return f"{method} {path} HTTP/1.1\r\nhost: {host}:{self.port}\r\n".encode("ascii") + more

    def put(self, connection: UpstreamConnection) -> None:
        """Keep a clean connection for the next turn."""
        if self._closed or len(self._idle) >= self._settings.engine_idle_connections_max:
            connection.close()
            return
        now_s = monotonic()
        oldest_s = now_s - self._settings.engine_idle_s
        while self._idle and self._idle[0][1] < oldest_s:
            self._idle.popleft()[0].close()
        self._idle.append((connection, now_s))

    def _drop_idle(self) -> None:
        while self._idle:
            self._idle.popleft()[0].close()

    def close(self) -> None:
        """Close idle connections; those in use close when they are released."""
        self._closed = True
        self._drop_idle()
