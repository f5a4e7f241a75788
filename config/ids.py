"""Owns how ids are made: UUIDv7, so that rows made together lie together in an index.

What an id stands for is left to whoever asks for one.
"""

import os
import threading
import time
import uuid
from array import array
from collections.abc import Iterator

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

_guard = threading.Lock()
_last_ms = 0
_head = 0  # the newest id without its last 32 bits
_steps = 0  # how often its counter can still be raised
_random: Iterator[int] = iter(())


def uuid7() -> uuid.UUID:
    """A UUIDv7 (RFC 9562 5.7), greater than every one that this process made before.

    The bits after the millisecond are a 42-bit counter, seeded at random each millisecond with its top bit and that of its
    low 30 bits clear (RFC 9562 6.2, method 1), and 32 random bits. A clock that goes back does not: the last millisecond
    stays. So it does for half a billion ids, after which the next one begins.
    """
    global _last_ms, _head, _steps
    now_ms = time.time_ns() // 1_000_000
    with _guard:
        if now_ms <= _last_ms and _steps:
            _steps -= 1
            _head += _STEP
        else:
            _last_ms = now_ms if now_ms > _last_ms else _last_ms + 1
            drawn = next(_random, None) or _drawn()
            low = drawn & _LOW_SEED
            _steps = _LOW_MAX - low
            # 48 bits of time, 4 of version, 12 of counter, 2 of variant, 30 more of counter, 32 of tail.
            _head = _last_ms << 80 | _VERSION_AND_VARIANT | drawn >> _HIGH_SEED_AT << 64 | low << _TAIL_BITS
        value = _head | (next(_random, None) or _drawn()) & _TAIL
    made = _new(_Uuid)
    _set_int(made, value)
    _set_safety(made, _UNKNOWN)
    return made


def uuid_of(digits: str) -> uuid.UUID:
    """The UUID that 32 hexadecimal digits of ours stand for. ValueError for anything else."""
    made = _new(_Uuid)
    _set_int(made, int(digits, 16))
    _set_safety(made, _UNKNOWN)
    return made


def _drawn() -> int:
    """64 random bits."""
    global _random
    _random = iter(array("Q", os.urandom(_RANDOM_BYTES)))
    return next(_random)


def _forget() -> None:
    """A child that was forked must not draw what its parent draws, nor wait for a lock that a thread of the parent held."""
    global _random, _guard
    _random, _guard = iter(()), threading.Lock()


os.register_at_fork(after_in_child=_forget)
