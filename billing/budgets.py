"""Budgets: what a key, or all keys of an account, may spend in a window of time; set, posted to, reset and read here.

How a process takes its part of a window is leases.py's; who may set a budget is the caller's to decide.
"""

import datetime as dt
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from uuid import UUID

import asyncpg
from redis.asyncio import Redis

from config.changes import announce, wake_feeds

log = logging.getLogger("poolgate.budgets")

Period = Literal["hour", "day", "week", "month", "total"]
PERIODS: tuple[str, ...] = get_args(Period)

SOFT_PERCENT = 80
"""A budget's owner hears of it at this share of its limit, unless it was set with another."""

AMOUNT_MAX_NANO = 10**18
"""A limit beyond a thousand million of the major unit is none."""


WINDOWS_KEPT_DAYS = 92
"""Windows that ended longer ago are deleted: a quarter's months can be looked up, and an hour's do not pile up for ever."""

WINDOWS_DELETED_MAX = 10_000
"""Windows deleted in one statement, which thus ends long before its time-out."""


class UnknownBudget(LookupError):
    """No budget has that id."""


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget and how its window of now stands."""

    id: int
    account_id: int
    key_id: int | None  # None: all keys together
    period: str
    limit_nano: int
    soft_percent: int
    spent_nano: int  # shipped, since the window began or the last reset
    leased_nano: int  # of the rest: with gateway processes, which may have spent it already
    starts_at: dt.datetime | None  # None: no turn has come in this window yet
    ends_at: dt.datetime | None  # None as above, or it never ends

    @property
    def left_nano(self) -> int:
        """Below zero where the limit was lowered."""
        return self.limit_nano - self.spent_nano


class BudgetStore:
    """The queries on budgets. With `valkey`, other processes hear of changes at once, else within a poll."""

    def __init__(self, pool: asyncpg.Pool, valkey: Redis | None = None) -> None:
        self._pool = pool
        self._valkey = valkey

    async def set(
        self,
        account_id: int,
        key_id: int | None,
        period: str,
        limit_nano: int,
        soft_percent: int = SOFT_PERCENT,
    ) -> BudgetState:
        """Make a budget, or give the one of this key and period another limit: it holds for the window of now, too.

        Raises ValueError for a period, limit or percentage that can't be, UnknownBudget where account or key are not there.
        """
        _check(period, limit_nano, soft_percent)
        async with self._pool.acquire() as connection, connection.transaction():
            if key_id is not None and account_id != await connection.fetchval(_KEY_ACCOUNT, key_id):
                raise UnknownBudget(f"account {account_id} has no key {key_id}")
            try:
                budget_id = await connection.fetchval(
                    _SET, account_id, key_id, period, limit_nano, soft_percent
                )
            except asyncpg.ForeignKeyViolationError:
                raise UnknownBudget(f"no account {account_id} or no key {key_id}") from None
            await connection.execute(_RETELL, budget_id)  # what a raised limit takes back is told again
            state = _state(await connection.fetchrow(_STATES + " where b.id = $1", budget_id))
        await wake_feeds(self._valkey)
        return state

    async def list(self, account_id: int | None = None) -> list[BudgetState]:
        """Every budget, or an account's, oldest first."""
        rows = await self._pool.fetch(
            _STATES + " where $1::bigint is null or b.account_id = $1 order by b.id", account_id
        )
        return [_state(row) for row in rows]

    async def reset(self, budget_id: int) -> BudgetState:
        """What was spent in the window of now is forgiven, once it is shipped; raises UnknownBudget."""
        async with self._pool.acquire() as connection, connection.transaction():
            if (
                await connection.fetchval("select 1 from budgets where id = $1 for key share", budget_id)
                is None
            ):
                raise UnknownBudget(f"no budget {budget_id}")
            await connection.execute(_RESET, budget_id)
            await announce(connection, "budget", str(budget_id))
            state = _state(await connection.fetchrow(_STATES + " where b.id = $1", budget_id))
        await wake_feeds(self._valkey)
        return state

    async def remove(self, budget_id: int) -> None:
        """Nothing is held back by it any more. Raises UnknownBudget."""
        if await self._pool.fetchval("delete from budgets where id = $1 returning id", budget_id) is None:
            raise UnknownBudget(f"no budget {budget_id}")
        await wake_feeds(self._valkey)


