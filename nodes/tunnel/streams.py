"""Many streams over one carrier of messages: each has its own window, and is a transport to the protocol that uses it.

It owns who may send how much and when a stream ends; which websocket carries the bytes is `nodes.tunnel.carrier`'s. Both
ends are the same, but for that the gateway opens streams and the agent accepts them.

What is bounded: a stream has at most a window of bytes under way or waiting for a reader who is paused, and what waits to be
sent pauses its writer. One that does not read costs its window and nothing else: no other stream waits for it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from nodes.tunnel.frames import (
    CLOSE,
    CREDIT,
    DATA,
    DRAIN,
    NAME_BYTES_MAX,
    OPEN,
    PAYLOAD_MAX,
    REASON_BYTES_MAX,
    RESET,
    STREAMS_END,
    BadFrame,
    Frame,
    credit,
    credited,
    decode,
    encode,
    text,
)

log = logging.getLogger("poolgate.tunnel")

UNSENT_HIGH, UNSENT_LOW = 65536, 16384
"""Bytes of a stream that wait to be sent: past the first its writer is paused, below the second it goes on."""

CLOGGED, CLEAR = 2**20, 2**18
"""Bytes of all streams that the carrier has not taken yet: past the first, streams keep theirs until the second."""

STUCK = 2**25
"""Past it, which openings and endings of streams alone come to after a long while, the other end reads nothing any more."""

MESSAGE_BYTES = 2**18
"""What one message carries at most, but for a last frame."""


class TunnelLost(ConnectionError):
    """There is no tunnel, or none that takes another stream."""


class Stream:
    """One stream, as asyncio's transports are: `write`, `pause_reading`, `abort` and so on. Made by `Tunnel`.

    Its protocol hears `connection_made` before the first byte and `connection_lost` at the end, from the loop.
    """

    __slots__ = (
        "_arrived", "_consumed", "_credit", "_ends", "_is_closed", "_is_paused", "_is_writer_paused", "_left", "_number",
        "_protocol", "_tunnel", "_unsent", "_unsent_bytes", "name",
    )  # fmt: skip

    def __init__(self, tunnel: "Tunnel", number: int, name: str, window: int) -> None:
        self.name = name  # of the engine that it goes to
        self._tunnel = tunnel
        self._number = number
        self._protocol: Any = None
        self._credit = window  # bytes that we may send
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._is_writer_paused = False
        self._left = window  # bytes that may come
        self._consumed = 0  # bytes that came, were read, and are not credited yet
        self._arrived: deque[bytes] = deque()  # while reading is paused
        self._is_paused = False
        self._ends = ""  # `here`: closes when all is sent; `there`: when all is read
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Stream {self._number} {self.name} credit={self._credit} unsent={self._unsent_bytes}>"

    # --- the user's side: a transport ---------------------------------------------------------------------------

    def set_protocol(self, protocol: Any) -> None:
        """Who reads and writes it from now on."""
        self._protocol = protocol

    def get_protocol(self) -> Any:
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Nothing: the socket is the tunnel's."""
        return default

    def is_closing(self) -> bool:
        return self._is_closed or self._ends == "here"

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """They are the same for all streams."""

    def write(self, data: bytes) -> None:
        """Send as far as the other end has room; the rest waits, and the writer is told so."""
        if self.is_closing():
            return
        tunnel = self._tunnel
        if (
            not self._unsent
            and len(data) <= self._credit
            and len(data) <= PAYLOAD_MAX
            and not tunnel.is_clogged
        ):
            self._credit -= len(data)
            tunnel.send(encode(DATA, self._number, bytes(data)))
            return
        self._unsent.append(bytes(data))
        self._unsent_bytes += len(data)
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as there is credit; also called when the tunnel has room again."""
        tunnel = self._tunnel
        while self._unsent and self._credit and not tunnel.is_clogged:
            data = self._unsent.popleft()
            size = min(len(data), self._credit, PAYLOAD_MAX)
            if size < len(data):
                self._unsent.appendleft(data[size:])
                data = data[:size]
            self._credit -= size
            self._unsent_bytes -= size
            tunnel.send(encode(DATA, self._number, data))
        if self._unsent_bytes > UNSENT_HIGH and not self._is_writer_paused:
            self._is_writer_paused = True
            self._protocol.pause_writing()
        elif self._unsent_bytes <= UNSENT_LOW and self._is_writer_paused:
            self._is_writer_paused = False
            self._protocol.resume_writing()
        if not self._unsent and self._ends == "here" and not self._is_closed:
            tunnel.send(encode(CLOSE, self._number))
            self._finish(None)

    def pause_reading(self) -> None:
        """What comes from now on waits here, at most a window of it: nothing is credited meanwhile."""
        self._is_paused = True

    def resume_reading(self) -> None:
        """Go on, from the loop: whoever says so may be amid something."""
        if self._is_paused and not self._is_closed:
            self._is_paused = False
            if self._arrived or self._ends == "there":
                asyncio.get_running_loop().call_soon(self._read_on)

    def close(self) -> None:
        """End behind what was written; nothing more is read."""
        if not self.is_closing():
            self._ends = "here"
            self._arrived.clear()
            self.flush()

    def abort(self) -> None:
        """End at once, unsent bytes and all."""
        self.reset("")

    def reset(self, reason: str) -> None:
        """End at once and tell the other end why."""
        if not self._is_closed:
            self._tunnel.send(encode(RESET, self._number, reason.encode()[:REASON_BYTES_MAX]))
            self._finish(None)

    # --- the tunnel's side -----------------------------------------------------------------------------------------

    def take(self, frame: Frame) -> None:
        """A frame of this stream came. Raises BadFrame."""
        if frame.kind == DATA:
            self._take_data(frame.payload)
        elif frame.kind == CREDIT:
            self._credit += credited(frame)
            self.flush()
        elif frame.kind == CLOSE:
            if self._ends == "here":
                self._finish(None)
            else:
                self._ends = "there"
                self._read_on()
        else:
            reason = text(frame.payload, REASON_BYTES_MAX)
            self._finish(ConnectionResetError(reason or "the stream was ended at the other end"))

    def _take_data(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0 or self._ends == "there":
            raise BadFrame("more came than may")
        if self._ends == "here":
            return
        if self._is_paused or self._arrived:
            self._arrived.append(data)
        else:
            self._deliver(data)

    def _read_on(self) -> None:
        while self._arrived and not self._is_paused and not self._is_closed:
            self._deliver(self._arrived.popleft())
        if self._ends == "there" and not self._arrived and not self._is_closed and not self._is_paused:
            self._protocol.eof_received()
            self._finish(None)

    def _deliver(self, data: bytes) -> None:
        try:
            self._protocol.data_received(data)
        except Exception:
            log.exception("a stream's reader failed", extra={"action": "stream_failed"})
            self.abort()
            return
        self._consumed += len(data)
        if self._consumed * 2 >= self._left + self._consumed and not self._is_closed:
            self._tunnel.send(credit(self._number, self._consumed))
            self._left += self._consumed
            self._consumed = 0

    def lost(self, error: Exception) -> None:
        """The tunnel is gone."""
        self._finish(error)

    def _finish(self, error: Exception | None) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._unsent.clear()
        self._unsent_bytes = 0
        self._arrived.clear()
        self._tunnel.forget(self._number)
        asyncio.get_running_loop().call_soon(self._protocol.connection_lost, error)


class Tunnel:
    """The streams of one carrier. It calls `wake` when there is something to `take`, which the carrier then sends.

    `accept` makes the protocol of a stream that the other end opens to a name; without it none may be opened. `drained` is
    called when the other end asks for no new streams, `idle` when the last stream has ended, both with the tunnel.
    """

    def __init__(
        self,
        *,
        window: int,
        streams_max: int,
        accept: Callable[[str], Any] | None = None,
        drained: "Callable[[Tunnel], None]" = lambda tunnel: None,
        idle: "Callable[[Tunnel], None]" = lambda tunnel: None,
    ) -> None:
        self.wake: Callable[[], None] = lambda: None
        self.is_lost = False
        self.is_draining = False  # one end wants no new streams
        self.is_clogged = False
        self._window = window
        self._streams_max = streams_max
        self._accept = accept
        self._drained = drained
        self._idle = idle
        self._streams: dict[int, Stream] = {}
        self._last = 0  # the highest number that was used
        self._out: deque[bytes] = deque()
        self._out_bytes = 0

    def __repr__(self) -> str:
        return f"<Tunnel streams={len(self._streams)} unsent={self._out_bytes} draining={self.is_draining}>"

    def __len__(self) -> int:
        """Open streams."""
        return len(self._streams)

    def open(self, name: str, protocol: Any) -> Stream:
        """A new stream to the engine of that name; it may be written to at once. Raises TunnelLost."""
        if self.is_lost or self.is_draining or self._last + 1 >= STREAMS_END:
            raise TunnelLost("the node's tunnel is closed")
        if len(self._streams) >= self._streams_max:
            raise TunnelLost("the node's tunnel has all the streams that it may have")
        self._last += 1
        stream = self._add(self._last, name, protocol)
        self.send(encode(OPEN, self._last, name.encode()))
        protocol.connection_made(stream)
        return stream

    def drain(self) -> None:
        """Ask the other end for no new streams; those that are open go on."""
        if not self.is_draining and not self.is_lost:
            self.is_draining = True
            self.send(encode(DRAIN, 0))

    # --- the carrier's side ----------------------------------------------------------------------------------------

    def received(self, message: bytes) -> None:
        """One message came. Raises BadFrame: then the tunnel can't go on."""
        for frame in decode(message):
            if frame.kind == DRAIN:
                self.is_draining = True
                self._drained(self)
            elif frame.kind == OPEN:
                self._opened(frame)
            elif (stream := self._streams.get(frame.stream)) is not None:
                stream.take(frame)
            elif frame.stream > self._last:
                raise BadFrame("a frame of a stream that was never opened")
            # else it crossed our end of the stream on its way

    def _opened(self, frame: Frame) -> None:
        if self._accept is None or frame.stream <= self._last:
            raise BadFrame("a stream that may not be opened")
        self._last = frame.stream
        if len(self._streams) >= self._streams_max:
            self.send(encode(RESET, frame.stream, b"too many streams"))
            return
        name = text(frame.payload, NAME_BYTES_MAX)
        protocol = self._accept(name)
        protocol.connection_made(self._add(frame.stream, name, protocol))

    def _add(self, number: int, name: str, protocol: Any) -> Stream:
        stream = self._streams[number] = Stream(self, number, name, self._window)
        stream.set_protocol(protocol)
        return stream

    def send(self, frame: bytes) -> None:
        """Put a frame behind those that wait; for streams."""
        if self.is_lost:
            return
        self._out.append(frame)
        self._out_bytes += len(frame)
        if self._out_bytes > CLOGGED:
            self.is_clogged = True
            if self._out_bytes > STUCK:
                self.lost("the tunnel's other end reads nothing")
        self.wake()

    def take(self) -> bytes:
        """The next message to be sent, of all that waits or of as much as fits; empty when nothing does."""
        if self._out_bytes <= MESSAGE_BYTES:
            message = b"".join(self._out)
            self._out.clear()
        else:
            parts, size = [], 0
            while self._out and size < MESSAGE_BYTES:
                parts.append(self._out.popleft())
                size += len(parts[-1])
            message = b"".join(parts)
        self._out_bytes -= len(message)
        if self.is_clogged and self._out_bytes <= CLEAR:
            self.is_clogged = False
            for stream in list(self._streams.values()):
                stream.flush()
        return message

    def lost(self, reason: str) -> None:
        """The carrier is gone: so are all streams."""
        self.is_lost = True
        self._out.clear()
        self._out_bytes = 0
        self.wake()
        for stream in list(self._streams.values()):
            stream.lost(TunnelLost(reason))

    def forget(self, number: int) -> None:
        """A stream has ended."""
        self._streams.pop(number, None)
        if not self._streams:
            self._idle(self)
