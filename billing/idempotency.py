"""Claims of Idempotency-Keys in PostgreSQL: who runs a keyed request, and its first answer, sealed, for a day.

It promises that at most one turn of a key is charged. How such a turn runs and is replayed is `gateway.idempotent`; that a
turn is settled is the shipper's to know: it finishes the claims of turns that come into the book.
"""

# ruff: noqa: S608 (statements are put together from this module's own texts, values are parameters)

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg

from billing.sealing import Sealer, Unreadable
from config.defaults import Settings
from config.postgres import AWAY

log = logging.getLogger("poolgate.idempotency")

KEY_CHARS_MAX = 255
"""As the trade has it (Stripe, and the IETF's draft-ietf-httpapi-idempotency-key-header leaves it open)."""

STATEMENTS_AT_ONCE_MAX = 2
"""Claims and their ends in PostgreSQL at a time: a flood of keyed requests, which no rate limit has seen yet, leaves
connections for the leases of everybody else."""

LEFT_SHARE_MIN = 0.1
"""Of a time-out, for who comes to a connection: with less nothing is sent. Those before timed out there, and so would this,
and then PostgreSQL had to be told of one more that may have come."""

CLAIM_TRIES = 3
"""A claim that another process changed in the moment of ours is looked at anew; it changes a few times in its life."""

RETRY_S = 1.0
"""Pause between attempts to say how claims ended, while PostgreSQL is away."""

TRIM_BATCH = 1000
"""Claims deleted by one statement, each with an answer of up to a megabyte."""


class StoreUnavailable(Exception):
    """Whether the key was used can't be known now, so the request must not run."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """The key is this turn's: run it, then say how it ended (`finish` or `release`)."""

    is_rerun: bool  # an earlier owner died before its turn was settled


@dataclass(frozen=True, slots=True)
class Repeat:
    """The first answer."""

    answer: bytes


@dataclass(frozen=True, slots=True)
class Running:
    """The first request with this key has not ended."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """The key was used for another request."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The first request has ended and may have been charged, but its answer was not kept."""


Verdict: TypeAlias = Claimed | Repeat | Running | Conflict | Lost

_LIVE = "exists (select from incarnations i where i.id = c.incarnation_id and i.state = 'live')"
"""Its owner may still be at work, or have a journal that says what became of the turn: no one else may run it. A
dead process's incarnation is closed only after its journal was shipped."""

_EXPIRED = f"""(c.created_at < clock_timestamp() - make_interval(secs => $6)
    and (c.state = 'finished' or not {_LIVE}))"""

_ORPHANED = f"(c.state = 'running' and c.attempts = 1 and c.request_hash = $3 and not {_LIVE})"

# One round trip. `on conflict` judges the row as it is once its lock was taken, the select below the row as it was when the
# statement began: what the select would have had claimed was changed meanwhile, so it says nothing, and we ask again.
CLAIM = f"""
with claimed as (
    insert into idempotency_claims as c (account_id, key, request_hash, incarnation_id, turn_id)
    values ($1, $2, $3, $4, $5)
    on conflict (account_id, key) do update set
        request_hash = excluded.request_hash, incarnation_id = excluded.incarnation_id, turn_id = excluded.turn_id,
        attempts = case when c.turn_id = $5 then c.attempts when {_EXPIRED} then 1 else 2 end,
        state = 'running', is_answered = false, answer = null, finished_at = null, created_at = clock_timestamp()
    where {_EXPIRED} or {_ORPHANED} or (c.turn_id = $5 and c.state = 'running')
    returning attempts
)
select 'claimed' as verdict, attempts, null as answer from claimed
union all
select case
        when c.request_hash <> $3 then 'conflict'
        when c.answer is not null then 'repeat'
        when not c.is_answered and {_LIVE} then 'running'
        else 'lost'
    end, c.attempts, c.answer
from idempotency_claims c
where c.account_id = $1 and c.key = $2 and not exists (select from claimed) and not ({_EXPIRED} or {_ORPHANED})
"""

FINISH = """
update idempotency_claims set state = 'finished', is_answered = true, answer = $4, finished_at = clock_timestamp()
where account_id = $1 and key = $2 and turn_id = $3
"""

RELEASE = """
delete from idempotency_claims where account_id = $1 and key = $2 and turn_id = $3 and not is_answered
"""

