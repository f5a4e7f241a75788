"""Owns how ids are made: UUIDv7, so that rows made together lie together in an index.

What an id stands for is left to whoever asks for one.
"""

import os
import threading
import time
import uuid
from typing import Final

_RANDOM_BYTES: Final = 4096
"""Drawn from the system at once: a call for each id would be most of what it costs."""

# A UUID's own constructor checks what we know, and takes longer than everything else here.
_new = object.__new__
_set_int = uuid.UUID.__dict__["int"].__set__
_set_safety = uuid.UUID.__dict__["is_safe"].__set__
_Uuid = uuid.UUID
_UNKNOWN: Final = uuid.SafeUUID.unknown


_SEEDS: Final = 256
_SEED_BYTES: Final = 6
_SEED_RANDOM: Final = int("07ff1fffffff" * _SEEDS, 16)
_SEED_FIXED: Final = int("700080000000" * _SEEDS, 16)
"""Of 4 bits of version, 12 of the counter, 2 of variant and 30 more of the counter: those drawn at random, and those set."""

_CARRIED_MAX: Final = 0xBFFFFF
"""Of the second part without its last byte, the variant included."""


class _Ids:
    """Makes the digits, for one thread at a time. No two of these make the same: each draws its own bits."""

    def __init__(self) -> None:
        self._last_ms = 0
        self._stem = ""  # the newest id's first 22 digits: its time, and the counter without
        self._count = 0  # its last byte
        self._bytes = [f"{byte:02x}" for byte in range(256)]
        self._values = {digits: byte for byte, digits in enumerate(self._bytes)}
        self._age = 0  # milliseconds without their last byte, and their digits
        self._age_digits = ""
        self._seeds: list[str] = []
        self._tails: list[str] = []

    def next(self) -> str:
        """32 digits, of a number that is greater than all before."""
        now_ms = time.time_ns() // 1_000_000
        if now_ms > self._last_ms:
            self._begin(now_ms)
        elif self._count < 255:
            self._count += 1
        else:
            self._carry()
        if not self._tails:
            self._tails = _cut(os.urandom(_RANDOM_BYTES), 4)
        return self._stem + self._bytes[self._count] + self._tails.pop()

    def _begin(self, ms: int) -> None:
        """Go on in another millisecond."""
        self._last_ms = ms
        if ms >> 8 != self._age:
            self._age, self._age_digits = ms >> 8, f"{ms >> 8:010x}"
        if not self._seeds:
            drawn = int.from_bytes(os.urandom(_SEED_BYTES * _SEEDS), "big") & _SEED_RANDOM | _SEED_FIXED
            self._seeds = _cut(drawn.to_bytes(_SEED_BYTES * _SEEDS, "big"), _SEED_BYTES)
        seed = self._seeds.pop()
        self._stem = self._age_digits + self._bytes[ms & 0xFF] + seed[:10]
        self._count = self._values[seed[10:]]

    def _carry(self) -> None:
        """The counter's last byte is at its end."""
        carried = int(self._stem[16:], 16)
        if carried == _CARRIED_MAX:
            self._begin(self._last_ms + 1)
        else:
            self._stem, self._count = f"{self._stem[:16]}{carried + 1:06x}", 0

    def forget(self) -> None:
        """A forked child must not draw what its parent draws."""
        self._seeds, self._tails = [], []


def _cut(drawn: bytes, size: int) -> list[str]:
    """The digits of each so many bytes."""
    digits = drawn.hex()
    return [digits[at : at + 2 * size] for at in range(0, len(digits), 2 * size)]


_ids: Final = _Ids()
_ids_of_the_loop: Final = _Ids()
_guard = threading.Lock()


def uuid7() -> uuid.UUID:
    """A UUIDv7 (RFC 9562 5.7), greater than every one that this process made before.

    The bits after the millisecond are a 42-bit counter, seeded at random each millisecond with its top bit and that of its
    low 30 bits clear (RFC 9562 6.2, method 1), and 32 random bits. A clock that goes back does not: the last millisecond
    stays. So it does for half a billion ids, after which the next one begins.
    """
    with _guard:
        digits = _ids.next()
    return _uuid(int(digits, 16))


def hex7() -> str:
    """The 32 hexadecimal digits of such a UUID, for the event loop's thread alone: a lock would take as long as they do."""
    return _ids_of_the_loop.next()


def _uuid(value: int) -> uuid.UUID:
    made = _new(_Uuid)
    _set_int(made, value)
    _set_safety(made, _UNKNOWN)
    return made


def _forget() -> None:
    """In a child: a thread of the parent may have held the lock."""
    global _guard
    _guard = threading.Lock()
    _ids.forget()
    _ids_of_the_loop.forget()


os.register_at_fork(after_in_child=_forget)
