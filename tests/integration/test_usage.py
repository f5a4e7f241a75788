"""Usage on a real PostgreSQL: sums by hour and day, day partitions, and what is kept how long."""

import asyncio
import datetime as dt
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from billing.retention import keep_partitions, trim_hours
from billing.shipper import Shipper
from billing.usage import UsageStore
from config.defaults import Settings
from tests.journals import NOW, balances, journal_of, open_accounts, ship_everything, turn, turns

DAY_S = 86_400


@pytest.fixture(autouse=True)
async def accounts(pool: asyncpg.Pool) -> None:
    await open_accounts(pool, 3, balance_nano=1_000_000)


async def test_a_day_without_a_partition_loses_nothing_and_is_sorted_in_later(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    record = turn()
    for _ in range(2):
        await ship_everything(pool, settings, tmp_path, record)
        assert await turns(pool) == 1
        await keep_partitions(pool, settings)  # the second time, the turn comes again after it was moved
    assert await pool.fetchval("select count(*) from usage_default") == 0
    assert (
        await pool.fetchval("select tableoid::regclass::text from usage")
        == f"usage_{dt.datetime.now(dt.UTC):%Y%m%d}"
    )
    assert await balances(pool) == [999_900, 1_000_000, 1_000_000]


async def test_partitions_are_made_ahead_and_dropped_past_their_retention(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    await pool.execute(
        "create table usage_20010101 partition of usage for values from ('2001-01-01Z') to ('2001-01-02Z')"
    )
    # What came when it was younger, and a turn that is too old to be taken.
    await ship_everything(pool, settings, tmp_path, *(turn(started_at=NOW - days * DAY_S) for days in (0, 3)))
    await ship_everything(
        pool, replace(settings, usage_retention_days=9000), tmp_path,
        *(turn(started_at=NOW - days * DAY_S) for days in (401, 8000)),
    )  # fmt: skip
    assert await turns(pool) == 4
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
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    records = [turn(started_at=NOW + n % 8 * DAY_S, amount_nano=1) for n in range(200)]
    journal = await journal_of(pool, settings, tmp_path, *records)
    shipper = Shipper(pool, replace(settings, usage_batch_max=1), journal)
    is_shipped, _ = await asyncio.gather(shipper.close(60), keep_partitions(pool, settings))
    assert is_shipped
    assert (await turns(pool), (await balances(pool))[0]) == (200, 999_800)
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


async def test_a_turn_that_comes_again_after_its_partition_went_is_not_charged_again(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    short = replace(settings, usage_retention_days=10)
    midnight = NOW - NOW % DAY_S
    oldest_taken, too_old = turn(started_at=midnight - 9 * DAY_S), turn(started_at=midnight - 9 * DAY_S - 1)
    await ship_everything(pool, short, tmp_path, oldest_taken, too_old)
    assert await pool.fetchval("select array_agg(replace(turn_id::text, '-', '')) from usage") == [
        oldest_taken.turn_id
    ]
    assert await pool.fetchval("select array_agg(turn_id) from usage_quarantine") == [too_old.turn_id]
    await keep_partitions(pool, short)
    assert await turns(pool) == 1  # what is still taken is still there to be found
    await ship_everything(pool, short, tmp_path, oldest_taken)
    assert (await balances(pool))[0] == 999_900


async def test_usage_by_hour_is_deleted_past_its_retention_and_by_day_is_kept(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billing.retention.HOURS_DELETED_MAX", 2)
    short = replace(settings, usage_hours_retention_days=3)
    midnight = NOW - NOW % DAY_S
    ages = [0, 3, *(4 + n / 24 for n in range(5))]
    await ship_everything(
        pool, settings, tmp_path, *(turn(started_at=midnight - age * DAY_S) for age in ages)
    )
    assert await trim_hours(pool, short) == 5
    assert await trim_hours(pool, short) == 0
    assert await pool.fetchval("select sum(turns) from usage_days") == len(ages)
    # A time that begins where hours are gone is told by whole days.
    summed = await UsageStore(pool).summary(midnight - 4 * DAY_S + 7200, NOW + 1)
    assert [row.turns for row in summed] == [3]


async def test_reports_add_up_by_model_day_hour_account_and_key(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    midnight = NOW - NOW % DAY_S - 5 * DAY_S
    day, next_day = (dt.datetime.fromtimestamp(midnight + n, dt.UTC).strftime("%Y-%m-%d") for n in (-1, 0))
    await ship_everything(
        pool, settings, tmp_path,
        turn(started_at=midnight - 3600.5, model="early"),
        turn(started_at=midnight - 1, model="x"),
        turn(started_at=midnight, model="y", amount_nano=7),
        turn(started_at=midnight + 5, model="x", account_id=2, key_id=2),
        turn(started_at=midnight + 3600, model="late"),
    )  # fmt: skip
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
    assert [(row.group, row.amount_nano) for row in by_day] == [(day, 100), (next_day, 107)]
    by_hour = await store.summary(midnight - 7200, midnight + 7200, by="hour")
    assert [(row.group, row.turns) for row in by_hour] == [
        (f"{day} 22:00", 1), (f"{day} 23:00", 1), (f"{next_day} 00:00", 2), (f"{next_day} 01:00", 1),
    ]  # fmt: skip
    by_account = await store.summary(*span, by="account")
    assert [(row.group, row.amount_nano) for row in by_account] == [("a1", 107), ("a2", 100)]
    by_key = await store.summary(*span, account=2, by="key")
    assert [(row.group, row.turns) for row in by_key] == [("sk-pg-… laptop", 1)]
    assert sum(row.turns for row in await store.summary(midnight - 3 * DAY_S, NOW)) == 5
    with pytest.raises(ValueError, match="allowed are model, day, hour, account, key"):
        await store.summary(*span, by="1; drop table usage")  # type: ignore[arg-type]


async def test_a_sum_over_any_hours_is_that_of_its_turns(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    hour = NOW - NOW % 3600
    await ship_everything(
        pool,
        settings,
        tmp_path,
        *(turn(started_at=hour - n * 3600, amount_nano=2**n % 9973) for n in range(80)),
        lease_nano=10**6,
    )
    store = UsageStore(pool)
    for first, last in ((0, 1), (3, 5), (20, 50), (0, 79), (23, 24), (24, 72), (5, 77)):
        summed = await store.summary(hour - last * 3600, hour - first * 3600)
        assert summed[0].turns == last - first
        assert summed[0].amount_nano == sum(2**n % 9973 for n in range(first + 1, last + 1))


async def test_no_report_reads_the_turns(pool: asyncpg.Pool) -> None:
    await pool.execute("drop table usage cascade")
    for by in ("model", "day", "hour", "account", "key"):
        assert await UsageStore(pool).summary(0, NOW, by=by) == []  # type: ignore[arg-type]
