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

from billing import leases as leases_module
from billing import teller
from billing.incarnations import Incarnation, abandon_silent, close_incarnation, register, trim_leases
from billing.leases import BillingUnavailable, Hold, InsufficientFunds, SpendLeases
from billing.ledger import Posting, post_turns
from config.changes import ChangeFeed
from config.clock import SystemClock
from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.ids import uuid7
from config.postgres import open_pool
from tests.fakes.clock import FakeClock
from tests.fakes.stores import frozen, kill, using
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
    shipping: asyncio.Lock = field(default_factory=asyncio.Lock)

    def settle(self, account_id: int, hold: Hold, amount_nano: int) -> int:
        charged, _ = hold.settle(amount_nano)
        self.journal.append((account_id, charged))
        self.charged += charged
        return charged

    async def ship(self) -> None:
        async with self.shipping:  # whoever waits for it finds the batch before in the book
            batch, self.journal = self.journal, []
            postings = [
                Posting(uuid7(), account_id=account, provider_id=None, amount_nano=amount, share_nano=0)
                for account, amount in batch
                if amount
            ]
            async with self.pool.acquire() as connection, connection.transaction():
                await post_turns(connection, self.incarnation.id, postings, shard=0)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.leases.run())
            while True:
                await self.ship()
                await asyncio.sleep(0.02)


@asynccontextmanager
async def process(
    pool: asyncpg.Pool, settings: Settings, *, leases_from: Any = None, **changes: Any
) -> AsyncIterator[Process]:
    """A process that beats, ships, reports and hears of changes."""
    settings = replace(settings, **changes)
    made = await register(pool, settings, folder=Path("/nowhere"), host=socket.gethostname(), pid=os.getpid())
    leases = SpendLeases(leases_from or pool, made, settings, SystemClock())
    running = Process(pool, made, leases)
    changes_read = ChangeFeed(pool, None, settings)
    changes_read.on("wallet", leases.forget_wallet)
    changes_read.on("recall", leases.recall)
    changes_read.on("budget", leases.forget_budget)
    tasks = [asyncio.create_task(running.run()), asyncio.create_task(changes_read.run())]
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


async def lease(pool: asyncpg.Pool, at: Process, account_id: int) -> asyncpg.Record:
    return await pool.fetchrow(
        "select *, granted_nano - settled_nano - returned_nano as left_nano from spend_leases"
        " where incarnation_id = $1 and account_id = $2",
        at.incarnation.id,
        account_id,
    )