async def trim_windows(pool: asyncpg.Pool) -> int:
    """Delete windows that are long over, and with them their leases, in bounded pieces; returns how many.

    One of which something is still leased stays: its process is alive and has not returned it.
    """
    deleted = 0
    while True:
        piece: int = await pool.fetchval(_TRIM, WINDOWS_KEPT_DAYS, WINDOWS_DELETED_MAX)
        deleted += piece
        if piece < WINDOWS_DELETED_MAX:
            return deleted


async def post_budgets(
    connection: Any, incarnation_id: UUID, charges: Sequence[tuple[int, dt.datetime, int]]
) -> None:
    """Count what turns of one incarnation cost in their windows: (budget id, its window's start, amount).

    In the caller's transaction, which sees to it that a turn comes once. What a budget that was removed meanwhile had is
    skipped. Whoever passes the soft threshold or the limit is told once a window, or once more after a reset.
    """
    due: dict[tuple[int, dt.datetime], int] = {}
    for budget_id, starts_at, amount_nano in charges:
        if amount_nano > 0:
            due[budget_id, starts_at] = due.get((budget_id, starts_at), 0) + amount_nano
    if not due:
        return
    keys = sorted(due)
    columns = [key[0] for key in keys], [key[1] for key in keys]
    await connection.execute(_LOCK_WINDOWS, *columns)
    await connection.execute(_LOCK_LEASES, incarnation_id, *columns)
    rows = await connection.fetch(_POST, incarnation_id, *columns, [due[key] for key in keys])
    told = [row for row in rows if row["spent_nano"] >= row["soft_nano"]]
    if told:
        for event in await connection.fetch(
            _TELL, [row["budget_id"] for row in told], [row["starts_at"] for row in told]
        ):
            log.warning(
                "budget %d of account %d: %s", event["budget_id"], event["account_id"],
                "its limit is reached" if event["kind"] == "budget_exhausted" else "its soft threshold is passed",
                extra={
                    "action": event["kind"], "budget_id": event["budget_id"], "account_id": event["account_id"],
                    "key_id": event["key_id"],
                },
            )  # fmt: skip


def _check(period: str, limit_nano: int, soft_percent: int) -> None:
    if period not in PERIODS:
        raise ValueError(f"period {period!r}: one of {', '.join(PERIODS)}")
    if not 0 <= limit_nano <= AMOUNT_MAX_NANO:
        raise ValueError(f"limit {limit_nano}: 0 to {AMOUNT_MAX_NANO} nano")
    if not 1 <= soft_percent <= 100:
        raise ValueError(f"soft threshold {soft_percent}: 1 to 100 percent")


def _state(row: Any) -> BudgetState:
    assert row is not None  # it was written in the same transaction
    return BudgetState(**row)


_KEY_ACCOUNT = "select account_id from api_keys where id = $1"

_SET = """
insert into budgets (account_id, key_id, period, limit_nano, soft_percent) values ($1, $2, $3, $4, $5)
on conflict (account_id, key_id, period) do update set limit_nano = excluded.limit_nano,
    soft_percent = excluded.soft_percent
returning id
"""

_RETELL = """
update budget_windows w set
    warned_at = case when w.spent_nano - w.forgiven_nano < ceil(b.limit_nano * (b.soft_percent / 100.0)) then null
        else w.warned_at end,
    exhausted_at = case when w.spent_nano - w.forgiven_nano < b.limit_nano then null else w.exhausted_at end
from budgets b
where b.id = $1 and w.budget_id = b.id and (w.warned_at is not null or w.exhausted_at is not null)
    and w.starts_at <= clock_timestamp() and clock_timestamp() < w.ends_at
"""

_STATES = """
select b.id, b.account_id, b.key_id, b.period, b.limit_nano, b.soft_percent,
    coalesce(w.spent_nano - w.forgiven_nano, 0) as spent_nano, coalesce(w.leased_nano, 0) as leased_nano,
    w.starts_at, nullif(w.ends_at, 'infinity') as ends_at
from budgets b left join budget_windows w
    on w.budget_id = b.id and w.starts_at <= clock_timestamp() and clock_timestamp() < w.ends_at
"""

