"""What is kept of usage: day partitions made ahead and dropped past their retention, and sums by hour likewise.

When this runs, and that one process at a time runs it, is the caller's to arrange; again is no change.
"""

# ruff: noqa: S608 (statements are put together from this module's own texts, values are parameters)

import datetime as dt
import logging
import re
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

import asyncpg

from config.defaults import Settings

log = logging.getLogger("poolgate.retention")

DAYS_AHEAD = 7
"""Partitions made ahead of need: a caretaker may fail for a week before rows go to usage_default."""

LOCK_TIMEOUT_MS = 2000
"""A long report must not make this, and with it every writer behind it, wait: the next run tries again."""

OLDEST_SHIPPED = "date_trunc('day', clock_timestamp(), 'UTC') - make_interval(days => {days}::int - 1)"
"""Turns from before it are not taken any more, given the retention. A day later their partition goes: so a turn that
comes again either finds its row or is too old to be charged."""

HOURS_DELETED_MAX = 10_000
"""Rows of usage by hour deleted in one statement, which thus ends long before its time-out."""

Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

NAME = re.compile(r"usage_([0-9]{8})")


@dataclass(frozen=True, slots=True)
class PartitionPlan:
    """Days to make a partition for, and days whose partition goes."""

    make: tuple[dt.date, ...]
    drop: tuple[dt.date, ...]


def plan_partitions(existing: Collection[dt.date], today: dt.date, retention_days: int) -> PartitionPlan:
    """Today and DAYS_AHEAD more are there; days more than `retention_days` before today are not."""
    wanted = [today + dt.timedelta(days=ahead) for ahead in range(DAYS_AHEAD + 1)]
    oldest = today - dt.timedelta(days=retention_days)
    return PartitionPlan(
        make=tuple(day for day in wanted if day not in existing),
        drop=tuple(sorted(day for day in existing if day < oldest)),
    )


async def keep_partitions(pool: asyncpg.Pool, settings: Settings) -> PartitionPlan:
    """Carry the plan out by the database's clock (days are UTC's); returns it."""
    async with pool.acquire() as connection:
        today = await connection.fetchval("select (clock_timestamp() at time zone 'utc')::date")
        plan = plan_partitions(await _days(connection), today, settings.usage_retention_days)
        for day in plan.make:
            await _without_waiting(connection, _make, day)
        for day in plan.drop:
            await _without_waiting(connection, _drop, day)
        oldest = _start(today - dt.timedelta(days=settings.usage_retention_days))
        await connection.execute("delete from usage_default where started_at < $1", oldest)
    if plan.make or plan.drop:
        log.info("usage partitions: %d made, %d dropped", len(plan.make), len(plan.drop), extra={
            "action": "usage_partitions_kept", "made": len(plan.make), "dropped": len(plan.drop),
        })  # fmt: skip
    return plan


async def trim_hours(pool: asyncpg.Pool, settings: Settings) -> int:
    """Delete usage by hour past its retention, in bounded pieces and oldest first; returns how many rows.

    Rows that a shipper adds to just now are left for the next run.
    """
    deleted = 0
    while True:
        done = await pool.execute(TRIM_HOURS, settings.usage_hours_retention_days, HOURS_DELETED_MAX)
        piece = int(done.rsplit(" ", 1)[1])
        deleted += piece
        if piece < HOURS_DELETED_MAX:
            return deleted


TRIM_HOURS = """
delete from usage_hours where ctid = any (array(
    select ctid from usage_hours
    where hour < date_trunc('day', clock_timestamp(), 'UTC') - make_interval(days => $1)
    order by hour limit $2 for update skip locked
))
"""


async def _days(connection: Connection) -> set[dt.date]:
    rows = await connection.fetch(
        "select c.relname::text from pg_inherits i join pg_class c on c.oid = i.inhrelid"
        " where i.inhparent = 'usage'::regclass"
    )
    names = (NAME.fullmatch(row["relname"]) for row in rows)
    return {dt.datetime.strptime(name[1], "%Y%m%d").replace(tzinfo=dt.UTC).date() for name in names if name}


async def _make(connection: Connection, day: dt.date) -> None:
    """Make the table aside, move into it what came for its day before it was there, then attach it.

    Writers wait for the parent meanwhile. One that had begun to write into usage_default would find, its lock
    granted, that the row belongs elsewhere, and be refused.
    """
    start, end = _start(day), _start(day + dt.timedelta(days=1))
    name = f"usage_{day:%Y%m%d}"
    await connection.execute("lock table usage in share row exclusive mode")
    if await connection.fetchval("select to_regclass($1) is not null", name):
        return  # by somebody else, while this waited
    await connection.execute(f"create table {name} (like usage including all)")
    await connection.execute(
        "with moved as (delete from usage_default where started_at >= $1 and started_at < $2 returning *)"
        f" insert into {name} select * from moved",
        start,
        end,
    )
    await connection.execute(
        f"alter table usage attach partition {name}"
        f" for values from ('{start.isoformat()}') to ('{end.isoformat()}')"
    )


async def _drop(connection: Connection, day: dt.date) -> None:
    await connection.execute(f"drop table if exists usage_{day:%Y%m%d}")


async def _without_waiting(
    connection: Connection, step: Callable[[Connection, dt.date], Awaitable[None]], day: dt.date
) -> None:
    try:
        async with connection.transaction():
            await connection.execute(f"set local lock_timeout = {LOCK_TIMEOUT_MS}")
            await step(connection, day)
    except asyncpg.LockNotAvailableError:
        log.warning(
            "usage partition of %s is in use, left for the next run",
            day,
            extra={"action": "usage_partition_busy", "day": day.isoformat()},
        )


def _start(day: dt.date) -> dt.datetime:
    return dt.datetime(day.year, day.month, day.day, tzinfo=dt.UTC)