def counted(pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many accounts each batch of takes had."""
    batches: list[int] = []
    read = teller.read_book

    async def noted(
        connection: Any, incarnation: Any, live_s: float, accounts: list[int], *rest: Any, **kw: Any
    ) -> Any:
        batches.append(len(accounts))
        return await read(connection, incarnation, live_s, accounts, *rest, **kw)

    monkeypatch.setattr(teller, "read_book", noted)
    return batches


async def test_after_the_first_turn_a_large_wallet_is_held_from_in_memory(
    pool: asyncpg.Pool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await make_account(pool, "acme", 10**6 * CHARGE)
    batches = counted(pool, monkeypatch)
    async with process(pool, settings) as one:
        assert one.leases.try_hold(account, CHARGE, ()) is None
        one.settle(account, await one.leases.hold(account, CHARGE, ()), CHARGE)
        for _ in range(2_000):
            hold = one.leases.try_hold(account, CHARGE, ()) or await one.leases.hold(account, CHARGE, ())
            one.settle(account, hold, CHARGE)
            await asyncio.sleep(0)
        assert len(batches) < 30  # a block that did not last is followed by one twice as large
        await eventually(lambda: not one.journal)
        row = await wallet(pool, account)
        assert row["leased"] <= row["balance"] // 2


async def test_accounts_that_ask_in_one_tick_go_in_one_transaction(
    pool: asyncpg.Pool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts = [await make_account(pool, f"a{n}", 100 * CHARGE) for n in range(50)]
    batches = counted(pool, monkeypatch)
    async with process(pool, settings) as one:
        holds = await asyncio.gather(*(one.leases.hold(account, CHARGE, ()) for account in accounts))
        assert batches == [50]
        assert {hold.amount_nano for hold in holds} == {CHARGE}


async def test_a_free_turn_needs_no_lease(pool: asyncpg.Pool, settings: Settings) -> None:
    async with process(pool, settings) as one:
        hold = one.leases.try_hold(99, 0, ())
        assert hold is not None
        assert hold.settle(5) == (0, 5)


async def test_a_charge_beyond_its_hold_is_taken_from_what_is_free_and_else_lost(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    account = await make_account(pool, "acme", 10 * CHARGE)
    async with process(pool, settings) as one:
        hold = await one.leases.hold(account, 6 * CHARGE, ())
        other = await one.leases.hold(account, 3 * CHARGE, ())
        assert not hold.extend(CHARGE)  # a small wallet leases what the turns hold
        assert hold.settle(7 * CHARGE) == (6 * CHARGE, CHARGE)
        with pytest.raises(RuntimeError):
            hold.settle(0)
        hold.void()  # after its end it does nothing
        other.void()
        await eventually(lambda: available_is(pool, account, 4 * CHARGE))


async def available_is(pool: asyncpg.Pool, account: int, amount: int) -> bool:
    return (await wallet(pool, account))["available"] == amount


async def test_a_request_without_a_limit_gets_what_is_useful(pool: asyncpg.Pool, settings: Settings) -> None:
    account = await make_account(pool, "acme", 100)
    async with process(pool, settings, hold_wait_s=0.1) as one:
        first = await one.leases.hold(account, 10**9, (), least_nano=10)
        assert first.amount_nano == 50
        second = await one.leases.hold(account, 10**9, (), least_nano=40)
        assert second.amount_nano == 40
        with pytest.raises(InsufficientFunds):
            await one.leases.hold(account, 10**9, (), least_nano=20)


async def test_a_turn_waits_for_another_turns_surplus(pool: asyncpg.Pool, settings: Settings) -> None:
    account = await make_account(pool, "acme", 10 * CHARGE)
    async with (
        process(pool, settings, hold_wait_s=30.0) as one,
        process(pool, settings, hold_wait_s=30.0) as two,
    ):
        hold = await one.leases.hold(account, 10 * CHARGE, ())
        waits = [asyncio.create_task(at.leases.hold(account, 4 * CHARGE, ())) for at in (one, two)]
        await eventually(
            lambda: all(
                at.leases._accounts[account].waiters for at in (one, two) if account in at.leases._accounts
            )
        )
        one.settle(account, hold, CHARGE)
        for hold in await asyncio.gather(*waits):
            assert hold.amount_nano == 4 * CHARGE


async def test_the_idle_remainder_of_another_process_is_recalled(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    account = await make_account(pool, "acme", 100 * CHARGE)
    async with (
        process(pool, settings, hold_wait_s=30.0) as one,
        process(pool, settings, hold_wait_s=30.0) as two,
    ):
        one.settle(account, await one.leases.hold(account, CHARGE, ()), CHARGE)
        assert one.leases._accounts[account].wallet.free_nano > 0
        hold = await two.leases.hold(account, 99 * CHARGE, ())
        two.settle(account, hold, 99 * CHARGE)
    assert one.charged + two.charged == 100 * CHARGE


async def test_turns_are_served_first_come_first_served(pool: asyncpg.Pool, settings: Settings) -> None:
    account = await make_account(pool, "acme", 10)
    order: list[int] = []

    async def turn(n: int, amount: int) -> None:
        hold = await one.leases.hold(account, amount, ())
        order.append(n)
        hold.void()

    async with process(pool, settings, hold_wait_s=30.0) as one:
        first = await one.leases.hold(account, 10, ())
        tasks = [asyncio.create_task(turn(n, amount)) for n, amount in enumerate((9, 8, 1, 9))]
        await eventually(lambda: len(one.leases._accounts[account].waiters) == 4)
        first.void()
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3]


async def test_a_cancelled_waiter_leaves_no_trace(pool: asyncpg.Pool, settings: Settings) -> None:
    account = await make_account(pool, "acme", 10)
    async with process(pool, settings, hold_wait_s=30.0) as one:
        first = await one.leases.hold(account, 10, ())
        large = asyncio.create_task(one.leases.hold(account, 10, ()))
        behind = asyncio.create_task(one.leases.hold(account, 5, ()))
        await eventually(lambda: len(one.leases._accounts[account].waiters) == 2)
        first.settle(5)
        await asyncio.sleep(0)
        large.cancel()
        assert (await behind).amount_nano == 5
        with pytest.raises(asyncio.CancelledError):
            await large
        assert one.leases._waiting == 0
        assert not one.leases._accounts[account].waiters


async def test_a_grant_that_met_a_cancellation_is_given_back(pool: asyncpg.Pool, settings: Settings) -> None:
    account = await make_account(pool, "acme", 10)
    async with process(pool, settings, hold_wait_s=30.0) as one:
        first = await one.leases.hold(account, 10, ())
        waits = asyncio.create_task(one.leases.hold(account, 10, ()))
        await eventually(lambda: one.leases._accounts[account].waiters)
        first.void()  # it is granted here, and cancelled before it can run
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        (await one.leases.hold(account, 10, ())).void()
        await eventually(lambda: available_is(pool, account, 10))


async def test_a_broke_account_does_not_reach_postgresql_with_each_turn(
    pool: asyncpg.Pool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await make_account(pool, "acme", 0)
    batches = counted(pool, monkeypatch)
    monkeypatch.setattr(teller, "REFUSAL_S", 3600.0)
    async with process(pool, settings) as one:
        for _ in range(100):
            with pytest.raises(InsufficientFunds):
                await one.leases.hold(account, 1, ())
        assert len(batches) == 1
        await credit(pool, account, 5)
        await eventually(lambda: one.leases._accounts[account].refused is None)  # its change was heard
        (await one.leases.hold(account, 5, ())).void()


async def test_waiting_turns_are_bounded(
    pool: asyncpg.Pool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases_module, "WAITERS_MAX", 3)
    account = await make_account(pool, "acme", 10)
    async with process(pool, settings, hold_wait_s=0.2) as one:
        await one.leases.hold(account, 10, ())
        ends = await asyncio.gather(
            *(one.leases.hold(account, 10, ()) for _ in range(5)), return_exceptions=True
        )
        assert [type(end) for end in ends].count(BillingUnavailable) == 2


async def test_what_is_idle_goes_back_and_the_account_is_forgotten(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    account = await make_account(pool, "acme", 1_000 * CHARGE)
    async with process(pool, settings, lease_idle_s=0.05, lease_report_s=0.05) as one:
        for life in range(1, 4):  # each begins where the last one ended
            one.settle(account, await one.leases.hold(account, CHARGE, ()), CHARGE)
            assert one.leases._accounts[account].wallet.settled_nano == life * CHARGE
            await eventually(lambda: account not in one.leases._accounts)
            row = await lease(pool, one, account)
            assert (row["free_nano"], row["held_nano"], row["used_nano"]) == (0, 0, life * CHARGE)
        await eventually(lambda: available_is(pool, account, 997 * CHARGE))


async def test_accounts_in_memory_are_bounded(pool: asyncpg.Pool, settings: Settings) -> None:
    accounts = [await make_account(pool, f"a{n}", 1_000 * CHARGE) for n in range(40)]
    async with process(pool, settings, leases_max=16, lease_report_s=0.05) as one:
        for account in accounts:
            await eventually(lambda: len(one.leases._accounts) <= 17)
            one.settle(account, await one.leases.hold(account, CHARGE, ()), CHARGE)
        await eventually(lambda: len(one.leases._accounts) <= 16)
        assert accounts[-1] in one.leases._accounts


async def test_free_and_held_are_reported(pool: asyncpg.Pool, settings: Settings) -> None:
    account = await make_account(pool, "acme", 1_000 * CHARGE)
    async with process(pool, settings, lease_report_s=0.05) as one:
        holds = [await one.leases.hold(account, CHARGE, ()) for _ in range(3)]

        async def told() -> bool:
            row, pot = await lease(pool, one, account), one.leases._accounts[account].wallet
            return (row["free_nano"], row["held_nano"]) == (pot.free_nano, pot.held_nano)

        await eventually(told)
        holds[0].settle(CHARGE)
        holds[1].void()
        await eventually(told)
        await one.leases.close()
        assert (await lease(pool, one, account))["free_nano"] == 0
        holds[2].void()
        with pytest.raises(BillingUnavailable):
            await one.leases.hold(account, 1, ())


class LosingPool:
    """PostgreSQL commits, and the answer is lost."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self.loses = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    async def acquire(self) -> Any:
        return LosingConnection(await self._pool.acquire(), self)

    async def release(self, connection: "LosingConnection") -> None:
        await self._pool.release(connection.inner)


class LosingConnection:
    def __init__(self, inner: Any, pool: LosingPool) -> None:
        self.inner = inner
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def transaction(self) -> Any:
        begun, pool = self.inner.transaction(), self._pool

        class Transaction:
            async def start(self) -> None:
                await begun.start()

            async def commit(self) -> None:
                await begun.commit()
                if pool.loses:
                    pool.loses -= 1
                    raise TimeoutError("the answer was lost")

        return Transaction()


async def test_a_take_or_return_whose_answer_was_lost_costs_nobody_anything(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    account = await make_account(pool, "acme", 100 * CHARGE)
    losing = LosingPool(pool)
    async with process(pool, settings, leases_from=losing) as one:
        for amount in (CHARGE, 60 * CHARGE):
            losing.loses = 1
            with pytest.raises(BillingUnavailable):
                await one.leases.hold(account, amount, ())
            hold = await one.leases.hold(account, amount, ())
            losing.loses = 1  # of the return, if there is one
            one.settle(account, hold, CHARGE)
            losing.loses = 0
        losing.loses = 1
        one.leases.recall(str(account))
        await eventually(lambda: not losing.loses)
        (await one.leases.hold(account, 98 * CHARGE, ())).void()
        await eventually(lambda: available_is(pool, account, 98 * CHARGE))


async def test_without_postgresql_what_is_leased_goes_on_and_the_rest_is_503(
    private_stores: EmbeddedStores, settings: Settings
) -> None:
    async with using(private_stores, settings, lease_report_s=0.05) as (changed, pool):
        warm = await make_account(pool, "warm", 10_000 * CHARGE)
        cold = await make_account(pool, "cold", 10_000 * CHARGE)
        own = await open_pool(changed.database_url, max_size=4, timeout_s=0.5)
        made = await register(own, changed, folder=Path("/nowhere"), host="here", pid=1)
        leases = SpendLeases(own, made, changed, SystemClock())
        task = asyncio.create_task(leases.run())

        async def is_served() -> bool:
            try:
                (await leases.hold(cold, CHARGE, ())).void()
            except BillingUnavailable:
                return False
            return True

        async def outlives_an_absence(account: int) -> None:
            hold = leases.try_hold(warm, CHARGE, ())
            assert hold is not None
            hold.settle(CHARGE)
            ends = await asyncio.gather(
                *(leases.hold(account, 9_000 * CHARGE, ()) for _ in range(20)), return_exceptions=True
            )
            assert {type(end) for end in ends} == {BillingUnavailable}

        try:
            open_hold = await leases.hold(warm, CHARGE, ())
            await pool.execute("checkpoint")  # the tests' PostgreSQL commits asynchronously
            kill(private_stores, "postgres")
            await outlives_an_absence(warm)
            await outlives_an_absence(cold)
            open_hold.settle(CHARGE)
            private_stores.restart("postgres")
            await eventually(is_served)
            with frozen(private_stores, "postgres"):
                await outlives_an_absence(cold)
            await eventually(is_served)
        finally:
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=1)
        await leases.close()
        assert (await wallet(pool, warm))["leased"] == 4 * CHARGE  # what is charged and not shipped
        own.terminate()


async def test_a_process_that_was_not_heard_of_stops_using_its_leases(
    pool: asyncpg.Pool, settings: Settings, clock: FakeClock
) -> None:
    account = await make_account(pool, "acme", 1_000 * CHARGE)
    made = await register(pool, settings, folder=Path("/nowhere"), host="here", pid=1)
    leases = SpendLeases(pool, made, settings, clock)
    await leases.tend()
    (await leases.hold(account, CHARGE, ())).void()
    clock.advance(settings.lease_grace_s * 0.8)
    hold = leases.try_hold(account, CHARGE, ())
    assert hold is not None
    clock.advance(settings.lease_grace_s * 0.15)
    assert leases.try_hold(account, CHARGE, ()) is None
    with pytest.raises(BillingUnavailable):
        await leases.hold(account, CHARGE, ())
    assert hold.settle(CHARGE) == (CHARGE, 0)  # what was begun may end
    await leases.tend()  # PostgreSQL is heard again, and did not give it up
    assert leases.try_hold(account, CHARGE, ()) is not None


async def test_a_silent_process_is_given_up_and_says_that_its_leases_are_lost(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    account = await make_account(pool, "acme", 1_000 * CHARGE)
    made = await register(pool, settings, folder=Path("/nowhere"), host="here", pid=1)
    leases = SpendLeases(pool, made, settings, SystemClock())
    await leases.hold(account, CHARGE, ())
    assert await abandon_silent(pool, settings) == []
    await pool.execute("update incarnations set seen_at = seen_at - interval '5 hours'")
    # A PostgreSQL that has just come back could hear nobody.
    assert await abandon_silent(pool, replace(settings, lease_grace_s=4 * 3600.0)) in ([], [made.id])
    await pool.execute("update incarnations set state = 'live'")
    async with pool.acquire() as connection, connection.transaction():
        await close_incarnation(connection, made.id, "abandoned")
        await close_incarnation(connection, made.id, "abandoned")
    assert tuple(await wallet(pool, account)) == (1_000 * CHARGE, 0, 1_000 * CHARGE)
    with pytest.raises(BillingUnavailable):
        await leases.hold(account, 900 * CHARGE, ())
    assert leases.is_lost.is_set()
    assert leases.try_hold(account, 1, ()) is None


async def test_before_it_is_registered_a_process_can_tell_nothing_and_is_not_lost(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    account = await make_account(pool, "acme", CHARGE)
    made = Incarnation(uuid7(), Path("/nowhere"))
    leases = SpendLeases(pool, made, settings, SystemClock())
    with pytest.raises(BillingUnavailable):
        await leases.hold(account, CHARGE, ())
    assert not leases.is_lost.is_set()
    for _ in range(2):  # the first answer may have been lost
        await register(pool, settings, folder=made.folder, host="here", pid=1, incarnation_id=made.id)
    (await leases.hold(account, CHARGE, ())).void()
    await leases.close()


async def test_lease_rows_of_long_ended_processes_are_trimmed(pool: asyncpg.Pool, settings: Settings) -> None:
    account = await make_account(pool, "acme", CHARGE)
    for n in (29, 31):
        made = await register(pool, settings, folder=Path("/nowhere"), host="here", pid=n)
        leases = SpendLeases(pool, made, settings, SystemClock())
        (await leases.hold(account, CHARGE, ())).void()
        await leases.close()
        async with pool.acquire() as connection, connection.transaction():
            await close_incarnation(connection, made.id, "closed")
        await pool.execute(
            "update incarnations set ended_at = now() - make_interval(days => $1) where id = $2", n, made.id
        )
    assert await trim_leases(pool) == 1
    assert await pool.fetchval("select count(*) from spend_leases") == 1
