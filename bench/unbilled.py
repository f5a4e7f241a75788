"""A gateway worker whose money is switched off, to measure what it costs: `python -m bench.unbilled` in place of a worker.

Only here: a gateway has no setting for it. Nothing is limited, leased, journaled or shipped; keys, routing, relay, metrics
and the log line of a turn are as in `gateway.worker`. Compiled modules take no stand-ins for each other's classes, so these
are the real ones with nothing to do: all is free, and a hold of nothing needs no lease; whoever asks has a key without
limits. What stays is arithmetic: a turn is bounded and priced, at zero.
"""

import sys
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
from redis.asyncio import Redis

import gateway.app
from billing.incarnations import Incarnation
from billing.leases import SpendLeases
from billing.limits import Limiter
from billing.prices import DEFAULT, Price, PriceBook
from config.clock import Clock
from config.defaults import Settings
from config.ids import uuid7
from config.metrics import Metrics
from gateway import worker

FOR_EVER_S = 1e9
"""Leases may be used although nobody tells PostgreSQL that this process lives."""


class FreeBook:
    """In the place of billing.prices.PriceBook, of which it loads one without a price."""

    @staticmethod
    def load(path: Path | None = None) -> PriceBook:
        return PriceBook({DEFAULT: (Price(DEFAULT, 0, 0, 0),)})


class NoJournal:
    """Takes records and keeps none."""

    is_full = False
    pending = 0

    def append(self, record: object) -> None:
        """Gone."""


class Unbilled:
    """In the place of gateway.money.Money."""

    claims = None

    def __init__(
        self, settings: Settings, *, pool: asyncpg.Pool, valkey: Redis, clock: Clock, metrics: Metrics, **_: object
    ) -> None:  # fmt: skip
        self.incarnation = Incarnation(uuid7(), Path("none"))
        self.journal = NoJournal()
        settings = replace(settings, lease_grace_s=FOR_EVER_S)
        self.leases = SpendLeases(pool, self.incarnation, settings, clock)
        self.limiter = Limiter(valkey, str(self.incarnation.id), settings, clock, metrics, lambda: 1)

    async def register(self) -> bool:
        return True

    def parts(self) -> list[Coroutine[Any, Any, None]]:
        return []

    def set_gauges(self) -> None:
        """Nothing waits."""

    async def close(self) -> None:
        """Nothing is left."""


def main() -> int:
    """As gateway.worker, which a supervisor starts and tells its settings and its socket."""
    replaced: Any = gateway.app
    replaced.Money = Unbilled
    replaced.PriceBook = FreeBook
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