TRIM = f"""
delete from idempotency_claims where (account_id, key) in (
    select account_id, key from idempotency_claims c
    where c.created_at < clock_timestamp() - make_interval(secs => $1) and (c.state = 'finished' or not {_LIVE})
    order by c.created_at limit {TRIM_BATCH}
)
"""


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a claim ended, until PostgreSQL knows."""

    account_id: int
    key: str
    turn_id: UUID
    is_release: bool
    sealed: bytes | None = None
    repeat_until_s: float = (
        0.0  # monotonic: said again until then, since the claim itself may still be on its way
    )


class IdempotencyStore:
    """The claims. How one ended is kept in memory until PostgreSQL has it: `run` sees to that, and `close` at the end."""

    def __init__(self, pool: asyncpg.Pool, settings: Settings, pepper: bytes) -> None:
        self._pool = pool
        self._settings = settings
        self._sealer = Sealer(pepper)
        self._slots = asyncio.Semaphore(STATEMENTS_AT_ONCE_MAX)
        self._endings: dict[UUID, _Ending] = {}
        self._is_away = False

    def __repr__(self) -> str:
        return f"<IdempotencyStore pending={self.pending}>"

    @property
    def pending(self) -> int:
        """Claims whose end PostgreSQL does not know."""
        return len(self._endings)

    def request_hash(self, method: str, path: str, body: bytes) -> bytes:
        """What tells a repeat from another request."""
        return self._sealer.mark(method.encode(), path.encode(), body)

    async def claim(
        self, account_id: int, key: str, request_hash: bytes, incarnation_id: UUID, turn_id: UUID
    ) -> Verdict:
        """Take the key for this turn, or say why not: one round trip, within one time-out. Raises StoreUnavailable.

        A dead owner's claim is taken over once, when its incarnation has ended: its journal is in the book by then, so
        that an unfinished claim means a turn that was never charged. A claim that expired counts as none.
        """
        try:
            async with self._connection() as connection:
                return await self._claim(connection, account_id, key, request_hash, incarnation_id, turn_id)
        except AWAY as error:
            raise StoreUnavailable(str(error) or type(error).__name__) from error

    async def finish(self, account_id: int, key: str, turn_id: UUID, answer: bytes | None) -> None:
        """The turn has ended with `answer`; None if it is not kept. While PostgreSQL is away, it is told later."""
        sealed = None
        if answer is not None and self._has_room:
            sealed = self._sealer.seal(account_id, key, answer)
        await self._end(_Ending(account_id, key, turn_id, False, sealed))

    async def release(self, account_id: int, key: str, turn_id: UUID) -> None:
        """The turn was refused and nothing charged: the key is free again."""
        await self._end(_Ending(account_id, key, turn_id, True))

    async def run(self) -> None:
        """Tell PostgreSQL what it does not know yet, until cancelled."""
        while True:
            await asyncio.sleep(RETRY_S)
            await self._tell_all()

    async def close(self, timeout_s: float) -> int:
        """Tell the rest, for at most `timeout_s`; returns, and logs, how many ends PostgreSQL does not know.

        Those turns are settled: their claims are finished, without an answer, when the journal is shipped.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if await self._tell_all(is_last=True):
                        break
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            pass  # said below
        if self._endings:
            log.warning(
                "%d answers to keyed requests were not kept", self.pending,
                extra={"action": "idempotency_unkept", "pending": self.pending},
            )  # fmt: skip
        return self.pending

    @property
    def _has_room(self) -> bool:
        kept = sum(ending.sealed is not None for ending in self._endings.values())
        return kept < self._settings.idempotency_pending_max

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        """One of few, within the time-out. If its statement fails it is dropped: a frozen server would keep us waiting."""
        timeout_s = self._settings.database_timeout_s
        last_s = asyncio.get_running_loop().time() + timeout_s * (1 - LEFT_SHARE_MIN)
        async with asyncio.timeout(timeout_s), self._slots, self._pool.acquire() as connection:
            if asyncio.get_running_loop().time() > last_s:
                raise TimeoutError
            try:
                yield connection
            except BaseException:
                connection.terminate()
                raise

    async def _claim(
        self, connection: Any, account_id: int, key: str, request_hash: bytes, incarnation_id: UUID, turn_id: UUID
    ) -> Verdict:  # fmt: skip
        try:
            for _ in range(CLAIM_TRIES):
                row = await connection.fetchrow(
                    CLAIM, account_id, key, request_hash, incarnation_id, turn_id,
                    self._settings.idempotency_kept_s,
                )  # fmt: skip
                if row is not None:
                    return self._verdict(account_id, key, row)
        except (*AWAY, asyncio.CancelledError):
            self._withdraw(account_id, key, turn_id)
            raise
        return Running()

    def _verdict(self, account_id: int, key: str, row: asyncpg.Record) -> Verdict:
        match row["verdict"]:
            case "claimed":
                return Claimed(is_rerun=row["attempts"] > 1)
            case "repeat":
                try:
                    return Repeat(self._sealer.open(account_id, key, row["answer"]))
                except Unreadable as error:
                    log.warning(
                        "a kept answer is lost: %s", error, extra={"action": "idempotency_unreadable"}
                    )
                    return Lost()
            case "running":
                return Running()
            case "conflict":
                return Conflict()
            case _:
                return Lost()

    def _withdraw(self, account_id: int, key: str, turn_id: UUID) -> None:
        """The claim may have been carried out, now or when its statement gets its lock: no turn will run for it."""
        until_s = time.monotonic() + 2 * self._settings.database_timeout_s
        self._endings[turn_id] = _Ending(account_id, key, turn_id, True, repeat_until_s=until_s)

    async def _end(self, ending: _Ending) -> None:
        self._endings[ending.turn_id] = ending  # before the wait: whoever is cancelled there has said it
        await self._tell(ending)

    async def _tell_all(self, *, is_last: bool = False) -> bool:
        for ending in list(self._endings.values()):
            if not await self._tell(ending, is_last=is_last):
                return False
        return True

    async def _tell(self, ending: _Ending, *, is_last: bool = False) -> bool:
        """False if PostgreSQL is away. To say it twice changes nothing."""
        whose = (ending.account_id, ending.key, ending.turn_id)
        try:
            async with self._connection() as connection:
                if ending.is_release:
                    await connection.execute(RELEASE, *whose)
                else:
                    await connection.execute(FINISH, *whose, ending.sealed)
        except AWAY as error:
            if not self._is_away:
                log.warning(
                    "ends of claims can't be written: %s", error or type(error).__name__,
                    extra={"action": "idempotency_unwritable", "pending": self.pending},
                )  # fmt: skip
            self._is_away = True
            return False
        self._is_away = False
        if is_last or time.monotonic() >= ending.repeat_until_s:
            self._endings.pop(ending.turn_id, None)
        return True


async def trim_claims(pool: asyncpg.Pool, settings: Settings) -> int:
    """Delete the claims that expired; how many. A turn that still runs keeps its claim."""
    deleted = 0
    while True:
        status = await pool.execute(TRIM, settings.idempotency_kept_s)
        count = int(status.rpartition(" ")[2])
        deleted += count
        if count < TRIM_BATCH:
            return deleted
