"""400 requests at once against a wallet that buys 40: over two workers, spread and pinned, held at once and three times.

What each request cost is told by the stand-in engine, not by the gateway.
"""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from tests.fakes.clients import Client, on_one_worker, spread
from tests.simulation.oracle import Prices
from tests.simulation.world import MODEL, Customer, World

TOKENS = 16
TOKEN_NANO = 1000
PRICES = {MODEL: Prices(prompt=0, cached=0, completion=TOKEN_NANO * 10**6)}
"""Prompts cost nothing, so that a hold is the token limit, to the nano."""

BUYS = 40
REQUESTS = 400
LEAST_SERVED = 38


@pytest.mark.parametrize("pinned", [False, True], ids=["spread", "pinned"])
@pytest.mark.parametrize("holds", [1, 3])
async def test_a_wallet_for_40_serves_38_or_more_of_400_and_is_never_overspent(
    settings, pool, tmp_path, holds: int, pinned: bool
):
    async with World(replace(settings, valkey_timeout_s=1.0), pool, tmp_path, PRICES) as world:
        # Once: the limit is what is produced. Three times: the engine stops at a third of the limit.
        await world.engine(tokens=TOKENS, pace_ms=2.0)
        body = {"max_tokens": holds * TOKENS, "ignore_eos": holds == 1}
        customer = await world.customer("poor", BUYS * TOKENS * TOKEN_NANO)
        gateway = await world.gateway(workers=2)
        clients = await (on_one_worker if pinned else spread)(gateway, REQUESTS)
        asks = [world.ask(customer, stream=number % 2 == 0, **body) for number in range(REQUESTS)]
        world.sightings += await asyncio.gather(*map(Client.ask, clients, asks))
        statuses = Counter(seen.status for seen in world.sightings)
        assert statuses.keys() <= {200, 402}, statuses
        assert LEAST_SERVED <= statuses[200] <= BUYS, statuses
        await spend_the_rest(world, customer, clients, left=BUYS - statuses[200])
        await world.reckon()
        spent = await pool.fetchval("select debit_nano from ledger_accounts where owner_id = $1", customer.id)
        assert spent == world.credited[customer.id], "the last cent was spendable"


async def spend_the_rest(world: World, customer: Customer, clients: list[Client], *, left: int) -> None:
    """One token at a time, on one worker after the other, until the wallet buys no more."""
    bought = 0
    for client in (clients[0], clients[-1]):
        while (seen := await client.ask(world.ask(customer, max_tokens=1, ignore_eos=True))).status == 200:
            world.sightings.append(seen)
            bought += 1
        assert seen.status == 402, seen.told()
    assert bought == left * TOKENS
