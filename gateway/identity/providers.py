"""Accounts of providers: registered, given other keys, and deleted so that what was earned stays in the book without a name.

What a provider wants of its nodes, and what they report, is `nodes.providers`'.
"""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import orjson
from redis.asyncio import Redis

from config.changes import wake_feeds
from config.defaults import Settings
from gateway.identity.keys import KeyStore
from nodes.providers import LOCK_NODES, UnknownProvider

SCOPE = "node"
"""What a provider's keys may do."""

DELETED = "[deleted]"


ATTEMPTS = 3
"""A deletion is tried so often: whoever writes what hangs on the provider's row, as sums of its nodes' time, locks that
before the row, so that each may wait for the other."""


class EmailTaken(ValueError):
    """A provider has that address already."""


class NodesRunning(Exception):
    """A node of the account is not offline: its agent must be stopped first."""


class WithdrawalPending(Exception):
    """A withdrawal of the account is under way."""


@dataclass(frozen=True, slots=True)
class Registration:
    """A new provider; the key can't be had again."""

    account_id: int
    key: str = field(repr=False)
    approval_status: str


@dataclass(frozen=True, slots=True)
class Earned:
    """What came in for a provider; today and week by its time zone's midnights."""

    total_nano: int
    today_nano: int
    week_nano: int  # today and the six days before


class ProviderAccounts:
    """The queries on accounts that are providers."""

    def __init__(self, pool: asyncpg.Pool, keys: KeyStore, settings: Settings, valkey: Redis | None) -> None:
        self._pool = pool
        self._keys = keys
        self._settings = settings
        self._valkey = valkey

    async def register(
        self, *, name: str, email: str, gpu_model: str, os: str, phone: str | None,
        resource_spec: Mapping[str, Any],
    ) -> Registration:  # fmt: skip
        """A new account and its first key. Raises EmailTaken."""
        settings = self._settings
        is_approved = settings.developer_mode or settings.provider_approval == "automatic"
        approval = "approved" if is_approved else "pending"
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                account_id = await connection.fetchval(ADD, f"provider:{email}", email, approval)
                await connection.execute(
                    DESCRIBE, account_id, name, email, phone, os, gpu_model, orjson.dumps(resource_spec).decode()
                )  # fmt: skip
        except asyncpg.UniqueViolationError:
            raise EmailTaken from None  # the cause names the address
        return Registration(account_id, await self.add_key(account_id, "registration"), approval)

    async def add_key(self, account_id: int, name: str) -> str:
        """Another key; those there are stay valid."""
        _, secret = await self._keys.create(
            account_id, name=name, scopes=(SCOPE,), prefix=self._settings.provider_key_prefix
        )
        return secret

    async def rotate(self, account_id: int) -> str:
        """A new key instead of all older ones for nodes. Of two rotations at once the later one's key stays."""
        key, secret = await self._keys.create(
            account_id, name="rotation", scopes=(SCOPE,), prefix=self._settings.provider_key_prefix
        )
        await self._pool.execute(REVOKE_OLDER, account_id, SCOPE, key.id)
        await wake_feeds(self._valkey)
        return secret

    async def earned(self, account_id: int) -> Earned:
        """From the ledger, as far as turns are shipped."""
        row = await self._pool.fetchrow(EARNED, account_id)
        return Earned(0, 0, 0) if row is None else Earned(row["total"], row["today"], row["week"])

    async def delete(self, account_id: int) -> dt.datetime:
        """Forget the provider: keys, nodes, name and address. Its entries in the ledger and in usage stay, and name nobody.

        An account that is a renter as well stays one. Raises UnknownProvider, NodesRunning, WithdrawalPending.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                deleted_at = await self._delete(account_id)
                break
            except asyncpg.exceptions.TransactionRollbackError:
                if attempt == ATTEMPTS:
                    raise
        await wake_feeds(self._valkey)
        return deleted_at

    async def _delete(self, account_id: int) -> dt.datetime:
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(LOCK, account_id)
            if row is None:
                raise UnknownProvider
            if row["has_nodes_running"]:
                raise NodesRunning
            if row["has_withdrawal"]:
                raise WithdrawalPending
            await connection.execute(LOCK_NODES, account_id)
            # Nodes, events, codes and all else hang on this row.
            await connection.execute("delete from providers where account_id = $1", account_id)
            await connection.execute(
                "delete from api_keys where account_id = $1 and (not $2 or scopes = array[$3])",
                account_id, row["is_renter"], SCOPE,
            )  # fmt: skip
            deleted_at: dt.datetime = await connection.fetchval(
                KEEP_RENTER if row["is_renter"] else ERASE,
                *((account_id,) if row["is_renter"] else (account_id, f"{DELETED} {account_id}")),
            )
        return deleted_at


ADD = """
insert into accounts (name, email, is_renter, is_provider, approval_status) values ($1, $2, false, true, $3) returning id
"""

# A trigger made the row.
DESCRIBE = """
update providers set name = $2, email = $3, phone = $4, os = $5, gpu_model = $6, resource_spec = $7::jsonb
where account_id = $1
"""

REVOKE_OLDER = """
update api_keys set revoked_at = clock_timestamp()
where account_id = $1 and $2 = any (scopes) and id < $3 and revoked_at is null
"""

EARNED = """
select l.credit_nano as total, sums.today, sums.week
from ledger_accounts l
join accounts a on a.id = l.owner_id
cross join lateral (
    select date_trunc('day', clock_timestamp() at time zone a.time_zone) as midnight
) d
cross join lateral (
    select coalesce(sum(amount_nano) filter (where at >= d.midnight at time zone a.time_zone), 0)::bigint as today,
        coalesce(sum(amount_nano), 0)::bigint as week
    from transfers
    where credit_id = l.id and phase in ('posted', 'post')
      and at >= (d.midnight - interval '6 days') at time zone a.time_zone
) sums
where l.kind = 'earnings' and l.owner_id = $1
"""

LOCK = """
select a.is_renter,
    exists (select from nodes where account_id = a.id and state in ('online', 'paused', 'draining'))
        as has_nodes_running,
    exists (select from ledger_accounts where kind = 'earnings' and owner_id = a.id and pending_debit_nano > 0)
        as has_withdrawal
from accounts a join providers p on p.account_id = a.id where a.id = $1 and a.is_provider for update
"""

ERASE = """
update accounts set name = $2, email = null, is_provider = false, status = 'suspended' where id = $1
returning clock_timestamp()
"""

KEEP_RENTER = "update accounts set is_provider = false where id = $1 returning clock_timestamp()"
