"""One timer for thousands of streams: callbacks in buckets of a millisecond.

It knows nothing of what it calls; a callback that no longer matters must see that itself.
"""

import asyncio
import heapq
import math
from collections.abc import Callable


class TimerWheel:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buckets: dict[int, list[Callable[[float], None]]] = {}
        self._ticks: list[int] = []
        self._armed: asyncio.TimerHandle | None = None
        self._armed_tick = 0

    def at(self, when: float, callback: Callable[[float], None]) -> None:
        """Call back with the loop's time at the first whole millisecond not before `when`."""
        tick = math.ceil(when * 1000)
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.append(callback)
            return
        self._buckets[tick] = [callback]
        heapq.heappush(self._ticks, tick)
        if self._armed is None or tick < self._armed_tick:
            self._arm(tick)

    def _arm(self, tick: int) -> None:
        if self._armed is not None:
            self._armed.cancel()
        self._armed_tick = tick
        self._armed = self._loop.call_at(tick / 1000, self._turn)

    def _turn(self) -> None:
        self._armed = None
        now = self._loop.time()
        due = math.floor(now * 1000 + 1e-6)
        while self._ticks and self._ticks[0] <= due:
            for callback in self._buckets.pop(heapq.heappop(self._ticks)):
                callback(now)
        if self._ticks and self._armed is None:
            self._arm(self._ticks[0])
