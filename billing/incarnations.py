"""Incarnations: one row a life of a gateway process, from its registration to the moment its leases went back.

Who ships a dead process's journal, and when, is recovery's; what the living lease is leases.py's.
"""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import asyncpg

from config.defaults import Settings
from config.ids import uuid7

log = logging.getLogger("poolgate.leases")

CLOSE_CHUNK = 5_000
"""Leases returned in one statement: 200,000 at once would take longer than a statement may."""

ROWS_KEPT_DAYS = 30
"""Lease rows of ended incarnations stay so long for whoever looks into what happened."""

TRIM_ROWS_MAX = 10_000
"""Rows deleted in one statement; the next round deletes the next."""

RETURNED_TO_STORE_S = 60.0
"""PostgreSQL must have been up for this long before silence counts: while it was away nobody could be heard."""


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One life of one gateway process."""

    id: UUID
    folder: Path  # of its journal


async def register(
    pool: asyncpg.Pool, settings: Settings, *, folder: Path, host: str, pid: int,
    incarnation_id: UUID | None = None,
) -> Incarnation:  # fmt: skip
    """A new incarnation, live from now on. Raises what PostgreSQL raises (config.postgres.AWAY).

    With `incarnation_id` it can be tried again after an answer was lost: the first one's row stays.
    """
    made = incarnation_id or uuid7()
    async with asyncio.timeout(settings.database_timeout_s):
        await pool.execute(
            "insert into incarnations (id, host, pid, journal) values ($1, $2, $3, $4)"
            " on conflict (id) do nothing",
            made, host, pid, str(folder),
        )  # fmt: skip
    return Incarnation(made, folder)


async def close_incarnation(
    connection: Any, incarnation_id: UUID, state: Literal["closed", "abandoned"]
) -> None:
    """Return what its leases have left (granted - settled) and end it, in the caller's transaction; again is no change.

    `closed`: its journal is in the book to the end. `abandoned`: it may not be, and what comes later is the platform's loss.
    """
    found = await connection.fetchval(
        "select state from incarnations where id = $1 for update", incarnation_id
    )
    if found is None:
        return
    last: int | None = 0
    while last is not None:
        last = await connection.fetchval(_RETURN_LEASES, incarnation_id, last, CLOSE_CHUNK)
    await _return_budget_leases(connection, incarnation_id)
    await connection.execute(
        "update incarnations set state = $2, ended_at = clock_timestamp() where id = $1 and state = 'live'",
        incarnation_id, state,
    )  # fmt: skip


async def abandon_silent(pool: asyncpg.Pool, settings: Settings) -> list[UUID]:
    """Give up the incarnations that were silent for `lease_grace_s` by PostgreSQL's clock; returns them.

    One that can't be closed now, which is logged, holds up no other.
    """
    silent = await pool.fetch(_SILENT, settings.lease_grace_s, RETURNED_TO_STORE_S)
    given_up = []
    for row in silent:
        try:
            async with pool.acquire() as connection, connection.transaction():
                if await connection.fetchval(_STILL_SILENT, row["id"], settings.lease_grace_s) is None:
                    continue
                await close_incarnation(connection, row["id"], "abandoned")
        except asyncpg.PostgresError as error:
            log.critical(
                "process %s of %s can't be given up, what it leased stays leased: %s", row["pid"], row["host"], error,
                extra={"action": "incarnation_stuck", "incarnation": str(row["id"])},
            )  # fmt: skip
            continue
        given_up.append(row["id"])
        log.error(
            "process %s of %s is given up: its leases went back, its journal at %s was not shipped to the end",
            row["pid"], row["host"], row["journal"],
            extra={"action": "incarnation_abandoned", "incarnation": str(row["id"])},
        )  # fmt: skip
    return given_up


async def trim_leases(pool: asyncpg.Pool) -> int:
    """Delete lease rows of incarnations that ended more than ROWS_KEPT_DAYS ago; returns how many."""
    trimmed = 0
    for table in ("spend_leases", "budget_leases"):
        done = await pool.execute(
            f"delete from {table} where ctid = any (array("  # noqa: S608 - our own two names
            f"select l.ctid from {table} l join incarnations i on i.id = l.incarnation_id"
            " where i.ended_at < clock_timestamp() - make_interval(days => $1) limit $2))",
            ROWS_KEPT_DAYS, TRIM_ROWS_MAX,
        )  # fmt: skip
        trimmed += int(done.rsplit(" ", 1)[1])
    return trimmed


async def _return_budget_leases(connection: Any, incarnation_id: UUID) -> None:
    await connection.execute(_LOCK_WINDOWS, incarnation_id)
    await connection.execute(_RETURN_BUDGET_LEASES, incarnation_id)


# The incarnation is locked, so that neither its process nor its shipper touches these rows: what is read here stays
# true until the wallets, which others do touch, are locked. The last wallet's id is returned while there are more.
_RETURN_LEASES = """
with due as (
    select w.id, s.account_id, s.granted_nano - s.settled_nano - s.returned_nano as left_nano
    from spend_leases s join ledger_accounts w on w.kind = 'wallet' and w.owner_id = s.account_id
    where s.incarnation_id = $1 and w.id > $2
        and (s.granted_nano > s.settled_nano + s.returned_nano or s.free_nano > 0 or s.held_nano > 0)
    order by w.id limit $3
), locked as (
    select id from ledger_accounts where id in (select id from due) order by id for no key update
), wallets as (
    update ledger_accounts w set leased_nano = w.leased_nano - due.left_nano
    from due join locked on locked.id = due.id where w.id = locked.id
), leases as (
    update spend_leases s set returned_nano = s.granted_nano - s.settled_nano, free_nano = 0, held_nano = 0,
        reported_at = clock_timestamp()
    from due where s.incarnation_id = $1 and s.account_id = due.account_id
)
select max(id) from due
"""

_LOCK_WINDOWS = """
select 1 from budget_windows w join budget_leases l using (budget_id, starts_at)
where l.incarnation_id = $1 and l.granted_nano > l.settled_nano + l.returned_nano
order by w.budget_id, w.starts_at for no key update of w
"""

_RETURN_BUDGET_LEASES = """
with due as (
    select budget_id, starts_at, granted_nano - settled_nano - returned_nano as left_nano from budget_leases
    where incarnation_id = $1 and granted_nano > settled_nano + returned_nano
), windows as (
    update budget_windows w set leased_nano = w.leased_nano - due.left_nano
    from due where w.budget_id = due.budget_id and w.starts_at = due.starts_at
)
update budget_leases l set returned_nano = l.granted_nano - l.settled_nano
from due where l.incarnation_id = $1 and l.budget_id = due.budget_id and l.starts_at = due.starts_at
"""

_SILENT = """
select id, host, pid, journal from incarnations
where state = 'live' and seen_at < clock_timestamp() - make_interval(secs => $1)
    and pg_postmaster_start_time() < clock_timestamp() - make_interval(secs => least($1, $2))
order by id
"""

_STILL_SILENT = """
select id from incarnations
where id = $1 and state = 'live' and seen_at < clock_timestamp() - make_interval(secs => $2)
for update
"""
