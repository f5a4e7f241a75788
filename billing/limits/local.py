"""Counts a process's own share of a subject's limits in memory, while Valkey is away.

When that is, and how large a share, is the limiter's to say.
"""

from dataclasses import dataclass

from billing.limits.rules import Plan, Window

BUCKETS = 60
"""Steps of a window: bounds its memory, and makes it at most one part in so many longer."""


class Rolling:
    """One rolling window over amounts; times are seconds of a monotonic clock.

    A list, though the oldest go first: it is short, and there are as many as subjects, most of them with one entry.
    """

    __slots__ = ("_entries", "_length_s", "_wide_s", "used")

    def __init__(self, length_s: float) -> None:
        self._length_s = length_s
        self._wide_s = length_s / BUCKETS
        self._entries: list[list[float]] = []  # when the bucket ends, amount
        self.used = 0

    def wait_s(self, now: float, limit: int, amount: int) -> float:
        """0.0 if it fits now; more than the whole limit fits into an empty window."""
        self._forget(now)
        if not self.used or self.used + amount <= limit:
            return 0.0
        needed = min(self.used, self.used + amount - limit)
        for end, held in self._entries:
            needed -= int(held)
            if needed <= 0:
                return end + self._length_s - now
        return self._length_s

    def add(self, now: float, amount: int) -> None:
        """Count it, also where it doesn't fit; below 0 it is given back, the newest first."""
        self._forget(now)
        if amount < 0:
            self._give_back(-amount)
            return
        if not self._entries or self._entries[-1][0] <= now:
            self._entries.append([now + self._wide_s, 0])
        self._entries[-1][1] += amount
        self.used += amount

    def _give_back(self, amount: int) -> None:
        for entry in reversed(self._entries):
            less = min(amount, int(entry[1]))
            entry[1] -= less
            amount -= less
            self.used -= less

    def _forget(self, now: float) -> None:
        while self._entries and self._entries[0][0] + self._length_s <= now:
            self.used -= int(self._entries.pop(0)[1])


@dataclass(frozen=True, slots=True)
class Seen:
    """One window, or the slots (None), against one request."""

    window: Window | None
    limit: int
    used: int
    wait_s: float


class Share:
    """One subject's windows in this process alone."""

    __slots__ = ("_plan", "_windows")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._windows = [Rolling(window.length_us / 1e6) for window in plan.windows]

    def look(self, now: float, tokens: int, in_use: int, processes: int) -> list[Seen]:
        """What each would say to one more request of so many tokens; takes nothing."""
        seen = []
        for window, rolling in zip(self._plan.windows, self._windows, strict=True):
            most = max(1, window.limit // processes)
            wait_s = rolling.wait_s(now, most, 1 if window.unit == "requests" else tokens)
            seen.append(Seen(window, most, rolling.used, wait_s))
        if self._plan.concurrency is not None:
            most = max(1, self._plan.concurrency // processes)
            seen.append(Seen(None, most, in_use, 0.0 if in_use < most else 1.0))
        return seen

    def take(self, now: float, tokens: int) -> None:
        """Count one request of so many tokens."""
        for window, rolling in zip(self._plan.windows, self._windows, strict=True):
            rolling.add(now, 1 if window.unit == "requests" else tokens)

    def correct(self, now: float, tokens: int) -> None:
        """A request took so many tokens more (below 0: less) than was counted."""
        for window, rolling in zip(self._plan.windows, self._windows, strict=True):
            if window.unit == "tokens":
                rolling.add(now, tokens)
