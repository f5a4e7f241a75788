"""One client's connection: cuts what comes into requests, one at a time, and sees to it that each comes in time.

A plain request for a turn is served here (`turns`), any other one by aiohttp (`handover`), which gets exactly its bytes.
What comes behind a request waits until that is answered, a bounded part of it here and the rest in the kernel.
"""

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway.edge.handover import ClientProtocol, Lent
from gateway.edge.head import Head, read_head
from gateway.edge.turns import EdgeTurn
from gateway.errors import ApiError, RequestTimeout

if TYPE_CHECKING:
    from gateway.edge.door import Door

END_OF_HEAD = b"\r\n\r\n"

HEAD_BYTES_MAX = 65536
"""Of a head that has not ended it is aiohttp that says no: 128 fields within their bound may be longer than this."""

AHEAD_BYTES_MAX = 65536
"""Bytes kept of what a client sends before its last request was answered; beyond it the socket is not read."""

HARDLY_HTTP = re.compile(rb"\A(?![A-Z]{1,20}(?: |\Z))|[^\r]\n|\x00")
"""In a head that has not ended: it is no request, or has a line end that is none. llhttp says so at once."""

NEVER = float("inf")


class EdgeConnection(asyncio.Protocol):
    """The protocol of a client's connection, from its first byte to its last."""

    __slots__ = (
        "_ahead", "_door", "_handler", "_head", "_is_aiohttps", "_is_paused", "_left", "_on_writable", "_reading",
        "_scanned", "_turn", "buffer_bytes", "ends_s", "transport", "writing_paused",
    )  # fmt: skip

    def __init__(self, door: "Door") -> None:
        self._door = door
        self._ahead = bytearray()  # what came and is not served yet
        self._scanned = 0  # bytes of it that hold no end of a head
        self._head: Head | None = None  # of the last turn, for the next one
        self._reading: Head | None = None  # of a request whose body is still to come
        self._turn: EdgeTurn | None = None
        self._handler: ClientProtocol | None = None
        self._is_aiohttps = False
        self._left = 0  # bytes that aiohttp's single request still lacks
        self._is_paused = False
        self._on_writable: Callable[[], None] | None = None
        self.buffer_bytes = door.settings.stream_buffer_bytes
        self.writing_paused = False
        self.transport: Any = None
        self.ends_s = NEVER

    def __repr__(self) -> str:
        at = "turn" if self._turn else "aiohttp" if self._handler else "body" if self._reading else "waiting"
        return f"<EdgeConnection {at} ahead={len(self._ahead)}>"

    # --- asyncio's side -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.set_write_buffer_limits(high=self.buffer_bytes)
        self.ends_s = self._door.now_s + self._door.settings.head_timeout_s
        self._door.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._handler is not None:
            self._feed(data)
        elif self._turn is not None:
            self._keep(data)
        elif self._ahead:
            self._ahead += data
            self._advance()
        else:
            head = self._head
            if head is not None and (body := head.body_again(data)) is not None:
                self._begin(head, body)
            else:
                self._ahead += data
                self._advance()

    def eof_received(self) -> bool:
        """A client that ends its side is taken as gone, as nginx takes it: nothing else tells that one left."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.connections.discard(self)
        self.ends_s = NEVER
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.connection_lost(exc)
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.leave()
        self._wake()

    def pause_writing(self) -> None:
        self.writing_paused = True
        if self._handler is not None:
            self._handler.pause_writing()

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self._handler is not None:
            self._handler.resume_writing()
        self._wake()

    def when_writable(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` when the client has read enough, or is gone."""
        self._on_writable = callback

    def _wake(self) -> None:
        if self._on_writable is not None:
            self._on_writable()

    # --- requests -------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Take what came as far as it goes: to the end of a request, or to where more has to come."""
        while self._turn is None and self._handler is None and not self.transport.is_closing():
            head = self._reading or self._next_head()
            if head is None:
                return
            size = head.size + head.body_bytes
            if len(self._ahead) < size:
                if self._reading is None:
                    if not self._door.turns.knows(
                        head
                    ):  # aiohttp's handler asks for the key before it takes a body in
                        self._give(head)
                        return
                    self._reading = head
                    self.ends_s = self._door.now_s + self._door.settings.body_timeout_s
                return
            self._reading = None
            body = bytes(self._ahead[head.size : size])
            del self._ahead[:size]
            self._begin(head, body)

    def _next_head(self) -> Head | None:
        """The head of a turn that has come whole. None: it has not, or it was no turn's, and aiohttp has it."""
        ahead = self._ahead
        while ahead.startswith(b"\r\n"):  # RFC 9112 2.2: empty lines before a request are no part of it
            del ahead[:2]
        if not ahead:
            self._wait(self._door.idle_s)
            return None
        end = ahead.find(END_OF_HEAD, max(0, self._scanned - 3))
        if end < 0:
            if len(ahead) > HEAD_BYTES_MAX or HARDLY_HTTP.search(ahead, max(0, self._scanned - 1)):
                self._give(None)
            else:
                if self._scanned == 0:
                    self._wait(self._door.settings.head_timeout_s)
                self._scanned = len(ahead)
            return None
        self._scanned = 0
        raw = bytes(ahead[: end + 4])
        head = read_head(raw)
        if head is None or len(raw) > self._door.settings.header_bytes_max or not self._door.takes(head):
            self._give(head)
            return None
        return head

    def _begin(self, head: Head, body: bytes) -> None:
        self._head = head
        self.ends_s = NEVER
        turn = self._turn = EdgeTurn(self._door.turns, self, head)
        turn.begin(body)

    def answered(self, turn: EdgeTurn, *, keep_alive: bool) -> None:
        """The turn is over: on to the next request, or to the end."""
        if self._turn is not turn:
            return
        self._turn = None
        self._go_on(keep_alive=keep_alive)

    def _go_on(self, *, keep_alive: bool) -> None:
        if not keep_alive:
            self.transport.close()
            return
        self.ends_s = self._door.now_s + self._door.idle_s
        if self._is_paused:
            self._is_paused = False
            self.transport.resume_reading()
        if self._ahead:
            asyncio.get_running_loop().call_soon(self._advance_later)

    def _advance_later(self) -> None:
        """In a tick of its own: a client's many requests at once are not one recursion, nor one long tick."""
        if self._ahead and not self.transport.is_closing():
            self._advance()

    def _keep(self, data: bytes) -> None:
        self._ahead += data
        if len(self._ahead) > AHEAD_BYTES_MAX and not self._is_paused:
            self._is_paused = True
            self.transport.pause_reading()

    # --- aiohttp's requests ---------------------------------------------------------------------------------------

    def _give(self, head: Head | None) -> None:
        """This request is aiohttp's; without a head that says where it ends, so is the connection from here on."""
        self.ends_s = NEVER
        self._scanned = 0
        handler = self._handler = self._door.handler()
        if head is None:
            self._is_aiohttps = True
            handler.connection_made(self.transport)
        else:
            handler.is_single = True
            self._left = head.size + head.body_bytes
            handler.connection_made(Lent(self.transport, self._given_back))  # type: ignore[arg-type]
        if self.writing_paused:
            handler.pause_writing()
        data, self._ahead = bytes(self._ahead), bytearray()
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        """What came belongs to aiohttp's request, as much of it as that lacks."""
        handler = self._handler
        assert handler is not None
        if self._is_aiohttps:
            handler.data_received(data)
            return
        left = self._left
        if left:
            self._left = max(0, left - len(data))
            handler.data_received(data[:left] if len(data) > left else data)
            if self._left == 0:
                handler.fed()
            data = data[left:]
        if data:
            self._keep(data)

    def _given_back(self) -> None:
        """aiohttp closed what it took for its connection: it is done."""
        asyncio.get_running_loop().call_soon(self._take_back)

    def _take_back(self) -> None:
        handler, self._handler = self._handler, None
        if handler is None:
            return
        handler.connection_lost(None)
        if not self._is_paused:
            self.transport.resume_reading()  # aiohttp may have paused it
        self._go_on(keep_alive=handler.keeps_alive and self._left == 0)

    # --- time -----------------------------------------------------------------------------------------------------

    def _wait(self, bound_s: float) -> None:
        self.ends_s = self._door.now_s + bound_s

    @property
    def is_idle(self) -> bool:
        """No request has begun."""
        return self._turn is None and self._handler is None and self._reading is None and not self._ahead

    def time_out(self) -> None:
        """What was waited for did not come: an idle connection ends, a request that is late is told so."""
        self.ends_s = NEVER
        if not self.is_idle:
            self.refuse(RequestTimeout())
        self.transport.close()

    def refuse(self, error: ApiError) -> None:
        """Say no to what never became a request. The connection is to be closed."""
        self.transport.write(self._door.refusal(error))
