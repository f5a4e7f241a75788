"""Owns how ids are made: UUIDv7, so that rows made together lie together in an index.

What an id stands for is left to whoever asks for one.
"""

import secrets
import threading
import time
import uuid

_COUNTER_BITS = 42
_TAIL_BITS = 32

_guard = threading.Lock()
_last_ms = 0
_counter = 0


def uuid7() -> uuid.UUID:
    """A UUIDv7 (RFC 9562 5.7), greater than every one that this process made before.

    The bits after the millisecond are a 42-bit counter, seeded at random each millisecond with its top bit
    clear (RFC 9562 6.2, method 1), and 32 random bits. A clock that goes back does not: the last millisecond
    stays.
    """
    global _last_ms, _counter
    now_ms = time.time_ns() // 1_000_000
    with _guard:
        if now_ms > _last_ms:
            _last_ms, _counter = now_ms, secrets.randbits(_COUNTER_BITS - 1)
        else:
            _counter += 1
            if _counter >> _COUNTER_BITS:
                _last_ms, _counter = _last_ms + 1, secrets.randbits(_COUNTER_BITS - 1)
        return _assemble(_last_ms, _counter, secrets.randbits(_TAIL_BITS))


def _assemble(unix_ms: int, counter: int, tail: int) -> uuid.UUID:
    # 48 bits of time, 4 of version, 12 of counter, 2 of variant, 30 more of counter, 32 of tail.
    high_counter, low_counter = counter >> 30, counter & (1 << 30) - 1
    value = (unix_ms & (1 << 48) - 1) << 80 | 7 << 76 | high_counter << 64
    return uuid.UUID(int=value | 0b10 << 62 | low_counter << _TAIL_BITS | tail)
