"""Owns the two clocks that every part reads: wall time for records, monotonic time for durations.

They are passed in, never called by name, so that a test can move time; that fake lives with the tests.
"""

import time
from typing import Final, Protocol

monotonic: Final = time.monotonic
"""The clock of durations, for what no test moves: at hand in compiled modules, which would look `time` up."""


class Clock(Protocol):
    """What a part may ask about time."""

    def now(self) -> float:
        """Unix time in seconds: for what is stored or shown, never for durations (it can jump)."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start that never go back: for time-outs, leases and durations."""


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return monotonic()
