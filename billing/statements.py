"""Statements: what moved on an account in a period, day by day and kind by kind, between two balances.

They are read from transfers, so they say what the book says; who may see one is the caller's to decide.
"""

import datetime as dt
from dataclasses import dataclass
from typing import Literal

import asyncpg

STATEMENT_TIMEOUT_S = 60.0
"""An old statement reads every transfer since then: a busy account has some millions a year."""

# A balance is as it is now, less what moved since: this reads nothing from before the period. Days are the account's.
READ = """
with period as (
    select a.time_zone, coalesce($2::date, date_trunc('month', day.last)::date) as first, day.last
    from accounts a
    cross join lateral (select coalesce($3::date, (clock_timestamp() at time zone a.time_zone)::date) as last) as day
    where a.id = $1
), bounds as (
    select *, first::timestamp at time zone time_zone as since, (last + 1)::timestamp at time zone time_zone as until
    from period
), book as (
    select id, credit_nano - debit_nano as balance_nano from ledger_accounts where owner_id = $1 and kind = $4
), moves as (
    select t.at, t.kind, t.amount_nano from transfers t
    where t.credit_id = (select id from book) and t.at >= (select since from bounds) and t.phase in ('posted', 'post')
    union all
    select t.at, t.kind, -t.amount_nano from transfers t
    where t.debit_id = (select id from book) and t.at >= (select since from bounds) and t.phase in ('posted', 'post')
), lines as (
    select case when m.at < b.until then (m.at at time zone b.time_zone)::date end as day, m.kind, count(*) as transfers,
        sum(m.amount_nano)::bigint as amount_nano
    from moves m cross join bounds b group by 1, 2
)
select b.time_zone, b.first, b.last, coalesce((select balance_nano from book), 0) as balance_nano, l.*
from bounds b left join lines l on true
order by l.day nulls last, l.kind
"""


@dataclass(frozen=True, slots=True)
class Line:
    """Transfers of one kind on one day, together."""

    day: dt.date
    kind: str  # turn, topup, takeback, ...
    transfers: int
    amount_nano: int  # below zero: out of the account


@dataclass(frozen=True, slots=True)
class Statement:
    """A period by days of the account's time zone, the first and the last included: opening + lines = closing."""

    first: dt.date
    last: dt.date
    time_zone: str
    opening_nano: int
    lines: tuple[Line, ...]
    closing_nano: int


async def read_statement(
    pool: asyncpg.Pool,
    account_id: int,
    first: dt.date | None = None,
    last: dt.date | None = None,
    *,
    of: Literal["wallet", "earnings"] = "wallet",
) -> Statement:
    """From the first day of its month, by default, to today. Raises LookupError for an account that is not there."""
    async with pool.acquire() as connection, connection.transaction(readonly=True):
        await connection.execute(f"set local statement_timeout = {round(STATEMENT_TIMEOUT_S * 1000)}")
        rows = await connection.fetch(READ, account_id, first, last, of, timeout=STATEMENT_TIMEOUT_S)
    if not rows:
        raise LookupError(f"no account {account_id!r}")
    moved = [row for row in rows if row["kind"] is not None]
    lines = tuple(
        Line(row["day"], row["kind"], row["transfers"], row["amount_nano"])
        for row in moved
        if row["day"] is not None
    )
    opening_nano = rows[0]["balance_nano"] - sum(row["amount_nano"] for row in moved)
    return Statement(
        first=rows[0]["first"],
        last=rows[0]["last"],
        time_zone=rows[0]["time_zone"],
        opening_nano=opening_nano,
        lines=lines,
        closing_nano=opening_nano + sum(line.amount_nano for line in lines),
    )
