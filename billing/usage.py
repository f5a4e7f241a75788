"""Usage: one record a settled turn, written to PostgreSQL in batches and charged to its account exactly once.

Prices were applied before a record comes here, and no request waits for it: `add` only appends to memory. The
rows' partitions are retention.py's; who may see which sums is the caller's to decide.
"""

# ruff: noqa: S608 (statements are put together from this module's own texts, values are parameters)

import asyncio
import datetime as dt
import json
import logging
from collections import deque
from dataclasses import asdict, dataclass
from itertools import islice
from operator import attrgetter
from typing import Literal, get_args
from uuid import UUID

import asyncpg

from config.defaults import Settings
from config.postgres import AWAY

log = logging.getLogger("poolgate.usage")

RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
"""Pauses while PostgreSQL is away: tried again before memory fills, and not hammered."""

CLOSE_S = 10.0
"""How long `close` goes on trying: half of what service managers grant a process that they stop."""

REFUSED = (ValueError, TypeError, OverflowError, asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)
"""The record itself is at fault: it would be refused again for ever."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """What a settled turn used and costs."""

    turn_id: UUID
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
    budgets: tuple[tuple[int, float], ...] = ()  # (budget, start of its window in unix seconds) that it counts in
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

# One statement, so all or nothing. A batch whose answer was lost is sent again, finds its rows and charges
# nobody. Accounts are locked in the order of their ids, so that two writers can't wait for each other.
WRITE = f"""
with fresh as (
    insert into usage ({", ".join(COLUMNS)})
    select * from unnest({", ".join(f"${n}::{kind}[]" for n, kind in enumerate(COLUMNS.values(), 1))})
    on conflict do nothing
    returning account_id, amount_nano
), due as (
    select account_id, sum(amount_nano)::bigint as amount_nano from fresh group by account_id
), locked as (
    select id from accounts where id in (select account_id from due where amount_nano > 0)
    order by id for no key update
)
update accounts set balance_nano = balance_nano - due.amount_nano
from due join locked on locked.id = due.account_id where accounts.id = locked.id
"""

# To the minute, which spares most writes; a row that somebody else holds is left for the next batch.
TOUCH_KEYS = """
update api_keys set last_used_at = clock_timestamp() where id in (
    select id from api_keys
    where id = any($1::bigint[]) and coalesce(last_used_at < clock_timestamp() - interval '1 minute', true)
    for no key update skip locked
)
"""

EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

QUARANTINE = (
    "insert into usage_quarantine (turn_id, reason, record) values ($1, $2, $3) on conflict do nothing"
)


class UsageWriter:
    """Finished turns that wait for PostgreSQL. A record is never refused: look at `is_full` before a turn
    begins.
    """

    def __init__(self, pool: asyncpg.Pool, settings: Settings) -> None:
        self._pool = pool
        self._settings = settings
        self._waiting: deque[UsageRecord] = deque()
        self._flushing = asyncio.Lock()
        self._is_away = False

    def __repr__(self) -> str:
        return f"<UsageWriter pending={self.pending}{' away' if self._is_away else ''}>"

    def add(self, record: UsageRecord) -> None:
        """Take a settled turn, which is written within `usage_flush_s` or as soon as PostgreSQL is back."""
        self._waiting.append(record)

    @property
    def pending(self) -> int:
        """Records that PostgreSQL has not confirmed."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether new turns must be refused, since their records might find no room."""
        return len(self._waiting) >= self._settings.usage_pending_max

    async def run(self) -> None:
        """Write until cancelled, whatever becomes of PostgreSQL; `close` afterwards writes the rest."""
        pause_s = RETRY_MIN_S
        while True:
            await asyncio.sleep(pause_s if self._is_away else self._settings.usage_flush_s)
            while self._waiting:
                if not await self._flush():
                    pause_s = min(2 * pause_s, RETRY_MAX_S)
                    break
                pause_s = RETRY_MIN_S

    async def close(self, timeout_s: float = CLOSE_S) -> int:
        """Write what is left, for at most `timeout_s`; returns, and logs, how many turns were not written."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._waiting:
                    if not await self._flush():
                        await asyncio.sleep(RETRY_MIN_S)
        except TimeoutError:
            pass  # said below
        if self._waiting:
            log.error("%d turns were not written and are lost", self.pending, extra={
                "action": "usage_lost", "turns": self.pending,
                "amount_nano": sum(record.amount_nano for record in self._waiting),
            })  # fmt: skip
        return self.pending

    async def _flush(self) -> bool:
        """Write one batch; False if PostgreSQL is away. Records leave memory only after it confirmed them."""
        async with self._flushing:
            batch = list(islice(self._waiting, self._settings.usage_batch_max))
            try:
                await self._write(batch)
            except AWAY as error:
                self._note_away(error)
                return False
            for _ in batch:
                self._waiting.popleft()
            self._note_back()
            return True

    async def _write(self, batch: list[UsageRecord]) -> None:
        """Write a batch; halve it until the records at fault stand alone, which go to quarantine.

        A half that was written before an error is found written when the whole comes again.
        """
        try:
            await self._insert(batch)
        except REFUSED as error:
            if len(batch) == 1:
                await self._quarantine(batch[0], error)
                return
            middle = len(batch) // 2
            await self._write(batch[:middle])
            await self._write(batch[middle:])

    async def _insert(self, batch: list[UsageRecord]) -> None:
        columns = {name: list(map(attrgetter(name), batch)) for name in COLUMNS}
        columns["started_at"] = [EPOCH + dt.timedelta(seconds=record.started_at) for record in batch]
        keys = sorted({record.key_id for record in batch})
        async with (
            asyncio.timeout(2 * self._settings.database_timeout_s),
            self._pool.acquire() as connection,
            connection.transaction(),
        ):
            await connection.execute(WRITE, *columns.values())
            await connection.execute(TOUCH_KEYS, keys)

    async def _quarantine(self, record: UsageRecord, error: Exception) -> None:
        text = json.dumps(asdict(record), default=str)
        async with asyncio.timeout(self._settings.database_timeout_s):
            await self._pool.execute(QUARANTINE, ascii(record.turn_id), ascii(str(error)), text)
        log.error("a turn's usage was refused and put in quarantine: %s", error, extra={
            "action": "usage_quarantined", "turn_id": str(record.turn_id), "account_id": record.account_id,
            "amount_nano": record.amount_nano,
        })  # fmt: skip

    def _note_away(self, error: Exception) -> None:
        if not self._is_away:
            log.warning(
                "usage can't be written: %s", error or type(error).__name__,
                extra={"action": "usage_unwritable", "pending": self.pending},
            )  # fmt: skip
        self._is_away = True

    def _note_back(self) -> None:
        if self._is_away:
            log.info("usage is written again", extra={"action": "usage_writable", "pending": self.pending})
        self._is_away = False


Grouping = Literal["model", "day", "account", "key"]

GROUPS: dict[str, tuple[str, str]] = {
    "model": ("u.model", "u.model"),
    "day": ("to_char(u.day, 'YYYY-MM-DD')", "u.day"),
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


class UsageStore:
    """The queries on usage."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def summary(
        self, since: float, until: float, account: int | None = None, by: Grouping = "model"
    ) -> list[UsageSum]:
        """Turns that started in [since, until) (unix seconds), of one account or of all.

        Days are UTC's and come in order; other groups come by amount, the dearest first. ValueError for
        another `by`.
        """
        if by not in GROUPS:
            raise ValueError(f"by={by!r}: allowed are {', '.join(get_args(Grouping))}")
        label, common = GROUPS[by]
        rows = await self._pool.fetch(
            f"""
            select {label} as "group", count(*) as turns,
                sum(prompt_tokens)::bigint as prompt_tokens, sum(cached_tokens)::bigint as cached_tokens,
                sum(completion_tokens)::bigint as completion_tokens,
                sum(amount_nano)::bigint as amount_nano
            from (select *, date_trunc('day', started_at at time zone 'utc') as day from usage
                  where started_at >= $1 and started_at < $2 and ($3::bigint is null or account_id = $3)) as u
            group by {common} order by {"u.day" if by == "day" else "amount_nano desc, turns desc, 1"}
            """,
            EPOCH + dt.timedelta(seconds=since),
            EPOCH + dt.timedelta(seconds=until),
            account,
        )
        return [UsageSum(**row) for row in rows]
