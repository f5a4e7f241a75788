"""The audit says nothing of a right book, and finds every way in which one was made wrong."""

import asyncio
import datetime as dt
import json
import os
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from billing import audit
from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.postgres import SQL_FOLDERS, migrate, open_pool
from gateway.__main__ import main
from gateway.identity.accounts import AccountStore
from tests import books
from tests.books import TODAY, apply, resolving, spending
from tests.conftest import database_named

FUTURE = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
SEEDS = 8


async def built(pool: asyncpg.Pool) -> None:
    """A book with a bit of everything: two live processes and a closed one, postings, pendings and a budget."""
    renters = [await books.account(pool, 100_000) for _ in range(3)]
    racks = [await books.account(pool) for _ in range(2)]
    live, other, closed = [await books.incarnation(pool) for _ in range(3)]
    for process in (live, other, closed):
        for renter in renters:
            await books.lease(pool, process, renter, 10_000)
            for n, rack in enumerate((racks[0], racks[1], None)):
                await books.use(pool, process, renter, [7 * n + 13, 100 + n, 1], provider_id=rack)
    await books.use(pool, other, renters[0], [55, 5], started_at=TODAY - dt.timedelta(days=1))
    await close(pool, closed)
    pendings = [
        spending(renters[0], 900 + n, phase="pending", expires_at=FUTURE if n % 2 else None) for n in range(4)
    ]
    await apply(pool, *pendings, resolving(pendings[0].id, "post", 600), resolving(pendings[1].id, "void"))
    await budget(pool, renters[0], live)


async def close(pool: asyncpg.Pool, process: Any) -> None:
    await pool.execute(
        "update ledger_accounts l set leased_nano = l.leased_nano - s.granted_nano + s.settled_nano"
        " from spend_leases s where s.incarnation_id = $1 and l.kind = 'wallet' and l.owner_id = s.account_id",
        process,
    )
    await pool.execute(
        "update spend_leases set returned_nano = granted_nano - settled_nano where incarnation_id = $1",
        process,
    )
    await pool.execute(
        "update incarnations set state = 'closed', ended_at = clock_timestamp() where id = $1", process
    )


async def budget(pool: asyncpg.Pool, account_id: int, process: Any) -> None:
    budget_id = await pool.fetchval(
        "insert into budgets (account_id, period, limit_nano) values ($1, 'day', 5000) returning id",
        account_id,
    )
    await pool.execute(
        "insert into budget_windows (budget_id, starts_at, ends_at, spent_nano, leased_nano)"
        " values ($1, $2, $3, 350, 600)",
        budget_id, TODAY, TODAY + dt.timedelta(days=1),
    )  # fmt: skip
    await pool.execute(
        "insert into budget_leases (incarnation_id, budget_id, starts_at, granted_nano, settled_nano, returned_nano)"
        " values ($1, $2, $3, 1000, 350, 50)",
        process, budget_id, TODAY,
    )  # fmt: skip


Connection = Any
Corruption = Callable[[Connection, random.Random], Awaitable[str]]


async def some(connection: Connection, rng: random.Random, query: str) -> asyncpg.Record:
    rows = await connection.fetch(query)
    return rng.choice(rows)


async def a_posting_is_dropped(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, "select id from transfers where posting_id is not null order by id")
    return await connection.execute("delete from transfers where id = $1", row["id"])


async def a_posting_is_doubled(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, "select id from transfers where posting_id is not null order by id")
    return await connection.execute(
        "insert into transfers select (jsonb_populate_record(t, jsonb_build_object('id', gen_random_uuid()))).*"
        " from transfers t where id = $1",
        row["id"],
    )


async def a_doubled_posting_is_in_the_balances_too(connection: Connection, rng: random.Random) -> str:
    row = await some(
        connection, rng, "select * from transfers where posting_id is not null and kind = 'turn' order by id"
    )
    await connection.execute(
        "insert into transfers select (jsonb_populate_record(t, jsonb_build_object('id', gen_random_uuid()))).*"
        " from transfers t where id = $1",
        row["id"],
    )
    await connection.execute(
        "update ledger_accounts set credit_nano = credit_nano + $2 where id = $1",
        row["credit_id"],
        row["amount_nano"],
    )
    return await connection.execute(
        "update ledger_accounts set debit_nano = debit_nano + $2, leased_nano = leased_nano - $2 where id = $1",
        row["debit_id"],
        row["amount_nano"],
    )


