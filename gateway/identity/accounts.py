"""Accounts in PostgreSQL: who has a wallet, what they may be, and what is in it.

Changes reach the gateway processes through the change log, by triggers; spending is billing's.
"""

# ruff: noqa: S608 (statements are put together from this module's own texts, values are parameters)

import datetime as dt
from dataclasses import dataclass
from typing import Any

import asyncpg
from redis.asyncio import Redis

from config.changes import wake_feeds

COLUMNS = (
    "id, name, email, balance_nano, status, is_renter, is_provider, is_admin, approval_status, created_at"
)


class AccountExists(ValueError):
    """An account of that name exists already."""


class UnknownAccount(LookupError):
    """No account has that name or id."""


@dataclass(frozen=True, slots=True)
class Account:
    """A person or organisation with a wallet."""

    id: int
    name: str
    email: str | None
    balance_nano: int
    status: str  # active, suspended
    is_renter: bool
    is_provider: bool
    is_admin: bool
    approval_status: str  # of a provider: pending, approved, rejected
    created_at: dt.datetime


class AccountStore:
    """The queries on accounts. With `valkey`, other processes hear of changes at once, else within a poll."""

    def __init__(self, pool: asyncpg.Pool, valkey: Redis | None = None) -> None:
        self._pool = pool
        self._valkey = valkey

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
        """Raises AccountExists."""
        values = (name, email, balance_nano, is_renter, is_provider, is_admin, approval_status)
        try:
            row = await self._pool.fetchrow(
                "insert into accounts"
                " (name, email, balance_nano, is_renter, is_provider, is_admin, approval_status)"
                f" values ($1, $2, $3, $4, $5, $6, $7) returning {COLUMNS}",
                *values,
            )
        except asyncpg.UniqueViolationError as error:
            raise AccountExists(f"an account named {name!r} exists already") from error
        return _account(row)

    async def list(self) -> list[Account]:
        """Every account, oldest first."""
        return [
            _account(row) for row in await self._pool.fetch(f"select {COLUMNS} from accounts order by id")
        ]

    async def show(self, name_or_id: str | int) -> Account:
        """By id, or by what a person typed: a name, even one of digits, before an id. Raises UnknownAccount."""
        if isinstance(name_or_id, int):
            row = await self._pool.fetchrow(f"select {COLUMNS} from accounts where id = $1", name_or_id)
            return _account(row, str(name_or_id))
        text = name_or_id
        row = await self._pool.fetchrow(
            f"select {COLUMNS} from accounts where name = $1 or id::text = $1"
            " order by name = $1 desc limit 1",
            text,
        )
        return _account(row, text)

    async def credit(self, account_id: int, amount_nano: int) -> Account:
        """Move the balance by an amount, of either sign; the account as it is then. Raises UnknownAccount."""
        return await self._update(account_id, "balance_nano = balance_nano + $2", amount_nano)

    async def set_status(self, account_id: int, status: str) -> Account:
        """`active` or `suspended`: a suspended account's keys are refused. Raises UnknownAccount."""
        return await self._update(account_id, "status = $2", status)

    async def set_approval(self, account_id: int, approval_status: str) -> Account:
        """`pending`, `approved` or `rejected`: may this provider's nodes take work? Raises UnknownAccount."""
        return await self._update(account_id, "approval_status = $2", approval_status)

    async def _update(self, account_id: int, change: str, value: Any) -> Account:
        row = await self._pool.fetchrow(
            f"update accounts set {change} where id = $1 returning {COLUMNS}",
            account_id,
            value,
        )
        account = _account(row, account_id)
        await wake_feeds(self._valkey)
        return account


def _account(row: asyncpg.Record | None, asked: str | int = "") -> Account:
    if row is None:
        raise UnknownAccount(f"no account {asked!r}")
    return Account(**row)
