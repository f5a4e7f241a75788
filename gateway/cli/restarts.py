"""Owns the decision whether a part of the system that died is started again, and when.

Pure: times are passed in. Starting it is its owner's affair.
"""

from collections import deque
from dataclasses import dataclass, field

QUICK_DEATHS_MAX = 5
WINDOW_S = 60.0
FIRST_PAUSE_S = 0.25
PAUSE_MAX_S = 8.0


@dataclass(slots=True)
class Restarts:
    """The deaths of one part. Five in a minute mean that starting it again does not help."""

    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=QUICK_DEATHS_MAX))

    def pause_s(self, now: float) -> float | None:
        """Note a death at `now` (monotonic seconds); how long to wait before the next start, None: give up."""
        self.deaths.append(now)
        recent = sum(1 for death in self.deaths if now - death < WINDOW_S)
        if recent >= QUICK_DEATHS_MAX:
            return None
        return min(PAUSE_MAX_S, FIRST_PAUSE_S * 4.0 ** (recent - 1))


def how_it_ended(code: int) -> str:
    """An exit code of `subprocess` in words."""
    if code < 0:
        return f"was ended by signal {-code}"
    return f"ended with exit code {code}"
