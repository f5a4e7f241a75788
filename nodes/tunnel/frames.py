"""The frames of a tunnel, as bytes: a kind, the number of a stream, the length of a payload, the payload.

Pure. A message of the websocket holds one or more whole frames. What they mean for a stream is `nodes.tunnel.streams`'.
"""

import struct
from typing import NamedTuple

OPEN = 1  # the gateway begins a stream; the payload names the engine
DATA = 2
CREDIT = 3  # the receiver has done with so many bytes (4 bytes, big-endian): as many more may come
CLOSE = 4  # all was said: the stream ends behind what was sent
RESET = 5  # the stream is over at once; the payload says why, for people
DRAIN = 6  # of stream 0: no new streams here, please; those that are open go on
KINDS = frozenset((OPEN, DATA, CREDIT, CLOSE, RESET, DRAIN))

HEAD = struct.Struct("!BII")
COUNT = struct.Struct("!I")
PAYLOAD_MAX = 65536
"""Of one frame: what a socket gives at once is seldom more, and others wait behind it."""

NAME_BYTES_MAX = 512
REASON_BYTES_MAX = 200
MESSAGE_BYTES_MAX = 2**20
"""Of one message of the websocket; writers stay below a third of it."""

STREAMS_END = 2**32
"""Stream numbers are below it and never used twice: a tunnel that has used them up makes room for another."""


class BadFrame(ValueError):
    """What came is no frame, or one that breaks the rules: the tunnel can't go on."""


class Frame(NamedTuple):
    """One frame; DRAIN has stream 0, all others a number from 1."""

    kind: int
    stream: int
    payload: bytes = b""


def encode(kind: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame as bytes."""
    return HEAD.pack(kind, stream, len(payload)) + payload


def credit(stream: int, count: int) -> bytes:
    """A frame that lets `count` more bytes come."""
    return HEAD.pack(CREDIT, stream, 4) + COUNT.pack(count)


def decode(message: bytes) -> list[Frame]:
    """The frames of one message. Raises BadFrame."""
    frames = []
    at, size = 0, len(message)
    while at < size:
        if size - at < HEAD.size:
            raise BadFrame("a frame's head is cut off")
        kind, stream, length = HEAD.unpack_from(message, at)
        at += HEAD.size
        if kind not in KINDS:
            raise BadFrame(f"no kind of frame is {kind}")
        if length > PAYLOAD_MAX or length > size - at:
            raise BadFrame("a frame is longer than it may be, or cut off")
        if (stream == 0) != (kind == DRAIN):
            raise BadFrame("a frame of no stream")
        frames.append(Frame(kind, stream, message[at : at + length]))
        at += length
    return frames


def credited(frame: Frame) -> int:
    """How many bytes a CREDIT frame gives. Raises BadFrame."""
    if len(frame.payload) != COUNT.size:
        raise BadFrame("a credit of another size")
    count: int = COUNT.unpack(frame.payload)[0]
    if not count:
        raise BadFrame("a credit of nothing")
    return count


def text(payload: bytes, most: int) -> str:
    """A name or a reason. Raises BadFrame."""
    if len(payload) > most:
        raise BadFrame("a text is longer than it may be")
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise BadFrame("a text is no UTF-8") from None
