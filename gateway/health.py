"""Are the parts well: checked in the background, so that a probe reads a result and never waits for a store.

A part that is away makes the service degraded while it can go on serving; it is unhealthy only when no turn could be served.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import asyncpg
from redis.asyncio import Redis

from config.changes import ChangeFeed
from config.defaults import Settings
from config.postgres import AWAY
from config.valkey import is_up
from nodes.registry import Registry

Status = Literal["healthy", "degraded", "unhealthy"]


@dataclass(frozen=True, slots=True)
class Component:
    """One part's state; `message` tells people what it means for them."""

    name: str
    status: Status
    message: str | None = None
    details: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "status": self.status, "message": self.message, "details": self.details}


class Health:
    """The last result of each check."""

    def __init__(
        self,
        settings: Settings,
        *,
        pool: asyncpg.Pool,
        valkey: Redis,
        feed: ChangeFeed,
        registry: Registry,
        usage_pending: Callable[[], int],
        is_full: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._valkey = valkey
        self._feed = feed
        self._registry = registry
        self._usage_pending = usage_pending
        self._is_full = is_full
        self._started_s = time.monotonic()
        self._stores = (
            Component("database", "unhealthy", "not checked yet"),
            Component("cache", "unhealthy", "not checked yet"),
        )
        self.is_draining = False

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(self._settings.health_interval_s)

    async def check(self) -> None:
        """Check the stores once."""
        database, cache = await asyncio.gather(
            self._answers(self._ask_database), self._answers(self._ask_cache)
        )
        self._stores = (
            Component("database", "healthy")
            if database
            else Component("database", "degraded", "PostgreSQL does not answer"),
            Component("cache", "healthy")
            if cache
            else Component("cache", "degraded", "Valkey does not answer"),
        )

    async def _answers(self, ask: Callable[[], Awaitable[bool]]) -> bool:
        try:
            async with asyncio.timeout(self._settings.database_timeout_s):
                return await ask()
        except AWAY:
            return False

    async def _ask_database(self) -> bool:
        return bool(await self._pool.fetchval("select true"))

    async def _ask_cache(self) -> bool:
        return await is_up(self._valkey)

    @property
    def uptime_s(self) -> float:
        """Seconds since this worker started."""
        return time.monotonic() - self._started_s

    @property
    def is_ready(self) -> bool:
        """May a balancer send requests here: not draining, and keys could be read at least once."""
        return not self.is_draining and self._feed.was_read

    def components(self) -> list[Component]:
        """Each part's state, from memory."""
        snapshot = self._registry.snapshot
        open_breakers = sum(engine.breaker.is_open for engine in snapshot.engines)
        usable = len(snapshot.engines) - open_breakers
        nodes = Component(
            "nodes",
            "healthy" if usable else "degraded",
            None if usable else "no engine can take a turn",
            {
                "nodes_online": snapshot.nodes_online,
                "engines_ready": len(snapshot.engines),
                "breakers_open": open_breakers,
            },
        )
        is_full = self._is_full()
        metering = Component(
            "metering",
            "unhealthy" if is_full else "healthy",
            "the journal is full: turns are refused until PostgreSQL takes what waits" if is_full else None,
            {"pending": self._usage_pending()},
        )
        return [Component("application", "healthy"), *self._stores, nodes, metering]


def overall(components: list[Component]) -> Status:
    """The worst of all."""
    states = {component.status for component in components}
    if "unhealthy" in states:
        return "unhealthy"
    return "degraded" if "degraded" in states else "healthy"