async def an_amount_is_off_by_one(connection: Connection, rng: random.Random) -> str:
    # What a pending transfer was, once it is resolved, moves nothing any more.
    row = await some(
        connection, rng,
        "select id from transfers t where amount_nano > 1 and phase in ('posted', 'post', 'pending')"
        " and not exists (select from transfers r where r.pending_id = t.id) order by at, id",
    )  # fmt: skip
    return await connection.execute(
        "update transfers set amount_nano = amount_nano + $2 where id = $1", row["id"], rng.choice([-1, 1])
    )


async def a_balance_is_off_by_one(connection: Connection, rng: random.Random) -> str:
    column = rng.choice(["debit_nano", "credit_nano"])
    row = await some(connection, rng, f"select id from ledger_accounts where {column} > 0 order by id")
    way = 1 if column == "credit_nano" else rng.choice([-1, 1])
    return await connection.execute(
        f"update ledger_accounts set {column} = {column} + $2 where id = $1", row["id"], way
    )


async def a_posting_goes_to_somebody_else(connection: Connection, rng: random.Random) -> str:
    row = await some(
        connection, rng,
        "select t.*, o.id as other from transfers t join ledger_accounts c on c.id = t.credit_id and c.kind = 'earnings'"
        " join ledger_accounts o on o.kind = 'earnings' and o.id <> c.id where t.posting_id is not null"
        " order by t.id, o.id",
    )  # fmt: skip
    await connection.execute("update transfers set credit_id = $2 where id = $1", row["id"], row["other"])
    for account, way in ((row["credit_id"], -1), (row["other"], 1)):
        done = await connection.execute(
            "update ledger_accounts set credit_nano = credit_nano + $2 where id = $1", account, way * row["amount_nano"]
        )  # fmt: skip
    return done


LEASE = (
    "select incarnation_id, account_id, granted_nano - settled_nano - returned_nano as remainder from spend_leases"
    " where granted_nano - settled_nano - returned_nano > 0 order by 1, 2"
)


async def a_lease_is_released_too_far(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, LEASE)
    return await connection.execute(
        "update spend_leases set returned_nano = returned_nano + $3 where incarnation_id = $1 and account_id = $2",
        row["incarnation_id"],
        row["account_id"],
        rng.randint(1, row["remainder"]),
    )


async def a_wallet_says_that_less_is_leased(connection: Connection, rng: random.Random) -> str:
    row = await some(
        connection, rng, "select id, leased_nano from ledger_accounts where leased_nano > 0 order by id"
    )
    return await connection.execute(
        "update ledger_accounts set leased_nano = leased_nano - $2 where id = $1",
        row["id"],
        rng.randint(1, row["leased_nano"]),
    )


async def a_lease_settles_too_much(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, LEASE)
    await connection.execute(
        "update ledger_accounts set leased_nano = leased_nano - 1 where kind = 'wallet' and owner_id = $1",
        row["account_id"],
    )
    return await connection.execute(
        "update spend_leases set settled_nano = settled_nano + 1 where incarnation_id = $1 and account_id = $2",
        row["incarnation_id"],
        row["account_id"],
    )


async def a_report_is_larger_than_its_lease(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, LEASE)
    return await connection.execute(
        f"update spend_leases set {rng.choice(['free_nano', 'held_nano'])} = $3"
        " where incarnation_id = $1 and account_id = $2",
        row["incarnation_id"],
        row["account_id"],
        row["remainder"] + 1,
    )


async def a_usage_row_is_lost(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, "select turn_id from usage order by turn_id")
    return await connection.execute("delete from usage where turn_id = $1", row["turn_id"])


async def a_usage_row_is_off_by_one(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, "select turn_id from usage where amount_nano > 1 order by turn_id")
    return await connection.execute(
        "update usage set amount_nano = amount_nano + $2 where turn_id = $1",
        row["turn_id"],
        rng.choice([-1, 1]),
    )


async def a_usage_row_forgets_its_posting(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, "select turn_id from usage order by turn_id")
    return await connection.execute("update usage set posting_id = null where turn_id = $1", row["turn_id"])


