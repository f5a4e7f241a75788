"""What goes wrong beside leases, and must stay beside: one bad row, a late report, a PostgreSQL that came back older."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from billing import lease_store, teller
from billing import leases as leases_module
from billing.incarnations import abandon_silent, register
from billing.leases import BillingUnavailable, SpendLeases
from config.changes import trim_changes
from config.defaults import Settings
from tests import books
from tests.fakes.clock import FakeClock
from tests.integration.test_leases import CHARGE, Process, make_account, process, wallet
from tests.waiting import eventually


async def row(pool: asyncpg.Pool, at: Process, account: int) -> asyncpg.Record:
    return await pool.fetchrow(
        "select *, granted_nano - settled_nano - returned_nano as left_nano from spend_leases"
        " where incarnation_id = $1 and account_id = $2",
        at.incarnation.id, account,
    )  # fmt: skip


async def test_one_account_whose_rows_are_wrong_stops_no_other(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    bad, *good = [await make_account(pool, name, 1_000 * CHARGE) for name in "abcde"]
    async with process(pool, settings) as one:
        (await one.leases.hold(bad, CHARGE, ())).void()
        await pool.execute(
            "update ledger_accounts set leased_nano = 0 where kind = 'wallet' and owner_id = $1", bad
        )
        one.leases.recall(str(bad))  # what goes back is more than the wallet says was leased
        for hold in await asyncio.gather(*(one.leases.hold(account, CHARGE, ()) for account in good)):
            hold.void()
        with pytest.raises(BillingUnavailable):
            await one.leases.hold(bad, 1, ())
        assert not one.leases.is_away


async def test_a_report_that_comes_after_a_return_is_put_right(
    pool: asyncpg.Pool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await make_account(pool, "acme", 1_000 * CHARGE)
    report, late = leases_module.report, list[int]()

    async with process(pool, settings, lease_report_s=0.05) as one:

        async def report_late(pool: Any, incarnation: Any, rows: Any, timeout_s: float) -> None:
            free = rows[0][1]
            if free and not late:  # by the time that it is told it went back
                one.leases.recall(str(account))
                await one.leases._teller.idle()
            await report(pool, incarnation, rows, timeout_s)
            late.append(free)

        monkeypatch.setattr(leases_module, "report", report_late)
        await one.leases.hold(account, CHARGE, ())
        await eventually(lambda: late)

        async def is_right() -> bool:
            return (await row(pool, one, account))["free_nano"] == 0 and len(late) > 1

        await eventually(is_right)


async def test_an_account_that_could_not_be_told_while_idle_is_forgotten_later(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    account = await make_account(pool, "acme", 1_000 * CHARGE)
    async with process(pool, settings, lease_report_s=0.05, lease_idle_s=0.2) as one:
        (await one.leases.hold(account, CHARGE, ())).void()
        known = one.leases._accounts[account]
        await eventually(lambda: known.is_empty)
        one.leases._teller._fail([known], TimeoutError())
        await eventually(lambda: account not in one.leases._accounts)


@pytest.mark.parametrize("has_row", [True, False])
async def test_a_book_that_came_back_older_than_a_lease_adds_up_again(
    pool: asyncpg.Pool, settings: Settings, has_row: bool
) -> None:
    """A backup, or a replica that lagged: the last grant is not in it, and its turns run."""
    account = await make_account(pool, "acme", 1_000 * CHARGE)
    async with process(pool, settings) as one:
        if has_row:
            (await one.leases.hold(account, CHARGE, ())).void()
        before = await wallet(pool, account), await row(pool, one, account)
        held = await one.leases.hold(account, 500 * CHARGE, ())
        await pool.execute(
            "update ledger_accounts set leased_nano = $2 where kind = 'wallet' and owner_id = $1",
            account, before[0]["leased"],
        )  # fmt: skip
        if has_row:
            await pool.execute(
                "update spend_leases set granted_nano = $2, returned_nano = $3 where account_id = $1",
                account, before[1]["granted_nano"], before[1]["returned_nano"],
            )  # fmt: skip
        else:
            await pool.execute("delete from spend_leases where account_id = $1", account)
        (await one.leases.hold(account, 300 * CHARGE, ())).void()
        one.settle(account, held, 400 * CHARGE)
        await one.ship()
        one.leases.recall(str(account))

        async def adds_up() -> bool:
            leased = (await row(pool, one, account))["left_nano"]
            return leased == 0 and tuple(await wallet(pool, account)) == (600 * CHARGE, 0, 600 * CHARGE)

        await eventually(adds_up)


async def test_a_silent_process_that_cannot_be_given_up_holds_up_no_other(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    account = await make_account(pool, "acme", 1_000 * CHARGE)
    ids = [await books.incarnation(pool) for _ in range(2)]
    await books.lease(pool, ids[0], account, CHARGE)
    await pool.execute("update ledger_accounts set leased_nano = 0")  # wrong: it can't be returned
    await pool.execute("update incarnations set seen_at = seen_at - interval '5 hours'")
    assert await abandon_silent(pool, replace(settings, lease_grace_s=1.0)) in ([], [ids[1]])
    assert await pool.fetchval("select state from incarnations where id = $1", ids[0]) == "live"


async def test_processes_that_ask_at_once_for_the_same_remainders_write_one_row(pool: asyncpg.Pool) -> None:
    async def ask(*accounts: int) -> int:
        async with pool.acquire() as connection, connection.transaction():
            await lease_store.recall(connection, accounts, [7])
        found: int = await pool.fetchval("select count(*) from changes where kind in ('recall', 'budget')")
        return found

    assert [await ask(1), await ask(1), await ask(1, 2)] == [2, 2, 3]
    await pool.execute("update changes set at = at - interval '1 second'")
    assert await ask(1) == 5
    await pool.execute("update changes set at = at - interval '1 hour'")
    await trim_changes(pool)
    kinds = await pool.fetch("select kind from changes where kind in ('recall', 'budget')")
    assert [row["kind"] for row in kinds] == ["budget", "budget"]


async def test_a_first_take_is_one_question_and_one_answer_in_a_transaction(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    account = await make_account(pool, "acme", 1_000 * CHARGE)
    asked: list[str] = []

    async with process(pool, settings) as one:

        @asynccontextmanager
        async def only_that(*_: Any) -> AsyncIterator[Any]:
            async with pool.acquire() as connection, connection.transaction():
                with connection.query_logger(lambda query: asked.append(query.query)):
                    yield connection

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(teller, "transaction", only_that)
            (await one.leases.hold(account, CHARGE, ())).void()
    asked = [
        query for query in asked if "jit" not in query and "typeinfo" not in query
    ]  # asyncpg's, of a new connection
    assert [query.split()[0] for query in asked] == ["select", "with"], asked


async def test_all_accounts_are_seen_within_the_idle_time_however_many_they_are(
    pool: asyncpg.Pool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases_module, "SWEEP_MIN", 1)
    accounts = [await make_account(pool, str(n), 1_000 * CHARGE) for n in range(20)]
    made = await register(pool, settings, folder=Path("/nowhere"), host="here", pid=1)
    clock = FakeClock()
    leases = SpendLeases(pool, made, replace(settings, lease_report_s=1.0, lease_idle_s=10.0), clock)
    for account in accounts:
        (await leases.hold(account, CHARGE, ())).void()
    for _ in range(25):  # idle after 10, given back within 10 more, and forgotten when next seen
        clock.advance(1.0)
        await leases.tend()
        await leases._teller.idle()
    assert all(not account.wallet.free_nano for account in leases._accounts.values())
