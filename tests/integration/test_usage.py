"""Usage on a real PostgreSQL: every turn is charged exactly once, whatever happens on the way."""

# ruff: noqa: ASYNC110 (what other processes and the stores do can only be looked at again)

import asyncio
import datetime as dt
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from billing.retention import keep_partitions
from billing.usage import UsageRecord, UsageStore, UsageWriter
from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.ids import uuid7
from config.postgres import migrate, open_pool

NOW = time.time()


def turn(**changes: Any) -> UsageRecord:
    record = UsageRecord(
        turn_id=uuid7(), account_id=1, key_id=1, started_at=NOW, surface="openai", model="m", node_id="n",
        engine_id="e", stream=True, outcome="finished", status=200, prompt_tokens=10, cached_tokens=4,
        completion_tokens=5, estimated=False, ttft_ms=12, duration_ms=80, amount_nano=100, price_ref="m@start",
    )  # fmt: skip
    return replace(record, **changes)


@asynccontextmanager
async def running(writer: UsageWriter) -> AsyncIterator[None]:
    task = asyncio.create_task(writer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def balances(pool: asyncpg.Pool) -> list[int]:
    return [row[0] for row in await pool.fetch("select balance_nano from accounts order by id")]


async def turns(pool: asyncpg.Pool) -> int:
    return await pool.fetchval("select count(*) from usage")


@pytest.fixture
async def accounts(pool: asyncpg.Pool) -> None:
    await pool.execute(
        "insert into accounts (name, balance_nano) select 'a' || n, 1000 from generate_series(1, 3) n"
    )
    await pool.execute(
        "insert into api_keys (account_id, name, digest, prefix)"
        " select n, 'laptop', decode(repeat('0' || n, 32), 'hex'), 'sk-pg-' from generate_series(1, 3) n"
    )


pytestmark = pytest.mark.usefixtures("accounts")


async def test_a_turn_is_written_as_it_was_and_charged(pool: asyncpg.Pool, settings: Settings) -> None:
    record = turn(node_id=None, ttft_ms=None, estimated=True)
    writer = UsageWriter(pool, settings)
    writer.add(record)
    async with running(writer):
        await until(lambda: not writer.pending)
    row = dict(await pool.fetchrow("select * from usage"))
    row["started_at"] = row["started_at"].timestamp()
    assert row.pop("started_at") == pytest.approx(record.started_at, abs=1e-6)
    assert row == {name: getattr(record, name) for name in row}
    assert await balances(pool) == [900, 1000, 1000]
    assert await pool.fetchval("select last_used_at is not null from api_keys where id = 1")


async def test_a_batch_whose_answer_was_lost_is_charged_once(pool: asyncpg.Pool, settings: Settings) -> None:
    class LosesAnswers(UsageWriter):
        lost = 0

        async def _insert(self, batch: list[UsageRecord]) -> None:
            await super()._insert(batch)
            self.lost += 1
            if self.lost == 1:
                raise ConnectionResetError

    writer = LosesAnswers(pool, settings)
    for account_id in (1, 1, 2):
        writer.add(turn(account_id=account_id))
    async with running(writer):
        await until(lambda: not writer.pending)
    assert writer.lost == 2
    assert await balances(pool) == [800, 900, 1000]
    assert await turns(pool) == 3


async def test_a_turn_that_comes_twice_in_one_batch_is_charged_once(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    writer, record = UsageWriter(pool, settings), turn()
    writer.add(record)
    writer.add(record)
    assert await writer.close() == 0
    assert await balances(pool) == [900, 1000, 1000]


async def test_a_connection_killed_in_the_middle_of_a_batch_changes_nothing(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    writer = UsageWriter(pool, settings)
    for account_id in (1, 2, 3):
        writer.add(turn(account_id=account_id))
    async with pool.acquire() as blocker:
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("select from accounts where id = 2 for update")
        async with running(writer):
            stuck = None
            while stuck is None:  # its rows are inserted, the first account is locked, the second is ours
                stuck = await pool.fetchval(
                    "select pid from pg_stat_activity where wait_event_type = 'Lock' and query like '%insert into usage%'"
                    " and datname = current_database()"
                )
            assert await pool.fetchval("select pg_terminate_backend($1)", stuck)
            await until(lambda: writer._is_away)
            assert writer.pending == 3
            await transaction.rollback()
            await until(lambda: not writer.pending)
    assert await balances(pool) == [900, 900, 900]
    assert await turns(pool) == 3


async def test_writers_side_by_side_charge_each_turn_once_and_never_wait_for_each_other(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    records = [turn(account_id=1 + n % 3, amount_nano=7) for n in range(900)]
    writers = [UsageWriter(pool, replace(settings, usage_batch_max=50)) for _ in range(4)]
    for shift, writer in enumerate(writers):  # each turn goes to two of them, in other orders
        for n, record in enumerate(records if shift % 2 else reversed(records)):
            if n % 2 == shift // 2:
                writer.add(record)
    assert await asyncio.gather(*(writer.close(60) for writer in writers)) == [0] * 4
    assert await turns(pool) == len({r.turn_id for r in records})
    assert await balances(pool) == [1000 - 300 * 7] * 3


async def test_a_charge_that_empties_a_wallet_is_in_the_change_log_of_the_same_transaction(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    await pool.execute("delete from changes")
    writer = UsageWriter(pool, settings)
    writer.add(turn(amount_nano=999))
    writer.add(turn(account_id=2, amount_nano=1500))
    assert await writer.close() == 0
    assert [tuple(row) for row in await pool.fetch("select kind, entity from changes")] == [("account", "2")]
    assert await balances(pool) == [1, -500, 1000]


@pytest.mark.parametrize(
    "fault",
    [
        {"model": "nul\0byte"}, {"model": "\ud800"}, {"prompt_tokens": -1}, {"prompt_tokens": 2**63},
        {"started_at": float("nan")}, {"started_at": 1e300}, {"model": None}, {"status": "200"},
        {"amount_nano": 2**62, "account_id": 3}, {"turn_id": "no uuid"},
    ],
    ids=repr,
)  # fmt: skip
async def test_a_record_at_fault_goes_to_quarantine_and_blocks_no_other(
    pool: asyncpg.Pool, settings: Settings, fault: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    if fault.get("account_id") == 3:
        await pool.execute("update accounts set balance_nano = -(2::numeric ^ 62 + 9)::bigint where id = 3")
    writer = UsageWriter(pool, settings)
    for n in range(7):
        writer.add(turn(**fault) if n == 3 else turn())
    assert await writer.close() == 0
    assert await turns(pool) == 6
    assert (await balances(pool))[0] == 400
    kept = await pool.fetchval("select record from usage_quarantine")
    assert json.loads(kept)["price_ref"] == "m@start"
    assert [getattr(record, "action", "") for record in caplog.records] == ["usage_quarantined"]


async def test_a_turn_of_an_account_that_is_gone_is_written_all_the_same(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    writer = UsageWriter(pool, settings)
    writer.add(turn(account_id=99, key_id=99))
    assert await writer.close() == 0
    assert await turns(pool) == 1


async def test_turns_wait_for_postgresql_to_come_back(
    private_stores: EmbeddedStores, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "poolgate")
    await migrate(private_stores.database_url)
    async with await open_pool(private_stores.database_url, max_size=4, timeout_s=10) as pool:
        await pool.execute("insert into accounts (name, balance_nano) values ('a', 1000)")
        writer = UsageWriter(pool, replace(settings, usage_pending_max=3))
        async with running(writer):
            os.kill(private_stores.pids["postgres"], signal.SIGINT)
            await until(lambda: private_stores.poll() == ["postgres"])
            for _ in range(4):  # one more than there is room for: a turn that has happened is never refused
                writer.add(turn())
            assert writer.is_full
            assert not await writer._flush()
            assert not await writer._flush()
            private_stores.restart("postgres")
            await until(lambda: not writer.pending)
            assert not writer.is_full
        assert await balances(pool) == [600]
    actions = [record.action for record in caplog.records if record.name == "poolgate.usage"]  # type: ignore[attr-defined]
    assert actions == ["usage_unwritable", "usage_writable"]


async def test_close_gives_up_in_time_and_says_what_is_left(
    pool: asyncpg.Pool, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    await pool.close()
    writer = UsageWriter(pool, settings)
    writer.add(turn())
    writer.add(turn())
    assert await writer.close(timeout_s=0.05) == 2
    lost = caplog.records[-1]
    assert (lost.action, lost.turns, lost.amount_nano) == ("usage_lost", 2, 200)  # type: ignore[attr-defined]
    assert repr(writer) == "<UsageWriter pending=2 away>"


async def test_a_day_without_a_partition_loses_nothing_and_is_sorted_in_later(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    record = turn()
    for _ in range(2):
        writer = UsageWriter(pool, settings)
        writer.add(record)
        assert await writer.close() == 0
        assert await turns(pool) == 1
        await keep_partitions(pool, settings)  # the second time, the turn comes again after it was moved
    assert await pool.fetchval("select count(*) from usage_default") == 0
    assert (
        await pool.fetchval("select tableoid::regclass::text from usage")
        == f"usage_{dt.datetime.now(dt.UTC):%Y%m%d}"
    )
    assert await balances(pool) == [900, 1000, 1000]


async def test_partitions_are_made_ahead_and_dropped_past_their_retention(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    await pool.execute(
        "create table usage_20010101 partition of usage for values from ('2001-01-01Z') to ('2001-01-02Z')"
    )
    writer = UsageWriter(pool, settings)
    for days in (0, 3, 401, 10_000):
        writer.add(turn(started_at=NOW - days * 86_400))
    assert await writer.close() == 0
    plan = await keep_partitions(pool, settings)
    assert (len(plan.make), plan.drop) == (8, (dt.date(2001, 1, 1),))
    again = await keep_partitions(pool, settings)
    assert (again.make, again.drop) == ((), ())
    assert await turns(pool) == 2


async def test_processes_that_keep_partitions_at_once_do_not_trip_over_each_other(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    await asyncio.gather(*(keep_partitions(pool, settings) for _ in range(4)))
    made = await pool.fetchval("select count(*) from pg_inherits where inhparent = 'usage'::regclass")
    assert made == 9


async def test_turns_that_are_written_while_partitions_are_made_are_all_there(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    writer = UsageWriter(pool, replace(settings, usage_batch_max=1))
    for n in range(200):
        writer.add(turn(started_at=NOW + n % 8 * 86_400, amount_nano=1))
    left, _ = await asyncio.gather(writer.close(60), keep_partitions(pool, settings))
    assert left == 0
    assert (await turns(pool), (await balances(pool))[0]) == (200, 800)
    assert await pool.fetchval("select count(*) from usage_quarantine") == 0


async def test_a_partition_in_use_is_left_for_the_next_run(
    pool: asyncpg.Pool, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("billing.retention.LOCK_TIMEOUT_MS", 10)
    async with pool.acquire() as report, report.transaction():
        await report.execute("lock table usage in row exclusive mode")
        await keep_partitions(pool, settings)
    assert {getattr(record, "action", "") for record in caplog.records} >= {"usage_partition_busy"}
    await keep_partitions(pool, settings)
    assert (
        await pool.fetchval("select to_regclass($1)", f"usage_{dt.datetime.now(dt.UTC):%Y%m%d}") is not None
    )


async def test_reports_add_up_by_model_day_account_and_key(pool: asyncpg.Pool, settings: Settings) -> None:
    midnight = dt.datetime(2026, 3, 1, tzinfo=dt.UTC).timestamp()
    writer = UsageWriter(pool, settings)
    writer.add(turn(started_at=midnight - 1, model="x"))
    writer.add(turn(started_at=midnight, model="y", amount_nano=7))
    writer.add(turn(started_at=midnight + 5, model="x", account_id=2, key_id=2))
    writer.add(turn(started_at=midnight + 60, model="late"))
    assert await writer.close() == 0
    store = UsageStore(pool)
    span = (midnight - 1, midnight + 60)

    by_model = await store.summary(*span)
    assert [(row.group, row.turns, row.amount_nano) for row in by_model] == [("x", 2, 200), ("y", 1, 7)]
    assert (by_model[0].prompt_tokens, by_model[0].cached_tokens, by_model[0].completion_tokens) == (
        20,
        8,
        10,
    )
    by_day = await store.summary(*span, by="day")
    assert [(row.group, row.amount_nano) for row in by_day] == [("2026-02-28", 100), ("2026-03-01", 107)]
    by_account = await store.summary(*span, by="account")
    assert [(row.group, row.amount_nano) for row in by_account] == [("a1", 107), ("a2", 100)]
    by_key = await store.summary(*span, account=2, by="key")
    assert [(row.group, row.turns) for row in by_key] == [("sk-pg-… laptop", 1)]
    with pytest.raises(ValueError, match="allowed are model, day, account, key"):
        await store.summary(*span, by="1; drop table usage")  # type: ignore[arg-type]
