"""Limiters as tests need them: several over one Valkey with short windows, or one whose Valkey is away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from billing.limits import Limiter
from config.clock import Clock, SystemClock
from config.defaults import Settings
from config.ids import uuid7
from config.metrics import Metrics
from config.valkey import open_valkey


def alone(settings: Settings, clock: Clock, *, processes: int) -> Limiter:
    """A process that has found its Valkey away, one of so many that live."""
    limiter = Limiter(Redis(), "alone", settings, clock, Metrics(), lambda: processes)
    limiter._flights.is_away = True
    return limiter


@asynccontextmanager
async def limiters(
    settings: Settings, count: int, *, minute_s: float = 60.0, **changes: Any
) -> AsyncIterator[list[Limiter]]:
    """So many processes' limiters, running, each with its own connections."""
    clients = [open_valkey(settings.redis_url, timeout_s=settings.valkey_timeout_s) for _ in range(count)]
    made = [
        Limiter(
            client,
            uuid7().hex,
            settings,
            SystemClock(),
            Metrics(),
            lambda: count,
            minute_s=minute_s,
            **changes,
        )
        for client in clients
    ]
    tasks = [asyncio.create_task(limiter.run()) for limiter in made]
    try:
        yield made
    finally:
        for limiter in made:
            await limiter.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in clients:
            await client.aclose()