async def a_rollup_is_changed(connection: Connection, rng: random.Random) -> str:
    table, column = (
        rng.choice(["usage_days", "usage_hours"]),
        rng.choice(["turns", "prompt_tokens", "amount_nano"]),
    )
    row = await some(connection, rng, f"select ctid::text from {table} order by ctid")
    return await connection.execute(
        f"update {table} set {column} = {column} + $2 where ctid = $1::text::tid", row["ctid"], rng.choice([-1, 1])
    )  # fmt: skip


async def a_rollup_row_is_lost(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, "select ctid::text from usage_days order by account_id, day")
    return await connection.execute("delete from usage_days where ctid = $1::text::tid", row["ctid"])


async def a_budget_window_drifts(connection: Connection, rng: random.Random) -> str:
    column = rng.choice(["spent_nano", "leased_nano"])
    return await connection.execute(
        f"update budget_windows set {column} = {column} + $1", rng.choice([-1, 1])
    )


async def an_ended_process_still_leases(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, LEASE)
    return await connection.execute(
        "update incarnations set state = $2 where id = $1",
        row["incarnation_id"],
        rng.choice(["closed", "abandoned"]),
    )


async def a_resolution_is_dropped(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, "select id from transfers where pending_id is not null order by id")
    return await connection.execute("delete from transfers where id = $1", row["id"])


async def a_pending_transfer_is_forgotten(connection: Connection, rng: random.Random) -> str:
    row = await some(connection, rng, "select id from open_transfers order by id")
    return await connection.execute("delete from open_transfers where id = $1", row["id"])


CORRUPTIONS: tuple[Corruption, ...] = (
    a_posting_is_dropped, a_posting_is_doubled, a_doubled_posting_is_in_the_balances_too, an_amount_is_off_by_one,
    a_balance_is_off_by_one, a_posting_goes_to_somebody_else, a_lease_is_released_too_far,
    a_wallet_says_that_less_is_leased, a_lease_settles_too_much, a_report_is_larger_than_its_lease, a_usage_row_is_lost,
    a_usage_row_is_off_by_one, a_usage_row_forgets_its_posting, a_rollup_is_changed, a_rollup_row_is_lost,
    a_budget_window_drifts, an_ended_process_still_leases, a_resolution_is_dropped, a_pending_transfer_is_forgotten,
)  # fmt: skip


async def test_a_right_book_is_clean(pool: asyncpg.Pool, settings: Settings) -> None:
    await built(pool)
    for finding in await audit.run(pool, settings):
        assert (finding.check.name, finding.state, finding.rows) == (finding.check.name, "ok", ())


async def test_an_empty_book_is_clean(pool: asyncpg.Pool, settings: Settings) -> None:
    assert {finding.state for finding in await audit.run(pool, settings)} == {"ok"}


async def test_every_seeded_corruption_is_found(pool: asyncpg.Pool, settings: Settings) -> None:
    await built(pool)
    for corrupt in CORRUPTIONS:
        for seed in range(SEEDS):
            async with pool.acquire() as connection:
                transaction = connection.transaction()
                await transaction.start()
                # Triggers keep transfers as they are: whoever corrupts a book gets past them.
                await connection.execute("set local session_replication_role = replica")
                said = await corrupt(connection, random.Random(seed))
                assert not said.endswith(" 0"), f"{corrupt.__name__}, seed {seed}: nothing was changed"
                found = [f for f in await audit.findings(connection, settings) if f.state == "broken"]
                await transaction.rollback()
            assert found, f"{corrupt.__name__}, seed {seed}, was not found"
            assert all(finding.rows and finding.count >= len(finding.rows) for finding in found)
    assert {finding.state for finding in await audit.run(pool, settings)} == {"ok"}


