"""The whole gateway dies under load, again and again; PostgreSQL and Valkey die under load: who is charged what, who fails.

What each request cost is told by the stand-in engines (tests/simulation/oracle.py), in a database and stores of its own.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import asyncpg

from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.postgres import migrate, open_pool
from tests.fakes.clients import Clients, Sighting, on_each_worker
from tests.fakes.stores import kill
from tests.simulation.oracle import Prices
from tests.simulation.run import CRASH_SAFE
from tests.simulation.world import MODEL, Customer, World

PRICES = {MODEL: Prices(prompt=20_000_000, cached=10_000_000, completion=40_000_000)}
CHEAP_PROMPTS = {MODEL: Prices(prompt=1_000_000, cached=500_000, completion=40_000_000)}
"""A hold is near what its turn costs, so that spending drives the leases: they are 120 s of it after some seconds."""

RICH_NANO = 10**15
TOKENS = 8
CONNECTIONS = 60
"""While a store is away: enough that both workers have a steady part of the load, as a balancer gives them."""

IN_FLIGHT_MAX = 2_000
"""Requests of the load at once: past it the machine is too slow for the rate, and the soak says so."""


@dataclass(frozen=True, slots=True)
class Crashes:
    """How often everything dies, under how many requests a second, and after how long at most each time."""

    kills: int
    rate: float
    between_s: float


@dataclass(frozen=True, slots=True)
class Outage:
    """How long a store is away, under how many requests a second, and for how long they came before."""

    away_s: float
    rate: float
    before_s: float


CRASHES_SHORT = Crashes(kills=3, rate=120.0, between_s=1.5)
CRASHES_LONG = Crashes(kills=20, rate=500.0, between_s=4.0)
OUTAGE_SHORT = Outage(away_s=5.0, rate=60.0, before_s=3.0)
OUTAGE_LONG = Outage(away_s=60.0, rate=150.0, before_s=10.0)


async def gateway_killed(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Crashes, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """kill -9 of supervisor and workers at random moments; each time they start again on the journals that were left."""
    settings = replace(settings, journal_segment_bytes=2**18)
    rng = random.Random(size.kills)
    async with World(settings, pool, folder / "world", PRICES) as world:
        for _ in range(2):
            await world.engine("--block-size", "16", pace_ms=3.0, ttft_ms=5.0, jitter=0.3)
        customers = [await world.customer(f"renter {n}", RICH_NANO) for n in range(8)]
        gateway = await world.gateway(workers=2)
        async with Load(world, world.clients(gateway), customers, size.rate) as running:
            for number in range(size.kills):
                await asyncio.sleep(rng.uniform(0.2, size.between_s))
                before = running.answers["whole"]
                world.kill(gateway)
                tell(f"kill {number + 1} after {before} whole answers")
                await gateway.start()
                while running.answers["whole"] == before:  # noqa: ASYNC110 - in other processes
                    await asyncio.sleep(0.02)
        findings = await world.reckon()
    numbers = {
        "kills of supervisor and workers": size.kills,
        "requests a second, asked for": size.rate,
        "requests": len(world.sightings),
        "answers received whole": findings.numbers["seen_whole"],
        "answers cut": findings.numbers["seen_cut"],
        "no answer": sum(seen.ending == "reset" for seen in world.sightings),
        "turns in the book": findings.numbers["turns"],
        "killed between journal and last byte": findings.numbers["killed_while_sending"],
        "charged otherwise than the engine's record says": len(findings.wrong),
    }
    tell(str(numbers))
    endings = {seen.ending for seen in world.sightings}
    assert endings <= {"whole", "cut", "reset"}, Counter(seen.ending for seen in world.sightings)
    assert findings.numbers["seen_cut"] or numbers["no answer"], "nothing was in flight where it should hurt"
    return numbers


async def store_away(
    settings: Settings, folder: Path, size: Outage, name: Literal["postgres", "valkey"],
    tell: Callable[[str], None] = print,
) -> dict[str, float]:  # fmt: skip
    """A store is killed and comes back: accounts warm on every worker notice nothing, others get 503."""
    with EmbeddedStores.start(folder / "own", postgres_options=CRASH_SAFE) as stores:
        await migrate(stores.database_url)
        settings = replace(
            settings, database_url=stores.database_url, redis_url=stores.redis_url,
            database_timeout_s=Settings().database_timeout_s, valkey_timeout_s=Settings().valkey_timeout_s,
        )  # fmt: skip
        pool = await open_pool(stores.database_url, max_size=4, timeout_s=10.0)
        try:
            async with World(settings, pool, folder / "world", CHEAP_PROMPTS) as world:
                numbers = await _away(world, stores, size, name, tell)
        finally:
            pool.terminate()
    tell(str(numbers))
    return numbers


async def postgres_killed(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Outage, tell: Callable[[str], None] = print
) -> dict[str, float]:
    return await store_away(settings, folder, size, "postgres", tell)


async def valkey_killed(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Outage, tell: Callable[[str], None] = print
) -> dict[str, float]:
    return await store_away(settings, folder, size, "valkey", tell)


async def _away(
    world: World, stores: EmbeddedStores, size: Outage, name: str, tell: Callable[[str], None]
) -> dict[str, float]:
    for _ in range(2):
        await world.engine(pace_ms=3.0, ttft_ms=5.0, jitter=0.3)
    warm = [await world.customer(f"warm {n}", RICH_NANO) for n in range(4)]
    warm.append(await world.customer("warm and limited", RICH_NANO, limits={"requests_minute": 10**6}))
    small = await world.customer("small", 10_000)  # some holds: leased one at a time
    unknown = await world.customer("never seen", RICH_NANO)
    gateway = await world.gateway(workers=2)
    for client in await on_each_worker(gateway):
        for customer in (*warm, small):
            world.sightings.append(await client.ask(world.ask(customer, max_tokens=TOKENS)))
        client.close()
    clients = world.clients(gateway)
    await clients.open(CONNECTIONS)
    async with Load(world, clients, warm, size.rate):
        await asyncio.sleep(size.before_s)
        gone_at = len(world.sightings)
        kill(stores, name)
        tell(f"{name} is gone after {gone_at} answers")
        others: list[Sighting] = []
        async with asyncio.timeout(size.away_s + 30.0):
            for step in range(10):
                await asyncio.sleep(size.away_s / 10)
                asker = (small, unknown)[step % 2]
                others.append(await clients.ask(world.ask(asker, max_tokens=TOKENS)))
        during = len(world.sightings) - gone_at - len(others)
        stores.restart(name)
        tell(f"{name} is back after {during} answers")
        await asyncio.sleep(size.before_s)
    clients.close()
    await gateway.until_ready()
    findings = await world.reckon()
    of_warm = [seen for seen in world.sightings if seen.ask.account_id not in (small.id, unknown.id)]
    failed = [seen for seen in of_warm if seen.ending != "whole" or seen.status != 200]
    assert not failed, f"{len(failed)} of {len(of_warm)} failed, the first: {failed[0].told()}"
    expected = {503} if name == "postgres" else {200}
    assert {seen.status for seen in others} == expected, [seen.told() for seen in others]
    return {
        "seconds away": size.away_s,
        "requests a second": size.rate,
        "requests of warm accounts": len(of_warm),
        "of those meanwhile": during,
        "failed": len(failed),
        "requests of others meanwhile": len(others),
        f"of those answered {expected.pop()}": len(others),
        "turns in the book": findings.numbers["turns"],
    }


# --- load ------------------------------------------------------------------------------------------------------------


class Load:
    """Requests start at even times whatever becomes of the earlier ones, half of them streams, until the block ends."""

    def __init__(self, world: World, clients: Clients, customers: list[Customer], rate: float) -> None:
        self._world, self._clients, self._customers, self._rate = world, clients, customers, rate
        self._running: set[asyncio.Task[None]] = set()
        self.answers: Counter[str] = Counter()

    async def __aenter__(self) -> "Load":
        self._starter = asyncio.create_task(self._start())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._starter.cancel()
        with suppress(asyncio.CancelledError):
            await self._starter
        if kind is not None:
            for task in self._running:
                task.cancel()
        await asyncio.gather(*self._running, return_exceptions=kind is not None)
        self._clients.close()

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        number = 0
        while True:
            number += 1
            await asyncio.sleep(max(0.0, began_s + number / self._rate - loop.time()))
            assert len(self._running) < IN_FLIGHT_MAX, "the machine is too slow for this rate"
            task = asyncio.create_task(self._ask(number))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _ask(self, number: int) -> None:
        customer = self._customers[number % len(self._customers)]
        ask = self._world.ask(customer, max_tokens=TOKENS, ignore_eos=True, stream=number % 2 == 0)
        seen = await self._clients.ask(ask)
        self.answers[seen.ending] += 1
