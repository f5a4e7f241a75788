"""What an engine is to do: serve, hold, sleep or rest, as several sides want it. The strictest of them holds.

Sides are the node's conduct (pause, heat, hours, lease), a person (stop, sleep) and the plan (room for another model). How
an engine obeys is `engine`'s affair.
"""

import asyncio
from dataclasses import dataclass

SERVE, HOLD, SLEEP, REST = "serve", "hold", "sleep", "rest"
LEVELS = (SERVE, HOLD, SLEEP, REST)
"""From free to strict. hold: no new turns, loaded; sleep: memory given back, process kept; rest: no process."""


@dataclass(frozen=True, slots=True)
class Duty:
    """A level and, for people, why."""

    level: str = SERVE
    reason: str = ""


SERVING = Duty()


class Orders:
    """`now` is what holds; `news` is set whenever that changed or a restart was asked."""

    def __init__(self) -> None:
        self._by_side: dict[str, Duty] = {}
        self.now = SERVING
        self.news = asyncio.Event()
        self.wants_restart = ""  # why; empty: no

    def give(self, side: str, duty: Duty) -> None:
        """`side` wants this from now on, instead of what it wanted before."""
        if duty.level == SERVE:
            self._by_side.pop(side, None)
        else:
            self._by_side[side] = duty
        now = max(self._by_side.values(), key=lambda each: LEVELS.index(each.level), default=SERVING)
        if now != self.now:
            self.now = now
            self.news.set()

    def wanted_by(self, side: str) -> Duty:
        return self._by_side.get(side, SERVING)

    def restart(self, reason: str) -> None:
        self.wants_restart = reason
        self.news.set()
