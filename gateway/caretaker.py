"""Chores that one gateway process does for all: silent nodes and processes, expired holds, old rows.

Whoever holds an advisory lock of PostgreSQL is the caretaker; when its connection ends, another process takes over.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta

import asyncpg

from billing.budgets import trim_windows
from billing.idempotency import trim_claims
from billing.incarnations import abandon_silent, trim_leases
from billing.ledger import Ledger
from billing.retention import keep_partitions, trim_hours
from config.changes import trim_changes
from config.defaults import Settings
from config.postgres import AWAY
from nodes.commands import CommandStore
from nodes.events import trim_events
from nodes.heartbeats import NodeStore

log = logging.getLogger("poolgate.caretaker")

LOCK = 0x706F6F6C_67617465  # "poolgate" in ASCII: any fixed number that is not migrate's

TIDY_S = 3600.0
"""How often old rows are looked for and partitions made, a week ahead."""

RESOLVE_S = 60.0
"""How often what ran out is resolved: silent processes and pending transfers, whose bounds are minutes and hours."""

RETRY_S = 60.0
"""How soon after a chore failed."""


Chore = Callable[[], Awaitable[None]]


class Caretaker:
    """Tries to be the caretaker, and does the chores while it is."""

    def __init__(
        self, watch_pool: asyncpg.Pool, pool: asyncpg.Pool, settings: Settings,
        more: Mapping[Chore, float] | None = None,
    ) -> None:  # fmt: skip
        """`watch_pool`: where the lock's connection is taken, and kept; `pool`: for the chores, `more` of them by period."""
        self._watch_pool = watch_pool
        self._pool = pool
        self._nodes = NodeStore(pool)
        self._settings = settings
        self._watching_since_s: float | None = None
        self._seen_s = 0.0
        self._periods_s: dict[Chore, float] = {
            self._resolve: RESOLVE_S, self._tidy: TIDY_S, **(more or {}),
        }  # fmt: skip
        self._due_s = dict.fromkeys(self._periods_s, 0.0)

    async def run(self) -> None:
        """Until cancelled; PostgreSQL's absence only pauses it."""
        while True:
            try:
                async with self._watch_pool.acquire() as connection:
                    await self._hold(connection)
            except AWAY as error:
                log.debug("the caretaker pauses: %s", error, extra={"action": "caretaker_paused"})
            self._watching_since_s = None
            await asyncio.sleep(self._period_s)

    @property
    def _period_s(self) -> float:
        return min(2.0, self._settings.heartbeat_grace_s / 4)

    async def _hold(self, connection: "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]") -> None:
        if not await connection.fetchval("select pg_try_advisory_lock($1)", LOCK):
            return
        try:
            while True:
                # The lock is only as alive as its connection, which this asks as well.
                await self._chores(await connection.fetchval("select clock_timestamp()"))
                await asyncio.sleep(self._period_s)
        finally:
            if not connection.is_closed():
                await connection.execute("select pg_advisory_unlock($1)", LOCK)

    async def _chores(self, seen_at: datetime) -> None:
        """`seen_at`: PostgreSQL's clock a moment ago."""
        now_s, grace_s = time.monotonic(), self._settings.heartbeat_grace_s
        # After an absence of PostgreSQL, or of this process, every heartbeat looks old: nodes first get their grace to
        # report again. Less than half of it can't be what made a node silent.
        if self._watching_since_s is None or now_s - self._seen_s > grace_s / 2:
            self._watching_since_s = now_s
        self._seen_s = now_s
        if now_s - self._watching_since_s >= grace_s:
            for node_id in await self._nodes.expire(seen_at - timedelta(seconds=grace_s)):
                log.warning(
                    "node %s is silent and left", node_id, extra={"action": "node_expired", "node": node_id}
                )
        for chore, period_s in self._periods_s.items():
            if now_s >= self._due_s[chore]:
                self._due_s[chore] = now_s + (period_s if await self._is_done(chore) else RETRY_S)

    async def _is_done(self, chore: Chore) -> bool:
        """A failure here, as of a lock that a long report holds, concerns no node."""
        try:
            await chore()
        except AWAY as error:
            log.warning(
                "a chore failed and is tried again: %s",
                error or type(error).__name__,
                extra={"action": "chore_failed"},
            )
            return False
        return True

    async def _resolve(self) -> None:
        await abandon_silent(self._pool, self._settings)
        async with self._pool.acquire() as connection, connection.transaction():
            await Ledger().expire_due(connection)

    async def _tidy(self) -> None:
        await keep_partitions(self._pool, self._settings)
        await trim_hours(self._pool, self._settings)
        await trim_changes(self._pool)
        await trim_leases(self._pool)
        await trim_windows(self._pool)
        await trim_claims(self._pool, self._settings)
        await trim_events(self._pool)
        await CommandStore(self._pool).trim()
