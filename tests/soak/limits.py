"""A key limited to 60 requests a minute, saturated over four workers: spread over them, and another one pinned to one.

Times are the clients': a request was admitted between its sending and its answer, so only what is provable is held against
the limit.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from config.defaults import Settings
from tests.fakes.clients import Client, Sighting, on_one_worker, spread
from tests.simulation.oracle import Prices
from tests.simulation.world import MODEL, Customer, World

PRICES = {MODEL: Prices(prompt=0, cached=0, completion=10**9)}
LIMIT = 60
MINUTE_S = 60.0
WORKERS = 4
SLACK_S = 0.5
"""Between a request's admission and its answer on a busy machine."""


@dataclass(frozen=True, slots=True)
class Size:
    """How many connections ask at once, for so many minutes (0: once each), pausing so long after a refusal."""

    connections: int
    minutes: int
    pause_s: float = 0.04


SHORT = Size(connections=150, minutes=0)
LONG = Size(connections=8, minutes=3)


async def a_minute_has_60(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Size, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """At most 60 in every rolling minute, exactly 60 in each consecutive one, and a Retry-After that is true."""
    numbers: dict[str, float] = {"workers": WORKERS, "minutes": size.minutes or 1}
    async with World(settings, pool, folder / "world", PRICES) as world:
        await world.engine(tokens=1)
        limits = {"requests_minute": LIMIT}
        modes = {name: await world.customer(name, 10**12, limits) for name in ("spread", "pinned")}
        gateway = await world.gateway(workers=WORKERS)
        clients = {
            "spread": await spread(gateway, size.connections),
            "pinned": await on_one_worker(gateway, size.connections),
        }
        until = time.time() + size.minutes * MINUTE_S - SLACK_S
        seen = await asyncio.gather(
            *(_saturate(world, clients[name], customer, until, size) for name, customer in modes.items())
        )
        for name, sightings in zip(modes, seen, strict=True):
            counts = judge(sightings, minutes=size.minutes or 1)
            tell(f"{name}: {counts} admitted, {len(sightings)} asked")
            numbers |= {f"{name}: requests": len(sightings), f"{name}: most in a minute": max(counts)}
            numbers |= {f"{name}: least in a minute": min(counts)}
        await world.reckon()
    return numbers


def judge(sightings: Sequence[Sighting], *, minutes: int) -> list[int]:
    """How many were admitted in each minute from the first on. Raises AssertionError: a limit was not kept, or not given."""
    assert {seen.status for seen in sightings} <= {200, 429}, {seen.status for seen in sightings}
    admitted = sorted((seen for seen in sightings if seen.status == 200), key=lambda seen: seen.began_at)
    for first, last in zip(admitted, admitted[LIMIT:], strict=False):
        apart_s = last.ended_at - first.began_at
        assert apart_s >= MINUTE_S, f"{LIMIT + 1} in {apart_s:.3f} s"
    began_at = admitted[0].began_at
    counts = [0] * minutes
    for seen in admitted:
        counts[min(minutes - 1, int((seen.began_at - began_at) // MINUTE_S))] += 1
    assert counts == [LIMIT] * minutes, counts
    for seen in sightings:
        if seen.status == 429:
            _is_true(seen, admitted)
    return counts


def _is_true(refused: Sighting, admitted: Sequence[Sighting]) -> None:
    """Its Retry-After is when the oldest of the last 60 is a minute old, in whole seconds that are not too few."""
    oldest = [seen for seen in admitted if seen.began_at <= refused.ended_at][-LIMIT:][0]
    told_s = int(refused.headers["retry-after"])
    least_s = oldest.began_at + MINUTE_S - refused.ended_at
    most_s = oldest.ended_at + MINUTE_S - refused.began_at + 1
    assert least_s - SLACK_S <= told_s <= most_s + SLACK_S, (
        f"not {least_s:.2f}..{most_s:.2f}: {refused.told()}"
    )
    assert refused.headers["x-ratelimit-limit-requests"] == str(LIMIT)


async def _saturate(
    world: World, clients: Sequence[Client], customer: Customer, until: float, size: Size
) -> list[Sighting]:
    """Everyone asks again and again, until then; at least once."""
    seen: list[Sighting] = []

    async def one(client: Client) -> None:
        while True:
            sighting = await client.ask(world.ask(customer, max_tokens=1))
            seen.append(sighting)
            if sighting.status != 200:
                await asyncio.sleep(size.pause_s)
            if time.time() >= until:
                return

    await asyncio.gather(*map(one, clients))
    world.sightings += seen
    return seen
