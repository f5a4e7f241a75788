"""SQL of spend leases: locks what a batch concerns in the global order, reads it, and writes what was decided.

What to take and to return is decided between `read_book` and `write` by teller.py; every value written is absolute and
was read under a lock, so that a transaction whose answer was lost does no harm when its successor comes.
"""

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from billing.lease import LeaseRow

WindowKey = tuple[int, float]
"""A budget's id, and the start of its window in unix seconds."""


RECALLED_S = 0.25
"""Half of what passes between two recalls of one process (lease_plan.RECALL_S): so long one counts for all of them."""


class NotRegistered(Exception):
    """PostgreSQL does not know this incarnation: it was away when the process began."""


@dataclass(frozen=True, slots=True)
class Source:
    """A wallet or a budget's window, locked: what is available (below zero where a limit was lowered), what all leased."""

    available_nano: int
    leased_nano: int
    lease: LeaseRow | None = None  # this process's own


@dataclass(frozen=True, slots=True)
class WindowSource(Source):
    """A window: [starts_at, ends_at) in unix seconds by PostgreSQL's clock."""

    starts_at: float = 0.0
    ends_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Book:
    """What a batch is decided on."""

    at: float  # PostgreSQL's clock, unix seconds
    live: int  # processes that lease, this one included
    wallets: dict[int, Source]  # by account
    current: dict[int, WindowSource]  # by budget; one that was removed has none
    older: dict[WindowKey, WindowSource]


@dataclass(frozen=True, slots=True)
class Entry:
    """A lease as it is to be written. `moved`: what this adds to the source's leased amount."""

    granted_nano: int
    returned_nano: int
    used_nano: int
    moved_nano: int
    free_nano: int
    held_nano: int


@asynccontextmanager
async def transaction(pool: asyncpg.Pool, timeout_s: float) -> AsyncIterator[Any]:
    """A transaction that ends within `timeout_s`. If it fails its connection is dropped, not rolled back: a frozen server
    would keep us waiting, and one that lives rolls back what a gone client began.
    """
    is_done = False
    async with asyncio.timeout(timeout_s):
        connection = await pool.acquire()
        try:
            begun = connection.transaction()
            await begun.start()
            yield connection
            await begun.commit()
            is_done = True
        finally:
            if not is_done:
                connection.terminate()
            await pool.release(connection)


async def read_book(
    connection: Any, incarnation_id: UUID, live_s: float, accounts: Collection[int],
    budgets: Collection[int], older: Collection[WindowKey], *, opens_windows: bool,
) -> Book | None:  # fmt: skip
    """Lock and read, in the global order; None: this incarnation was ended. Raises NotRegistered.

    `opens_windows`: make those that lack.
    """
    row = await connection.fetchrow(_LOCK_LEASES, incarnation_id, live_s, sorted(accounts))
    if row["is_live"] is None:
        raise NotRegistered("this process is not registered yet")
    if not row["is_live"]:
        return None
    at = row["at"]
    own = {account: LeaseRow(*amounts) for account, *amounts in row["leases"] or ()}
    current: dict[int, WindowSource] = {}
    past: dict[WindowKey, WindowSource] = {}
    if budgets or older:
        for window in await _windows(connection, incarnation_id, at, budgets, older, opens_windows):
            if window["is_current"]:
                current[window["budget_id"]] = window["source"]
            else:
                past[window["budget_id"], window["source"].starts_at] = window["source"]
    return Book(
        at=at.timestamp(), live=max(1, row["live"]),
        wallets={
            account: Source(available_nano, leased_nano, own.get(account))
            for account, available_nano, leased_nano in row["wallets"] or ()
        },
        current=current, older=past,
    )  # fmt: skip


async def write(
    connection: Any, incarnation_id: UUID, wallets: dict[int, Entry], windows: dict[WindowKey, Entry]
) -> None:
    """What was decided on a book, in its transaction."""
    if wallets:
        await connection.execute(_WRITE_LEASES, incarnation_id, sorted(wallets), *_columns(wallets))
    if windows:
        keys = sorted(windows)
        await connection.execute(
            _WRITE_BUDGET_LEASES, incarnation_id, [key[0] for key in keys], [key[1] for key in keys],
            *_columns(windows)[:4],
        )  # fmt: skip


