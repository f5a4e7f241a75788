"""Spend leases on a real PostgreSQL: several processes share wallets, and nothing is ever overspent."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from billing.incarnations import (
    Incarnation,
    register,
)
from billing.leases import Hold, InsufficientFunds, SpendLeases
from billing.ledger import Posting, post_turns
from config.changes import ChangeFeed
from config.clock import SystemClock
from config.defaults import Settings
from config.ids import uuid7
from tests.waiting import eventually

CHARGE = 1_000


async def make_account(pool: asyncpg.Pool, name: str, balance_nano: int) -> int:
    account_id = await pool.fetchval("insert into accounts (name) values ($1) returning id", name)
    await credit(pool, account_id, balance_nano)
    return account_id


async def credit(pool: asyncpg.Pool, account_id: int, amount_nano: int) -> None:
    await pool.execute(
        "update ledger_accounts set credit_nano = credit_nano + $2 where kind = 'wallet' and owner_id = $1",
        account_id,
        amount_nano,
    )


@dataclass
class Process:
    """One gateway process's leases, what it charged and has not shipped, and its shipper."""

    pool: asyncpg.Pool
    incarnation: Incarnation
    leases: SpendLeases
    journal: list[tuple[int, int]] = field(default_factory=list)  # (account, charged)
    charged: int = 0

    def settle(self, account_id: int, hold: Hold, amount_nano: int) -> int:
        charged, _ = hold.settle(amount_nano)
        self.journal.append((account_id, charged))
        self.charged += charged
        return charged

    async def ship(self) -> None:
        batch, self.journal = self.journal, []
        postings = [
            Posting(uuid7(), account_id=account, provider_id=None, amount_nano=amount, share_nano=0)
            for account, amount in batch
            if amount
        ]
        async with self.pool.acquire() as connection, connection.transaction():
            await post_turns(connection, self.incarnation.id, postings, from_loss=False, shard=0)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.leases.run())
            while True:
                await self.ship()
                await asyncio.sleep(0.02)


@asynccontextmanager
async def process(
    pool: asyncpg.Pool, settings: Settings, *, feed: bool = True, **changes: Any
) -> AsyncIterator[Process]:
    """A process that beats, ships, reports and hears of changes."""
    settings = replace(settings, **changes)
    made = await register(pool, settings, folder=Path("/nowhere"), host=socket.gethostname(), pid=os.getpid())
    leases = SpendLeases(pool, made, settings, SystemClock())
    running = Process(pool, made, leases)
    changes_read = ChangeFeed(pool, None, settings)
    changes_read.on("wallet", leases.forget_wallet)
    changes_read.on("recall", leases.recall)
    changes_read.on("budget", leases.forget_budget)
    tasks = [asyncio.create_task(running.run())]
    if feed:
        tasks.append(asyncio.create_task(changes_read.run()))
        await eventually(lambda: changes_read.was_read)
    try:
        yield running
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def wallet(pool: asyncpg.Pool, account_id: int) -> asyncpg.Record:
    return await pool.fetchrow(
        "select credit_nano - debit_nano as balance, leased_nano as leased,"
        " credit_nano - debit_nano - pending_debit_nano - leased_nano as available"
        " from ledger_accounts where kind = 'wallet' and owner_id = $1",
        account_id,
    )


@pytest.mark.parametrize("holds", [1, 3])
@pytest.mark.parametrize("spread", [True, False])
async def test_a_wallet_of_forty_charges_serves_all_but_what_holds_round_off(
    pool: asyncpg.Pool, settings: Settings, holds: int, spread: bool
) -> None:
    account = await make_account(pool, "acme", 40 * CHARGE)
    served: list[int] = []
    refused: list[int] = []

    async def turn(n: int, at: Process, hold_nano: int = holds * CHARGE) -> None:
        try:
            hold = await at.leases.hold(account, hold_nano, ())
        except InsufficientFunds:
            refused.append(n)
            return
        await asyncio.sleep(0.01)
        at.settle(account, hold, CHARGE)
        served.append(n)

    async with process(pool, settings) as one, process(pool, settings) as two:
        await asyncio.gather(*(turn(n, two if spread and n % 2 else one) for n in range(400)))
        assert len(served) + len(refused) == 400
        assert 40 - holds + 1 <= len(served) <= 40
        left = 40 - len(served)
        for _ in range(left):  # the last cent, by holds that fit
            await turn(-1, one, CHARGE)
        assert len(served) == 40
        with pytest.raises(InsufficientFunds):
            await one.leases.hold(account, 1, ())
        await one.ship()
        await two.ship()
        await one.leases.close()
        await two.leases.close()
    assert tuple(await wallet(pool, account)) == (0, 0, 0)
