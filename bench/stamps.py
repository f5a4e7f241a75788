"""The moment at which a chunk left the engine, written into its text, and how long ago that was for who reads it.

Both ends must run on one machine: the clock is CLOCK_MONOTONIC, which all its processes share.
"""

import re
from time import monotonic_ns

_STAMP = re.compile(rb"@([0-9a-f]{16})")


def stamp() -> bytes:
    """Now, as 17 bytes that JSON and server-sent events carry as they are."""
    return b"@%016x" % monotonic_ns()


def ages_ms(data: bytes) -> list[float]:
    """How old each stamp in `data` is, in milliseconds; one that is cut by its end is left out."""
    now_ns = monotonic_ns()
    return [(now_ns - int(mark, 16)) / 1e6 for mark in _STAMP.findall(data)]
