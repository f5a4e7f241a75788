"""Accounts in PostgreSQL: who has a wallet, what they may be, and what is in it.

Changes reach the gateway processes through the change log, by triggers; spending, and what a transfer is, are billing's.
"""

# ruff: noqa: S608 (statements are put together from this module's own texts, values are parameters)

import datetime as dt
from dataclasses import dataclass
from typing import Any

import asyncpg
from redis.asyncio import Redis

from billing.ledger import AccountRef, Connection, Ledger, Transfer
from billing.recalls import RECALL_S, Recalled, recall, recalled
from config.changes import wake_feeds
from config.ids import uuid7

# Nothing is counted twice, and nothing falls between: what a process settled but has not shipped is neither free nor
# held in its lease any more, and not in usage_days yet, so it is told as spent from the lease's remainder.
READ = """
select a.id, a.name, a.email, a.status, a.is_renter, a.is_provider, a.is_admin, a.approval_status, a.tier, a.time_zone,
    a.created_at,
    w.credit_nano - w.debit_nano - w.pending_debit_nano - w.leased_nano + l.free as balance_nano,
    w.pending_debit_nano + l.held as held_nano,
    u.amount + l.remainder - l.free - l.held as spent_nano,
    coalesce(e.credit_nano - e.debit_nano - e.pending_debit_nano, 0) as earnings_nano,
    u.turns, u.prompt_tokens, u.completion_tokens
from accounts a
join ledger_accounts w on w.kind = 'wallet' and w.owner_id = a.id
left join ledger_accounts e on e.kind = 'earnings' and e.owner_id = a.id
cross join lateral (
    select coalesce(sum(granted_nano - settled_nano - returned_nano), 0)::bigint as remainder,
        coalesce(sum(free_nano), 0)::bigint as free, coalesce(sum(held_nano), 0)::bigint as held
    from spend_leases where account_id = a.id
) l
cross join lateral (
    select coalesce(sum(amount_nano), 0)::bigint as amount, coalesce(sum(turns), 0)::bigint as turns,
        coalesce(sum(prompt_tokens), 0)::bigint as prompt_tokens,
        coalesce(sum(completion_tokens), 0)::bigint as completion_tokens
    from usage_days where account_id = a.id
) u
"""


class AccountExists(ValueError):
    """An account of that name exists already."""


class UnknownAccount(LookupError):
    """No account has that name or id."""


class UnknownTimeZone(ValueError):
    """PostgreSQL knows no such time zone."""


class TooLittleAvailable(ValueError):
    """What is to be taken back is not available: it was spent, is held, or is leased to a process."""


class IdempotencyConflict(ValueError):
    """That idempotency key belongs to another transfer."""


@dataclass(frozen=True, slots=True)
class Account:
    """A person or organisation with a wallet. Balance, held and spent are at most `lease_report_s` old, and add up
    to what was ever paid in, less what was taken back.
    """

    id: int
    name: str
    email: str | None
    status: str  # active, suspended
    is_renter: bool
    is_provider: bool
    is_admin: bool
    approval_status: str  # of a provider: pending, approved, rejected
    tier: str | None
    time_zone: str  # whose days and months its budgets and statements go by
    created_at: dt.datetime
    balance_nano: int  # what it can spend, wherever it is
    held_nano: int  # for turns that run, and pending transfers
    spent_nano: int
    earnings_nano: int  # of a provider: earned and not withdrawn
    turns: int
    prompt_tokens: int
    completion_tokens: int


