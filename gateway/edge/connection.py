"""One client's connection: cuts what comes into requests, one at a time, and sees to it that each comes in time.

A plain request for a turn is served here (`turns`), any other one by aiohttp (`handover`), which gets exactly its bytes.
What comes behind a request waits until that is answered, a bounded part of it here and the rest in the kernel.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from gateway.api.inference import AskOf
from gateway.edge.handover import ClientProtocol, Lent
from gateway.edge.head import Head, read_head
from gateway.errors import ApiError, RequestTimeout

if TYPE_CHECKING:
    from gateway.edge.door import Door

END_OF_HEAD: Final = b"\r\n\r\n"

HEAD_BYTES_MAX: Final = 65536
"""Of a head that has not ended it is aiohttp that says no: 128 fields within their bound may be longer than this."""

AHEAD_BYTES_MAX: Final = 65536
"""Bytes kept of what a client sends before its last request was answered; beyond it the socket is not read."""

EMPTY_LINES = re.compile(rb"(?:\r\n)+")

HARDLY_HTTP = re.compile(rb"\A(?!\r\Z|[A-Z]{1,20}(?: |\Z))|[^\r]\n|\x00")
"""In a head that has not ended: it is no request, or has a line end that is none. llhttp says so at once."""

NEVER: Final = float("inf")


class ServedTurn(Protocol):
    """One request that is served here, and its answer's way (`EdgeTurn`)."""

    def begin(self, body: bytes) -> None:
        """Answer it; `answered` is called when that is done, perhaps before this returns."""
        ...

    def end_keep_alive(self) -> None:
        """The worker ends: if the answer has not begun it says so."""
        ...

    def leave(self) -> None:
        """The client left."""
        ...


class Turns(Protocol):
    """Begins them (`EdgeTurns`)."""

    @property
    def routes(self) -> Mapping[bytes, AskOf]:
        """How a request for each path that is served here is decoded."""
        ...

    def begun(self, connection: "EdgeConnection", head: Head) -> ServedTurn:
        """One request's turn, to be begun with its body."""
        ...

    def knows(self, head: Head) -> bool:
        """Whether memory knows the key of a request."""
        ...

    def drain(self) -> None:
        """From now on each answer asks its client to go elsewhere."""
        ...


class Over:
    """Stands where a turn stood while its client has yet to read, or when the connection ends: no other one begins."""

    def leave(self) -> None:
        """Nothing is left to end."""

    def end_keep_alive(self) -> None:
        """Nothing is left to say."""


OVER: Final = Over()