_RESET = """
update budget_windows set forgiven_nano = spent_nano, warned_at = null, exhausted_at = null
where budget_id = $1 and starts_at <= clock_timestamp() and clock_timestamp() < ends_at
"""

_TRIM = """
with gone as (
    delete from budget_windows where ctid = any (array(
        select ctid from budget_windows
        where ends_at < clock_timestamp() - make_interval(days => $1) and leased_nano = 0
        order by ends_at limit $2 for update skip locked
    )) returning budget_id, starts_at
), leases as (
    delete from budget_leases l using gone where l.budget_id = gone.budget_id and l.starts_at = gone.starts_at
)
select count(*) from gone
"""

_LOCK_WINDOWS = """
select 1 from budget_windows
where (budget_id, starts_at) in (select * from unnest($1::bigint[], $2::timestamptz[]))
order by budget_id, starts_at for no key update
"""

_LOCK_LEASES = """
select 1 from budget_leases
where incarnation_id = $1 and (budget_id, starts_at) in (select * from unnest($2::bigint[], $3::timestamptz[]))
order by budget_id, starts_at for no key update
"""

# What a lease has left pays; beyond that (its incarnation was ended, and what was left went back) it is spent all the
# same, and nothing is leased less. A budget that was removed took its windows with it.
_POST = """
with due as (
    select * from unnest($2::bigint[], $3::timestamptz[], $4::bigint[]) as t (budget_id, starts_at, amount_nano)
), paid as (
    select due.*, coalesce(least(due.amount_nano, l.granted_nano - l.settled_nano - l.returned_nano), 0) as leased_nano
    from due left join budget_leases l
        on l.incarnation_id = $1 and l.budget_id = due.budget_id and l.starts_at = due.starts_at
), leases as (
    update budget_leases l set settled_nano = l.settled_nano + paid.leased_nano
    from paid
    where l.incarnation_id = $1 and l.budget_id = paid.budget_id and l.starts_at = paid.starts_at
)
update budget_windows w set spent_nano = w.spent_nano + paid.amount_nano, leased_nano = w.leased_nano - paid.leased_nano
from paid join budgets b on b.id = paid.budget_id
where w.budget_id = paid.budget_id and w.starts_at = paid.starts_at
returning w.budget_id, w.starts_at, w.spent_nano - w.forgiven_nano as spent_nano,
    ceil(b.limit_nano * (b.soft_percent / 100.0))::bigint as soft_nano
"""

_TELL = """
with passed as (
    select w.*, b.account_id, b.key_id, b.period, b.limit_nano, b.soft_percent,
        w.warned_at is null as warns, w.exhausted_at is null and w.spent_nano - w.forgiven_nano >= b.limit_nano as ends
    from budget_windows w join budgets b on b.id = w.budget_id
    where (w.budget_id, w.starts_at) in (select * from unnest($1::bigint[], $2::timestamptz[]))
), marked as (
    update budget_windows w set warned_at = coalesce(w.warned_at, clock_timestamp()),
        exhausted_at = case when passed.ends then clock_timestamp() else w.exhausted_at end
    from passed
    where w.budget_id = passed.budget_id and w.starts_at = passed.starts_at and (passed.warns or passed.ends)
)
insert into billing_events (kind, account_id, key_id, payload)
select event.kind, p.account_id, p.key_id, jsonb_build_object(
    'budget_id', p.budget_id, 'period', p.period, 'limit_nano', p.limit_nano, 'soft_percent', p.soft_percent,
    'spent_nano', p.spent_nano - p.forgiven_nano, 'starts_at', p.starts_at, 'ends_at', nullif(p.ends_at, 'infinity')
)
from passed p
cross join lateral (
    select 'budget_threshold' as kind where p.warns union all select 'budget_exhausted' where p.ends
) as event
order by p.budget_id, event.kind desc
returning (payload ->> 'budget_id')::bigint as budget_id, kind, account_id, key_id
"""