class AccountStore:
    """The queries on accounts. With `valkey`, other processes hear of changes at once, else within a poll."""

    def __init__(self, pool: asyncpg.Pool, valkey: Redis | None = None) -> None:
        self._pool = pool
        self._valkey = valkey
        self._ledger = Ledger()

    async def create(
        self,
        name: str,
        *,
        email: str | None = None,
        balance_nano: int = 0,
        is_renter: bool = True,
        is_provider: bool = False,
        is_admin: bool = False,
        approval_status: str = "approved",
    ) -> Account:
        """With a top-up of `balance_nano`, if any. Raises AccountExists."""
        if balance_nano < 0:
            raise ValueError(f"a new account can't begin with {balance_nano} nano")
        values = (name, email, is_renter, is_provider, is_admin, approval_status)
        async with self._pool.acquire() as connection, connection.transaction():
            try:
                account_id = await connection.fetchval(
                    "insert into accounts (name, email, is_renter, is_provider, is_admin, approval_status)"
                    " values ($1, $2, $3, $4, $5, $6) returning id",
                    *values,
                )
            except asyncpg.UniqueViolationError as error:
                raise AccountExists(f"an account named {name!r} exists already") from error
            if balance_nano:
                await self._move(connection, account_id, balance_nano, None, "starting balance")
        await wake_feeds(self._valkey)
        return await self.show(account_id)

    async def list(self) -> list[Account]:
        """Every account, oldest first."""
        return [Account(**row) for row in await self._pool.fetch(f"{READ} order by a.id")]

    async def show(self, name_or_id: str | int) -> Account:
        """By id, or by what a person typed: a name, even one of digits, before an id. Raises UnknownAccount."""
        if isinstance(name_or_id, int):
            row = await self._pool.fetchrow(f"{READ} where a.id = $1", name_or_id)
        else:
            row = await self._pool.fetchrow(
                f"{READ} where a.name = $1 or a.id::text = $1 order by a.name = $1 desc limit 1", name_or_id
            )
        if row is None:
            raise UnknownAccount(f"no account {name_or_id!r}")
        return Account(**row)

    async def credit(
        self, account_id: int, amount_nano: int, idempotency_key: str | None = None, cause: str = ""
    ) -> Account:
        """Top up, or take back a negative amount; again with the same key is no change.

        What processes have leased but do not use is recalled before TooLittleAvailable is raised. Raises UnknownAccount
        and IdempotencyConflict.
        """
        account = await self.show(account_id)
        if not amount_nano:
            return account
        try:
            await self._credit(account_id, amount_nano, idempotency_key, cause)
        except TooLittleAvailable:
            if account.balance_nano < -amount_nano:
                raise
            await self.recall(account_id)
            await self._credit(account_id, amount_nano, idempotency_key, cause)
        return await self.show(account_id)

    async def recall(self, account_id: int, timeout_s: float = RECALL_S) -> Recalled:
        """Have the gateway processes return what of this wallet is free; what they still have after `timeout_s`."""
        await recall(self._pool, account_id)
        await wake_feeds(self._valkey)
        return await recalled(self._pool, account_id, timeout_s)

    async def suspend(self, account_id: int, timeout_s: float = RECALL_S) -> tuple[Account, Recalled]:
        """Refuse its keys, and have what is leased of its wallet returned; turns that run are not cut.

        Raises UnknownAccount.
        """
        await self.set_status(account_id, "suspended")
        left = await recalled(self._pool, account_id, timeout_s)
        return await self.show(account_id), left

    async def set_status(self, account_id: int, status: str) -> Account:
        """`active` or `suspended`: a suspended account's keys are refused, its leases recalled (`suspend` waits for
        them). Raises UnknownAccount.
        """
        return await self._update(account_id, "status = $2", status, is_recalled=status == "suspended")

    async def set_approval(self, account_id: int, approval_status: str) -> Account:
        """`pending`, `approved` or `rejected`: may this provider's nodes take work? Raises UnknownAccount."""
        return await self._update(account_id, "approval_status = $2", approval_status)

    async def set_time_zone(self, account_id: int, time_zone: str) -> Account:
        """A name such as Asia/Riyadh; budget windows follow from their next one on.

        Raises UnknownAccount, UnknownTimeZone.
        """
        if not await self._pool.fetchval("select true from pg_timezone_names where name = $1", time_zone):
            raise UnknownTimeZone(f"no time zone {time_zone!r}")
        return await self._update(account_id, "time_zone = $2", time_zone)

    async def _credit(self, account_id: int, amount_nano: int, key: str | None, cause: str) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            await self._move(connection, account_id, amount_nano, key, cause)
        await wake_feeds(self._valkey)

    async def _move(
        self, connection: Connection, account_id: int, amount_nano: int, key: str | None, cause: str
    ) -> None:
        wallet, clearing = AccountRef.wallet(account_id), AccountRef.platform("clearing")
        debit, credit, kind = (
            (clearing, wallet, "topup") if amount_nano > 0 else (wallet, clearing, "takeback")
        )
        transfer = Transfer(uuid7(), debit, credit, abs(amount_nano), kind, idempotency_key=key, cause=cause)
        (result,) = await self._ledger.apply(connection, [transfer])
        if result.status == "conflict":
            raise IdempotencyConflict(
                f"idempotency key {key!r} is another transfer's: its {result.field} differs"
            )
        if not result.is_moved:
            raise TooLittleAvailable(
                f"less than {-amount_nano} nano is available in the wallet of {account_id}"
            )

    async def _update(
        self, account_id: int, change: str, value: Any, *, is_recalled: bool = False
    ) -> Account:
        async with self._pool.acquire() as connection, connection.transaction():
            done = await connection.fetchval(
                f"update accounts set {change} where id = $1 returning true", account_id, value
            )
            if not done:
                raise UnknownAccount(f"no account {account_id!r}")
            if is_recalled:
                await recall(connection, account_id)
        await wake_feeds(self._valkey)
        return await self.show(account_id)
