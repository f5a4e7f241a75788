"""Usage: the record that a settled turn leaves, and the sums of what was used.

How a record comes into the book, and its sums with it, is shipment.py's; who may see which sums is the caller's to decide.
"""

# ruff: noqa: S608 (statements are put together from this module's own texts, values are parameters)

import datetime as dt
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import asyncpg


class UsageRecord(NamedTuple):
    """What a settled turn used and costs. A tuple: that is how it is written."""

    turn_id: str  # the 32 digits of its UUID
    account_id: int
    key_id: int
    started_at: float  # unix seconds
    surface: str
    model: str
    node_id: str | None
    engine_id: str | None
    stream: bool
    outcome: str
    status: int
    prompt_tokens: int  # the cached ones included
    cached_tokens: int
    completion_tokens: int
    estimated: bool
    ttft_ms: int | None
    duration_ms: int
    amount_nano: int
    price_ref: str
    provider_id: int | None = None  # the account whose node did it
    loss_nano: int = 0  # delivered beyond what could be held for it: the platform's
    budgets: tuple[tuple[int, float], ...] = ()  # (budget, start of its window in unix seconds) it counts in
    idempotency_key: str | None = None


COLUMNS = {
    "turn_id": "uuid", "account_id": "bigint", "key_id": "bigint", "started_at": "timestamptz",
    "surface": "text", "model": "text", "node_id": "text", "engine_id": "text", "stream": "boolean",
    "outcome": "text",
    "status": "integer", "prompt_tokens": "bigint", "cached_tokens": "bigint", "completion_tokens": "bigint",
    "estimated": "boolean", "ttft_ms": "bigint", "duration_ms": "bigint", "amount_nano": "bigint",
    "price_ref": "text", "provider_id": "bigint", "loss_nano": "bigint",
}  # fmt: skip
"""What PostgreSQL keeps of a record: its first fields, in their order."""

EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)
DAY = dt.timedelta(days=1)

Grouping = Literal["model", "day", "hour", "account", "key"]

GROUPS: dict[str, tuple[str, str]] = {
    "model": ("u.model", "u.model"),
    "day": ("to_char(u.day, 'YYYY-MM-DD')", "u.day"),
    "hour": ("to_char(u.hour at time zone 'UTC', 'YYYY-MM-DD HH24:00')", "u.hour"),
    "account": (
        "coalesce((select name from accounts where id = u.account_id), '#' || u.account_id)",
        "u.account_id",
    ),
    "key": (
        "coalesce((select concat(prefix, '… ', name) from api_keys where id = u.key_id), '#' || u.key_id)",
        "u.key_id",
    ),
}
"""What a group is called, and what its rows have in common: our own texts, never a caller's."""


@dataclass(frozen=True, slots=True)
class UsageSum:
    """What the turns of one group used and cost."""

    group: str
    turns: int
    prompt_tokens: int  # the cached ones included
    cached_tokens: int
    completion_tokens: int
    amount_nano: int


@dataclass(frozen=True, slots=True)
class Spans:
    """A time as whole days and the hours before and after them; each from, up to and without."""

    days: tuple[dt.datetime, dt.datetime]
    before: tuple[dt.datetime, dt.datetime]
    after: tuple[dt.datetime, dt.datetime]


def spans(since: dt.datetime, until: dt.datetime, hours_from: dt.datetime | None) -> Spans:
    """The least whole hours that hold [since, until), as few of them as possible outside whole days.

    `hours_from`: the oldest hour that there is. Before it only days are told apart.
    """
    first, last = _floor(since, HOUR), _ceil(until, HOUR)
    if hours_from is None or first <= hours_from:
        first = _floor(first, DAY)
    if hours_from is None or last <= _floor(hours_from, DAY):
        last = _ceil(last, DAY)
    day, end = _ceil(first, DAY), _floor(last, DAY)
    if day >= end:
        return Spans((first, first), (first, last), (last, last))
    return Spans((day, end), (first, day), (end, last))


class UsageStore:
    """The queries on usage: sums of sums, made when turns were shipped, never of turns."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def summary(
        self, since: float, until: float, account: int | None = None, by: Grouping = "model"
    ) -> list[UsageSum]:
        """Turns that started in the hours of [since, until) (unix seconds), of one account or of all.

        A begun hour counts whole; so does a begun day, where usage by hour is not kept any more. Days and hours are UTC's
        and come in order; other groups come by amount, the dearest first. ValueError for another `by`.
        """
        if by not in GROUPS:
            raise ValueError(f"by={by!r}: allowed are {', '.join(get_args(Grouping))}")
        label, common = GROUPS[by]
        start, end = EPOCH + dt.timedelta(seconds=since), EPOCH + dt.timedelta(seconds=until)
        if by == "hour":
            times = [start, start, _floor(start, HOUR), _ceil(end, HOUR), end, end]
        else:
            found = spans(start, end, await self._pool.fetchval("select min(hour) from usage_hours"))
            times = [*found.days, *found.before, *found.after]
        whose = "" if account is None else "and account_id = $7"
        rows = await self._pool.fetch(
            f"""
            select {label} as "group", sum(turns)::bigint as turns,
                sum(prompt_tokens)::bigint as prompt_tokens, sum(cached_tokens)::bigint as cached_tokens,
                sum(completion_tokens)::bigint as completion_tokens,
                sum(amount_nano)::bigint as amount_nano
            from (
                select account_id, day, null::timestamptz as hour, key_id, model, {_SUMS} from usage_days
                where day >= ($1 at time zone 'UTC')::date and day < ($2 at time zone 'UTC')::date {whose}
                union all
                select account_id, (hour at time zone 'UTC')::date, hour, key_id, model, {_SUMS} from usage_hours
                where (hour >= $3 and hour < $4 or hour >= $5 and hour < $6) {whose}
            ) as u
            group by {common} order by {common if by in ("day", "hour") else "amount_nano desc, turns desc, 1"}
            """,
            *times,
            *(() if account is None else (account,)),
        )
        return [UsageSum(**row) for row in rows]


_SUMS = "turns, prompt_tokens, cached_tokens, completion_tokens, amount_nano"


def _floor(moment: dt.datetime, step: dt.timedelta) -> dt.datetime:
    return moment - (moment - EPOCH) % step


def _ceil(moment: dt.datetime, step: dt.timedelta) -> dt.datetime:
    return moment + (EPOCH - moment) % step