async def recall(connection: Any, accounts: Sequence[int], budgets: Sequence[int]) -> None:
    """Ask every process for its free remainders, once the transaction commits."""
    kinds = ["recall"] * len(accounts) + ["budget"] * len(budgets)
    await connection.execute(_RECALL, kinds, [str(entity) for entity in (*accounts, *budgets)], RECALLED_S)


async def report(
    pool: asyncpg.Pool, incarnation_id: UUID, rows: Sequence[tuple[int, int, int]], timeout_s: float
) -> None:
    """Tell what is free and held: (account, free, held)."""
    accounts, free, held = zip(*sorted(rows), strict=True)
    async with transaction(pool, timeout_s) as connection:
        await connection.execute(_REPORT, incarnation_id, accounts, free, held)


async def beat(pool: asyncpg.Pool, incarnation_id: UUID, live_s: float, timeout_s: float) -> int | None:
    """Say that this incarnation lives; how many do, None if it was ended."""
    async with asyncio.timeout(timeout_s):
        live: int | None = await pool.fetchval(_BEAT, incarnation_id, live_s)
    return live


async def _windows(
    connection: Any, incarnation_id: UUID, at: dt.datetime, budgets: Collection[int],
    older: Collection[WindowKey], opens: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    if opens:
        await connection.execute(_OPEN_WINDOWS, sorted(budgets), at)
    keys = sorted(older)
    rows = await connection.fetch(
        _WINDOWS, sorted(budgets), at, [key[0] for key in keys], [key[1] for key in keys]
    )
    leases = await connection.fetch(
        _BUDGET_LEASES, incarnation_id, [row["budget_id"] for row in rows], [row["starts_s"] for row in rows]
    )
    own = {(lease["budget_id"], lease["starts_s"]): _lease(lease) for lease in leases}
    return [
        {
            "budget_id": row["budget_id"], "is_current": row["is_current"],
            "source": WindowSource(
                row["available_nano"], row["leased_nano"], own.get((row["budget_id"], row["starts_s"])),
                row["starts_s"], row["ends_s"],
            ),
        }
        for row in rows
    ]  # fmt: skip


def _lease(row: Any) -> LeaseRow:
    return LeaseRow(row["granted_nano"], row["settled_nano"], row["returned_nano"], row["used_nano"])


def _columns(entries: dict[Any, Entry]) -> tuple[list[int], ...]:
    ordered = [entries[key] for key in sorted(entries)]
    return (
        [entry.granted_nano for entry in ordered],
        [entry.returned_nano for entry in ordered],
        [entry.used_nano for entry in ordered],
        [entry.moved_nano for entry in ordered],
        [entry.free_nano for entry in ordered],
        [entry.held_nano for entry in ordered],
    )


_LOCK_LEASES = "select * from lock_leases($1, $2, $3)"

# A window ends at the next boundary of its account's zone as that is now, and starts at the last one or where the window
# before it ended. Of three candidates one holds `now`: where clocks go back over midnight, a day's first hour lies before
# what its midnight is taken for. Hours are absolute, in the offset of `now`.
_OPEN_WINDOWS = """
insert into budget_windows (budget_id, starts_at, ends_at)
select b.id, greatest(bounds.starts_at, last.ends_at), bounds.ends_at
from budgets b join accounts a on a.id = b.account_id
left join lateral (
    select ends_at from budget_windows where budget_id = b.id and starts_at <= $2 order by starts_at desc limit 1
) as last on true
cross join lateral (
    select timestamptz 'epoch' as starts_at, timestamptz 'infinity' as ends_at where b.period = 'total'
    union all
    select date_trunc('hour', $2::timestamptz, a.time_zone),
        date_trunc('hour', $2::timestamptz, a.time_zone) + interval '1 hour'
    where b.period = 'hour'
    union all
    select candidate.* from (
        select date_trunc(b.period, $2::timestamptz at time zone a.time_zone) as local, ('1 ' || b.period)::interval as step
        where b.period in ('day', 'week', 'month')
    ) as calendar
    cross join generate_series(-1, 1) as k
    cross join lateral (
        select (local + k * step) at time zone a.time_zone as starts_at,
            (local + (k + 1) * step) at time zone a.time_zone as ends_at
    ) as candidate
    where candidate.starts_at <= $2 and $2 < candidate.ends_at
) as bounds
where b.id = any($1::bigint[]) and coalesce(last.ends_at <= $2, true)
order by b.id
on conflict do nothing
"""

# Whatever the number of windows: the last that began is looked up in the primary key.
_WINDOWS = """
select w.budget_id, w.leased_nano, b.limit_nano - (w.spent_nano - w.forgiven_nano) - w.leased_nano as available_nano,
    extract(epoch from w.starts_at)::float8 as starts_s, extract(epoch from w.ends_at)::float8 as ends_s,
    w.starts_at <= $2 and $2 < w.ends_at as is_current
from budget_windows w join budgets b on b.id = w.budget_id
where (w.budget_id, w.starts_at) in (
    select last.* from unnest($1::bigint[]) as asked (id) cross join lateral (
        select budget_id, starts_at from budget_windows where budget_id = asked.id and starts_at <= $2
        order by starts_at desc limit 1
    ) as last
    union all
    select id, to_timestamp(s) from unnest($3::bigint[], $4::float8[]) as o (id, s)
)
order by w.budget_id, w.starts_at for no key update of w
"""

_BUDGET_LEASES = """
select budget_id, extract(epoch from starts_at)::float8 as starts_s, granted_nano, settled_nano, returned_nano, used_nano
from budget_leases
where incarnation_id = $1
    and (budget_id, starts_at) in (select id, to_timestamp(s) from unnest($2::bigint[], $3::float8[]) as o (id, s))
order by budget_id, starts_at for no key update
"""

_WRITE_LEASES = """
with decided as (
    select * from unnest($2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[])
        as d (account_id, granted_nano, returned_nano, used_nano, moved_nano, free_nano, held_nano)
), wallets as (
    update ledger_accounts w set leased_nano = w.leased_nano + d.moved_nano from decided d
    where w.kind = 'wallet' and w.owner_id = d.account_id and d.moved_nano <> 0
)
insert into spend_leases (incarnation_id, account_id, granted_nano, returned_nano, used_nano, free_nano, held_nano)
select $1, account_id, granted_nano, returned_nano, used_nano, free_nano, held_nano from decided order by account_id
on conflict (incarnation_id, account_id) do update set granted_nano = excluded.granted_nano,
    returned_nano = excluded.returned_nano, used_nano = excluded.used_nano, free_nano = excluded.free_nano,
    held_nano = excluded.held_nano, reported_at = clock_timestamp()
"""

_WRITE_BUDGET_LEASES = """
with decided as (
    select budget_id, to_timestamp(starts_s) as starts_at, granted_nano, returned_nano, used_nano, moved_nano
    from unnest($2::bigint[], $3::float8[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[])
        as d (budget_id, starts_s, granted_nano, returned_nano, used_nano, moved_nano)
), windows as (
    update budget_windows w set leased_nano = w.leased_nano + d.moved_nano from decided d
    where w.budget_id = d.budget_id and w.starts_at = d.starts_at and d.moved_nano <> 0
)
insert into budget_leases (incarnation_id, budget_id, starts_at, granted_nano, returned_nano, used_nano)
select $1, budget_id, starts_at, granted_nano, returned_nano, used_nano from decided order by budget_id, starts_at
on conflict (incarnation_id, budget_id, starts_at) do update set granted_nano = excluded.granted_nano,
    returned_nano = excluded.returned_nano, used_nano = excluded.used_nano
"""

# What somebody asked for a moment ago is on its way: several processes whose turns wait need not each ask.
_RECALL = """
insert into changes (kind, entity)
select kind, entity from unnest($1::text[], $2::text[]) as asked (kind, entity)
where not exists (
    select from changes c where c.at > clock_timestamp() - make_interval(secs => $3)
        and c.kind = asked.kind and c.entity = asked.entity
)
"""

_REPORT = """
with told as (
    select * from unnest($2::bigint[], $3::bigint[], $4::bigint[]) as t (account_id, free_nano, held_nano)
), locked as (
    select account_id from spend_leases
    where incarnation_id = $1 and account_id in (select account_id from told) order by account_id for no key update
)
update spend_leases s set free_nano = told.free_nano, held_nano = told.held_nano, reported_at = clock_timestamp()
from told join locked using (account_id) where s.incarnation_id = $1 and s.account_id = told.account_id
"""

_BEAT = """
update incarnations set seen_at = clock_timestamp() where id = $1 and state = 'live'
returning (select count(*) from incarnations
    where state = 'live' and (id = $1 or seen_at > clock_timestamp() - make_interval(secs => $2)))
"""
