"""Owns how ids are made: UUIDv7, so that rows made together lie together in an index.

What an id stands for is left to whoever asks for one.
"""

import os
import threading
import time
import uuid
from array import array

_TAIL_BITS = 32
_TAIL = (1 << _TAIL_BITS) - 1
_STEP = 1 << _TAIL_BITS
_LOW_MAX = (1 << 30) - 1  # the counter's bits behind the variant; 12 stand before it
_LOW_SEED = (1 << 29) - 1
_HIGH_SEED_AT = 64 - 11
_VERSION_AND_VARIANT = 7 << 76 | 0b10 << 62

_RANDOM_BYTES = 4096
"""Drawn from the system at once: a call for each id would be most of what it costs."""

# A UUID's own constructor checks what we know, and takes longer than everything else here.
_new = object.__new__
_set_int = uuid.UUID.__dict__["int"].__set__
_set_safety = uuid.UUID.__dict__["is_safe"].__set__
_Uuid = uuid.UUID
_UNKNOWN = uuid.SafeUUID.unknown


class _Ids:
    """Makes the numbers. A state of its own, because a module's variables are slow when compiled."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._last_ms = 0
        self._head = 0  # the newest id without its last 32 bits
        self._steps = 0  # how often its counter can still be raised
        self._random: list[int] = []

    def next(self) -> int:
        """One that is greater than all before."""
        now_ms = time.time_ns() // 1_000_000
        self._guard.acquire()  # `with` is slow when compiled
        try:
            if now_ms <= self._last_ms and self._steps:
                self._steps -= 1
                self._head += _STEP
            else:
                self._last_ms = now_ms if now_ms > self._last_ms else self._last_ms + 1
                drawn = self._drawn()
                low = drawn & _LOW_SEED
                self._steps = _LOW_MAX - low
                # 48 bits of time, 4 of version, 12 of counter, 2 of variant, 30 more of counter, 32 of tail.
                high = self._last_ms << 80 | _VERSION_AND_VARIANT | drawn >> _HIGH_SEED_AT << 64
                self._head = high | low << _TAIL_BITS
            return self._head | self._drawn() & _TAIL
        finally:
            self._guard.release()

    def _drawn(self) -> int:
        """64 random bits."""
        if not self._random:
            self._random = array("Q", os.urandom(_RANDOM_BYTES)).tolist()
        return self._random.pop()

    def forget(self) -> None:
        """A forked child must not draw what its parent draws, nor wait for a lock that a thread of the parent held."""
        self._random, self._guard = [], threading.Lock()


_ids = _Ids()


def uuid7() -> uuid.UUID:
    """A UUIDv7 (RFC 9562 5.7), greater than every one that this process made before.

    The bits after the millisecond are a 42-bit counter, seeded at random each millisecond with its top bit and that of its
    low 30 bits clear (RFC 9562 6.2, method 1), and 32 random bits. A clock that goes back does not: the last millisecond
    stays. So it does for half a billion ids, after which the next one begins.
    """
    return _uuid(_ids.next())


def hex7() -> str:
    """The 32 hexadecimal digits of such a UUID."""
    return _ids.next().to_bytes(16, "big").hex()


def uuid_of(digits: str) -> uuid.UUID:
    """The UUID that 32 hexadecimal digits of ours stand for. ValueError for anything else."""
    return _uuid(int(digits, 16))


def _uuid(value: int) -> uuid.UUID:
    made = _new(_Uuid)
    _set_int(made, value)
    _set_safety(made, _UNKNOWN)
    return made


os.register_at_fork(after_in_child=_ids.forget)
