"""Windows of budgets as rows: found whatever their number, opened whatever the clock did, and trimmed when long over."""

import datetime as dt

import asyncpg

from billing.budgets import WINDOWS_KEPT_DAYS, BudgetStore, post_budgets, trim_windows
from billing.lease_store import _OPEN_WINDOWS, _WINDOWS
from tests import books

HOUR = dt.timedelta(hours=1)


async def test_windows_are_found_by_their_key_and_never_by_reading_the_table(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("set local enable_seqscan = off")  # a small table is else read whole
        plan = await connection.fetch(
            "explain (costs off) " + _WINDOWS, [1, 2], dt.datetime.now(dt.UTC), [3], [0.0]
        )
    text = "\n".join(row[0] for row in plan)
    assert "Seq Scan on budget_windows" not in text, text


async def test_a_window_opens_although_the_clock_was_ahead_for_a_while(pool: asyncpg.Pool) -> None:
    """Windows of tomorrow stand there when the clock is set right; each turn of the account would be refused."""
    account = await books.account(pool)
    made = await BudgetStore(pool).set(account, None, "hour", 1_000)
    now = dt.datetime(2030, 5, 5, 10, 30, tzinfo=dt.UTC)
    for at in (now - 2 * HOUR, now + 24 * HOUR, now, now + HOUR):
        await pool.execute(_OPEN_WINDOWS, [made.id], at)
    starts = await pool.fetch(
        "select starts_at, ends_at - starts_at as length from budget_windows order by 1"
    )
    assert [row["starts_at"].hour for row in starts] == [8, 10, 11, 10]
    assert {row["length"] for row in starts} == {HOUR}


async def test_windows_that_are_long_over_go_with_their_leases_unless_something_is_still_leased(
    pool: asyncpg.Pool,
) -> None:
    account, incarnation = await books.account(pool), await books.incarnation(pool)
    made = await BudgetStore(pool).set(account, None, "hour", 1_000)
    now = dt.datetime.now(dt.UTC).replace(minute=0, second=0, microsecond=0)
    long_ago = now - dt.timedelta(days=WINDOWS_KEPT_DAYS + 1)
    for start, leased in ((long_ago, 0), (long_ago + HOUR, 5), (now - HOUR, 0), (now, 0)):
        await pool.execute(
            "insert into budget_windows (budget_id, starts_at, ends_at, spent_nano, leased_nano)"
            " values ($1, $2, $3, 7, $4)",
            made.id, start, start + HOUR, leased,
        )  # fmt: skip
        await pool.execute(
            "insert into budget_leases (incarnation_id, budget_id, starts_at, granted_nano, settled_nano)"
            " values ($1, $2, $3, $4, 7)",
            incarnation, made.id, start, 7 + leased,
        )  # fmt: skip
    assert await trim_windows(pool) == 1
    for table in ("budget_windows", "budget_leases"):
        starts = [row[0] for row in await pool.fetch(f"select starts_at from {table} order by 1")]
        assert starts == [long_ago + HOUR, now - HOUR, now]
    async with pool.acquire() as connection, connection.transaction():
        await post_budgets(connection, incarnation, [(made.id, long_ago, 3)])  # too late to count