class EdgeConnection(asyncio.Protocol):
    """The protocol of a client's connection, from its first byte to its last.

    It always waits for something that is bounded: for its turn or for aiohttp's, else until `ends_s`.
    """

    __slots__ = (
        "_ahead", "_door", "_handler", "_head", "_is_paused", "_left", "_on_writable", "_reading", "_scanned",
        "_turn", "_unread", "buffer_bytes", "ends_s", "transport", "writing_paused",
    )  # fmt: skip

    def __init__(self, door: "Door") -> None:
        self._door = door
        self._ahead = bytearray()  # what came and is not served yet
        self._scanned = 0  # bytes of it that hold no end of a head
        self._head: Head | None = None  # of the last turn, for the next one
        self._reading: Head | None = None  # of a request whose body is still to come
        self._turn: ServedTurn | Over | None = None
        self._handler: ClientProtocol | None = None
        self._left = 0  # bytes that aiohttp's single request still lacks
        self._is_paused = False  # we read no more until `_ahead` is shorter
        self._unread: int | None = None  # bytes that the client has to read before `ends_s`
        self._on_writable: Callable[[], None] | None = None
        self.buffer_bytes = door.settings.stream_buffer_bytes
        self.writing_paused = False
        self.transport: Any = None
        self.ends_s = NEVER

    def __repr__(self) -> str:
        at = (
            "aiohttp" if self._handler else "body" if self._reading else "waiting" if self._turn is None
            else "over" if self._turn is OVER else "turn"
        )  # fmt: skip
        return f"<EdgeConnection {at} ahead={len(self._ahead)}>"

    # --- asyncio's side -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.set_write_buffer_limits(high=self.buffer_bytes)
        self._wait(self._door.first_s)
        self._door.connections.add(self)  # again, if its TLS handshake had been given up

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
        self._wait_for_reader()
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
        handler = self._handler
        if handler is not None:
            if not handler.writing_paused:
                handler.pause_writing()
        elif self._turn is None:
            self._turn = OVER
        elif self._turn is not OVER:
            return  # the turn waits for its client itself
        self._wait_for_reader()

    def resume_writing(self) -> None:
        self.writing_paused = False
        if not self.transport.is_closing():
            self._go_on_writing()
        self._wake()

    def _go_on_writing(self) -> None:
        self._unread = None
        handler = self._handler
        if handler is not None:
            self.ends_s = NEVER if handler.is_single else self._door.now_s + self._door.idle_s
            if handler.writing_paused:
                handler.resume_writing()
        elif self._turn is OVER:
            self._turn = None
            self._go_on(keep_alive=True)

    def when_writable(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` when the client has read enough, or is gone."""
        self._on_writable = callback

    def _wake(self) -> None:
        if self._on_writable is not None:
            self._on_writable()

    # --- requests -------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Take the next request, if it has come whole; else wait for more of it."""
        head = self._reading or self._next_head()
        if head is None:
            return
        size = head.size + head.body_bytes
        if len(self._ahead) < size:
            if self._reading is None and not self._begin_body(head):
                self._give(head)
                return
            self._read_on()
            return
        self._reading = None
        body = bytes(memoryview(self._ahead)[head.size : size])
        del self._ahead[:size]
        if len(self._ahead) <= AHEAD_BYTES_MAX:
            self._read_on()
        self._begin(head, body)

    def _begin_body(self, head: Head) -> bool:
        """Wait for the body of a request whose key is known; aiohttp's handler asks for others before it takes one in."""
        if not self._door.turns.knows(head):
            return False
        self._reading = head
        self._wait(self._door.settings.body_timeout_s)
        return True

    def _next_head(self) -> Head | None:
        """The head of a turn that has come whole. None: it has not, or it was no turn's, and aiohttp has it."""
        ahead = self._ahead
        if empty := EMPTY_LINES.match(ahead):  # RFC 9112 2.2: before a request they are no part of it
            del ahead[: empty.end()]
            self._scanned = 0
        if not ahead:
            self._read_on()
            return None
        end = ahead.find(END_OF_HEAD, max(0, self._scanned - 3))
        if end < 0:
            self._wait_for_head()
            return None
        self._scanned = 0
        raw = bytes(ahead[: end + 4])
        head = read_head(raw)
        if head is None or len(raw) > self._door.settings.header_bytes_max or not self._door.takes(head):
            self._give(head)
            return None
        return head

    def _wait_for_head(self) -> None:
        """The end of a head has not come; where none may come, it is aiohttp's."""
        ahead = self._ahead
        if len(ahead) > HEAD_BYTES_MAX or HARDLY_HTTP.search(ahead, max(0, self._scanned - 1)):
            self._give(None)
            return
        if self._scanned == 0 and ahead != b"\r":  # that may be half of an empty line, which buys no time
            self._wait(self._door.settings.head_timeout_s)
        self._scanned = len(ahead)
        self._read_on()

    def _begin(self, head: Head, body: bytes) -> None:
        self._head = head
        self.ends_s = NEVER
        turn = self._turn = self._door.turns.begun(self, head)
        turn.begin(body)

    def answered(self, turn: ServedTurn, *, keep_alive: bool) -> None:
        """The turn is over: on to the next request, or to the end."""
        if self._turn is not turn:
            return
        self._turn = None
        self._go_on(keep_alive=keep_alive)

    def key_refused(self, head: Head) -> None:
        """A turn's key was none."""
        forwarded_for = head.all_fields().get(b"x-forwarded-for", b"").decode("latin-1")
        self._door.refused_keys.add(self.transport, forwarded_for)

    def _go_on(self, *, keep_alive: bool) -> None:
        if not keep_alive:
            self._close()
            return
        if self.writing_paused:  # `resume_writing` goes on from here
            self._turn = OVER
            self._wait_for_reader()
            return
        self.ends_s = self._door.now_s + self._door.idle_s
        if self._ahead:
            self._hold()  # while turns are answered at once, what comes is never kept by `_keep`
            asyncio.get_running_loop().call_soon(self._advance_later)
        else:
            self._read_on()

    def _advance_later(self) -> None:
        """In a tick of its own: a client's many requests at once are not one recursion, nor one long tick."""
        is_free = self._turn is None and self._handler is None
        if is_free and self._ahead and not self.transport.is_closing():
            self._advance()

    def _keep(self, data: bytes) -> None:
        """For later; when the connection ends there is none."""
        if self.transport.is_closing():
            return
        self._ahead += data
        self._hold()

    def _hold(self) -> None:
        """Read no more while so much is kept."""
        if len(self._ahead) > AHEAD_BYTES_MAX and not self._is_paused:
            self._is_paused = True
            self.transport.pause_reading()

    def _read_on(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self.transport.resume_reading()

    # --- aiohttp's requests ---------------------------------------------------------------------------------------

    def _give(self, head: Head | None) -> None:
        """This request is aiohttp's; without a head that says where it ends, so is the connection from here on."""
        self._scanned = 0
        handler = self._handler = self._door.handler()
        if head is None:
            self._wait(self._door.settings.head_timeout_s)
        else:
            self.ends_s = NEVER
            handler.is_single = True
            self._left = head.size + head.body_bytes
        handler.connection_made(Lent(self))  # type: ignore[arg-type]
        if self.writing_paused and not handler.writing_paused:
            handler.pause_writing()
        self._read_on()
        data, self._ahead = bytes(self._ahead), bytearray()
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        """What came belongs to aiohttp's request, as much of it as that lacks."""
        handler = self._handler
        assert handler is not None
        if not handler.is_single:
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

    @property
    def is_reading_held(self) -> bool:
        """Whether reading is to stay paused, whatever aiohttp's handler thinks."""
        return self._is_paused

    def given_back(self) -> None:
        """aiohttp closed what it took for its connection: it is done."""
        if not self._goes_on:
            self.transport.close()  # at once: a flood would be read for one tick more
        asyncio.get_running_loop().call_soon(self._take_back)

    @property
    def _goes_on(self) -> bool:
        """Whether another request may follow the one that aiohttp answered."""
        handler = self._handler
        return handler is not None and handler.is_single and handler.keeps_alive and self._left == 0

    def _take_back(self) -> None:
        goes_on = self._goes_on
        handler, self._handler = self._handler, None
        if handler is None:
            return
        handler.connection_lost(None)
        self._unread = None
        if not self._is_paused and not self.transport.is_closing():
            self.transport.resume_reading()  # aiohttp may have paused it
        self._go_on(keep_alive=goes_on and not self.transport.is_closing())

    # --- time -----------------------------------------------------------------------------------------------------

    def _wait(self, bound_s: float) -> None:
        self.ends_s = self._door.time() + bound_s

    def _wait_for_reader(self) -> None:
        """The client is to read what was sent, or some of it."""
        self._unread = self.transport.get_write_buffer_size()
        self._wait(self._door.settings.client_stall_s)

    def drain(self, ends_s: float) -> None:
        """The worker ends: the answer to a turn closes the connection, and without a request it is closed at `ends_s`."""
        if self._turn is not None:
            self._turn.end_keep_alive()
        elif self.is_idle:
            self.ends_s = min(self.ends_s, ends_s)

    @property
    def is_idle(self) -> bool:
        """No request has begun."""
        if self._handler is not None:
            return not self._handler.is_single and self._handler.is_waiting
        return self._turn is None and self._reading is None and not self._ahead

    def time_out(self) -> None:
        """What was waited for did not come: an idle connection ends, a request that is late is told so."""
        self.ends_s = NEVER
        if self.transport is None:  # its TLS handshake came to nothing
            self._door.connections.discard(self)
        elif self._unread is not None:
            self._end_unread(self._unread)
        elif self._handler is not None:
            self._end_aiohttps(self._handler)
        else:
            if not self.is_idle:
                part = "head" if self._reading is None else "body"
                self.refuse(RequestTimeout(f"The request's {part} took too long to arrive."))
            self._close()

    def _end_unread(self, before: int) -> None:
        """A client that read nothing for so long is taken as gone."""
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._wait_for_reader()

    def _end_aiohttps(self, handler: ClientProtocol) -> None:
        """aiohttp answers for as long as it takes; between requests it has the same bounds as everybody."""
        idle_s = self._door.idle_s
        if not handler.is_waiting:
            self._wait(idle_s)
        elif handler.answered_s + idle_s > self._door.time():
            self.ends_s = handler.answered_s + idle_s
        else:
            if not handler.has_answered:
                self.refuse(RequestTimeout("The request's head took too long to arrive."))
            handler.force_close()

    def refuse(self, error: ApiError) -> None:
        """Say no to what never became a request. The connection is to be closed."""
        self.transport.write(self._door.refusal(error))

    def _close(self) -> None:
        """The end, once the client has read what was sent."""
        self._turn = OVER
        self._reading = None
        self._ahead.clear()
        self.transport.close()
        self._wait_for_reader()
