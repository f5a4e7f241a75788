"""The caretaker's chore that keeps providers' reputation, and says where engines' counts and ours differ.

What follows from which numbers is `nodes.reputation`'s.
"""

import logging

import asyncpg

from config.defaults import Settings
from config.metrics import Metrics
from nodes.events import Event, EventStore
from nodes.reputation import Compared, EngineCompared, ReputationStore

log = logging.getLogger("poolgate.nodes")

WATCH_MOST = 3
"""Times `reputation_s`: a longer pause between two rolls was ours, not the nodes'."""


class ReputationChore:
    """Call `run` each `reputation_s`."""

    def __init__(self, pool: asyncpg.Pool, settings: Settings, metrics: Metrics) -> None:
        self._store = ReputationStore(pool)
        self._events = EventStore(pool)
        self._settings = settings
        self._metrics = metrics

    async def run(self) -> None:
        """Once."""
        await self._store.roll(WATCH_MOST * self._settings.reputation_s)
        await self._store.judge()
        for engine in await self._store.compare(self._settings.usage_check_s):
            for compared in (engine.prompt, engine.completion):
                if compared.is_odd(self._settings.usage_difference_share):
                    await self._say(engine, compared)

    async def _say(self, engine: EngineCompared, compared: Compared) -> None:
        direction = "unrelayed" if compared.difference > 0 else "unreported"
        self._metrics.usage_differences.labels(compared.kind, direction).inc(abs(compared.difference))
        words = (
            f"engine {engine.engine_id}: it reports {compared.reported:,} {compared.kind} tokens, "
            f"relayed were {compared.relayed:,}"
        )
        log.warning(
            "node %s, %s", engine.node_id, words, extra={"action": "usage_differs", "node": engine.node_id}
        )
        event = Event(event_type="usage_differs", severity="warning", details=words)
        await self._events.add(engine.account_id, event, engine.node_id)