async def test_a_pending_transfer_that_nobody_expires_is_found(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    acme = await books.account(pool, 100)
    past = dt.datetime.now(dt.UTC) - dt.timedelta(minutes=2)
    await apply(pool, spending(acme, 5, phase="pending", expires_at=past))
    assert [f.check.name for f in await audit.run(pool, settings) if f.count] == ["pendings_expire"]


async def test_usage_past_its_retention_is_not_missed(pool: asyncpg.Pool, settings: Settings) -> None:
    acme, process = await books.account(pool, 100_000), await books.incarnation(pool)
    await books.lease(pool, process, acme, 10_000)
    old, kept = TODAY - dt.timedelta(days=20), TODAY - dt.timedelta(days=10)
    for day in (old, kept):
        name = f"usage_{day:%Y%m%d}"
        await pool.execute(
            f"create table {name} partition of usage for values from ('{day}') to ('{day + dt.timedelta(days=1)}')"
        )
        posting = await books.use(pool, process, acme, [50], started_at=day)
        await pool.execute("alter table transfers disable trigger transfers_immutable")
        await pool.execute("update transfers set at = $2 where posting_id = $1", posting, day)
    await books.use(pool, process, acme, [60])
    assert [f.rows for f in await audit.run(pool, settings) if f.count] == []
    await pool.execute(f"drop table usage_{old:%Y%m%d}")
    assert [f.rows for f in await audit.run(pool, settings) if f.count] == []
    await pool.execute("delete from usage where amount_nano = 60")
    assert {f.check.name for f in await audit.run(pool, settings) if f.count} == {
        "postings_match_turns", "usage_days_add_up", "usage_hours_add_up",
    }  # fmt: skip


async def test_a_book_that_was_opened_over_older_balances_is_clean(
    stores: EmbeddedStores, settings: Settings, tmp_path: Path
) -> None:
    for path in (path for folder in SQL_FOLDERS for path in folder.glob("000[1-4]_*.sql")):
        shutil.copy(path, tmp_path)
    name = f"before_the_ledger_{os.getpid()}"
    url = database_named(stores.database_url, name)
    await administer(stores.database_url, f"create database {name}")
    try:
        await migrate(url, folders=(tmp_path,))
        await administer(
            url,
            "insert into accounts (name, balance_nano) values ('rich', 1000), ('over', -5), ('new', 0);"
            "insert into usage select gen_random_uuid(), 1, 1, now(), 's', 'm', null, null, false, 'finished', 200,"
            " 10, 0, 5, false, null, 1, n * 10, 'p' from generate_series(0, 3) n",
        )
        await migrate(url)
        async with await open_pool(url, max_size=2, timeout_s=10) as pool:
            assert [f.rows for f in await audit.run(pool, settings) if f.count] == []
            shown = [(a.balance_nano, a.spent_nano, a.turns) for a in await AccountStore(pool).list()]
            assert shown == [(1000, 60, 4), (0, 0, 0), (0, 0, 0)]
    finally:
        await administer(stores.database_url, f"drop database {name} with (force)")


async def administer(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def test_many_rows_are_counted_and_the_first_shown(pool: asyncpg.Pool, settings: Settings) -> None:
    await pool.execute(
        "insert into usage_quarantine (turn_id, reason, record) select n, 'r', '{}' from generate_series(1, 50) n"
    )
    (finding,) = [f for f in await audit.run(pool, settings) if f.count]
    assert (finding.state, finding.count, len(finding.rows)) == ("warning", 50, audit.ROWS_MAX)


@pytest.fixture
def cli(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    monkeypatch.setenv("REDIS_URL", settings.redis_url)

    def run(*typed: str, code: int = 0) -> str:
        assert main(typed) == code
        return capsys.readouterr().out

    return run


def test_the_command_tells_what_is_broken_and_how_to_go_on(
    cli: Callable[..., str], settings: Settings
) -> None:
    assert "The book is right." in cli("audit")
    cli("account", "create", "--name", "acme", "--balance", "1")
    execute(settings, "insert into usage_quarantine (turn_id, reason, record) values ('t', 'refused', '{}')")
    warned = cli("audit")
    assert "reason=refused" in warned
    assert "nobody was charged" in warned
    assert json.loads(cli("audit", "--json"))["is_clean"] is True
    execute(settings, "update ledger_accounts set credit_nano = credit_nano - 1 where kind = 'wallet'")
    told = cli("audit", code=1)
    assert "balances_rebuild: 1 rows, the first 1:" in told
    assert "credit_nano=999999999, credit_of_transfers=1000000000" in told
    assert "put right by further transfers" in told
    broken = [
        c["name"] for c in json.loads(cli("audit", "--json", code=1))["checks"] if c["state"] == "broken"
    ]
    assert broken == ["entries_sum_to_zero", "balances_rebuild"]


def execute(settings: Settings, statement: str) -> None:
    asyncio.run(administer(settings.database_url, statement))
