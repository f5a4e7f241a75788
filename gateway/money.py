"""The parts of a worker that keep its money, put together: its incarnation, journal, shipper, leases, limits and claims.

They begin and end in the order that loses nothing: turns end before the journal is shipped, and all of it is in the book
before the leases go back.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Coroutine
from functools import partial
from typing import Any

import asyncpg
from redis.asyncio import Redis

from billing.idempotency import IdempotencyStore
from billing.incarnations import Incarnation, register
from billing.journal import Journal, journal_root
from billing.leases import SpendLeases
from billing.limits import Limiter
from billing.recovery import Recovery, end_incarnation
from billing.shipment import UnknownIncarnation
from billing.shipper import Shipper
from config.changes import ChangeFeed, wake_feeds
from config.clock import Clock
from config.defaults import Settings
from config.ids import uuid7
from config.metrics import Metrics
from config.postgres import AWAY

log = logging.getLogger("poolgate.money")

REGISTER_RETRY_S = 0.5
"""How often a worker that began without PostgreSQL tries to register."""


class Money:
    """One worker's. `register` it, give `parts` a task each, `close` it when every turn has ended."""

    def __init__(
        self,
        settings: Settings,
        *,
        pool: asyncpg.Pool,
        valkey: Redis,
        feed: ChangeFeed,
        clock: Clock,
        metrics: Metrics,
        pepper: bytes,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._metrics = metrics
        incarnation_id = uuid7()
        root = journal_root(settings)
        self.journal = Journal.open(root, incarnation_id, settings)
        self.incarnation = Incarnation(incarnation_id, self.journal.folder)
        self._shipper = Shipper(pool, settings, self.journal, metrics)
        self.leases = SpendLeases(
            pool, self.incarnation, settings, clock, metrics, wake=partial(wake_feeds, valkey)
        )
        self.limiter = Limiter(
            valkey, str(incarnation_id), settings, clock, metrics, lambda: self.leases.live_count
        )
        self.claims = IdempotencyStore(pool, settings, pepper)
        self._recovery = Recovery(root, pool, settings, metrics)
        self._is_registered = False
        feed.on("wallet", self.leases.forget_wallet)
        feed.on("account", self.leases.forget_wallet)
        feed.on("recall", self.leases.recall)
        feed.on("budget", self.leases.forget_budget)

    async def register(self) -> None:
        """Make the incarnation known, before which nothing can be leased; `parts` go on trying where PostgreSQL is away."""
        try:
            await register(
                self._pool, self._settings, folder=self.journal.folder, host=socket.gethostname(),
                pid=os.getpid(), incarnation_id=self.incarnation.id,
            )  # fmt: skip
        except AWAY as error:
            log.warning("the worker can't register: %s", error, extra={"action": "unregistered"})
        else:
            self._is_registered = True

    def parts(self) -> list[Coroutine[Any, Any, None]]:
        """What runs beside the turns."""
        return [
            self.journal.run(),
            self._shipper.run(),
            self._lease(),
            self.limiter.run(),
            self.claims.run(),
            self._recovery.run(),
        ]

    async def _lease(self) -> None:
        while not self._is_registered:
            await asyncio.sleep(REGISTER_RETRY_S)
            await self.register()
        await self.leases.run()

    def set_gauges(self) -> None:
        """What waits in the journal."""
        self._metrics.usage_pending.set(self.journal.pending)
        self._metrics.journal_bytes.set(self.journal.pending_bytes)

    async def close(self) -> None:
        """Ship what is left, return what was leased, end the incarnation; what PostgreSQL can't be told stays on disk."""
        await self.limiter.close()
        await self.claims.close(self._settings.database_timeout_s)
        await self.leases.close()
        is_shipped = await self._shipper.close()
        if is_shipped and await self._ended():
            self.journal.remove()
        else:
            self.journal.close()

    async def _ended(self) -> bool:
        try:
            await end_incarnation(self._pool, self._settings, self.incarnation.id, "closed")
        except (*AWAY, UnknownIncarnation) as error:
            log.warning("leases could not be returned: %s", error, extra={"action": "leases_left"})
            return False
        return True
