"""API keys in PostgreSQL: made, listed, revoked and found by their digest; the secret itself is shown once.

What a process remembers of them is keyring.py's; revocations reach it through the change log, by triggers.
"""

# ruff: noqa: S608 (statements are put together from this module's own texts, values are parameters)

import datetime as dt
import json
from collections.abc import Iterable
from dataclasses import dataclass

import asyncpg
from redis.asyncio import Redis

from billing.leases import Budget
from billing.limits.rules import Subject, limits_of
from config.changes import wake_feeds
from gateway.identity.accounts import UnknownAccount
from gateway.identity.keyring import Principal
from gateway.identity.secrets import check_secret, display_prefix, hash_secret, new_secret

COLUMNS = "id, account_id, name, prefix, scopes, models, created_at, revoked_at, last_used_at"

# Everything that a principal is: a key seen first costs this one question. An account's own limits win over its tier's.
FIND = """
select k.id, k.account_id, a.name, k.scopes, k.models, k.limits,
    coalesce(t.limits, '{}') || a.limits as account_limits,
    (select coalesce(json_agg(json_build_array(b.id, b.key_id, b.period) order by b.id), '[]') from budgets b
     where b.account_id = k.account_id and (b.key_id is null or b.key_id = k.id)) as budgets
from api_keys k join accounts a on a.id = k.account_id left join tiers t on t.name = a.tier
where k.digest = $1 and k.revoked_at is null and a.status = 'active'
"""


class KeyExists(ValueError):
    """That secret belongs to a key already."""


class UnknownKey(LookupError):
    """No key has that id."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What may be shown of a key."""

    id: int
    account_id: int
    name: str
    prefix: str  # the start of the secret, by which its owner may recognise it
    scopes: tuple[str, ...]
    models: tuple[str, ...] | None  # None: every model
    created_at: dt.datetime
    revoked_at: dt.datetime | None
    last_used_at: dt.datetime | None  # to the minute


class KeyStore:
    """The queries on keys. With `valkey`, other processes hear of a change at once, else within a poll."""

    def __init__(self, pool: asyncpg.Pool, pepper: bytes, valkey: Redis | None = None) -> None:
        self._pool = pool
        self._pepper = pepper
        self._valkey = valkey

    async def create(
        self,
        account_id: int,
        *,
        prefix: str,
        name: str = "",
        scopes: Iterable[str] = ("inference",),
        models: Iterable[str] | None = None,
        secret: str | None = None,
    ) -> tuple[ApiKey, str]:
        """The key and its secret, which can't be had again; `secret` brings one along.

        Raises KeyExists, UnknownAccount, and ValueError for a secret that can't be one.
        """
        if secret is None:
            secret = new_secret(prefix)
        check_secret(secret)
        try:
            row = await self._pool.fetchrow(
                "insert into api_keys (account_id, name, digest, prefix, scopes, models)"
                f" values ($1, $2, $3, $4, $5, $6) returning {COLUMNS}",
                account_id,
                name,
                hash_secret(self._pepper, secret),
                display_prefix(secret),
                list(scopes),
                None if models is None else list(models),
            )
        except asyncpg.UniqueViolationError:
            raise KeyExists("that secret belongs to a key already") from None  # the cause names the digest
        except asyncpg.ForeignKeyViolationError as error:
            raise UnknownAccount(f"no account {account_id!r}") from error
        await wake_feeds(self._valkey)
        return _key(row), secret

    async def list(self, account_id: int | None = None) -> list[ApiKey]:
        """Every key, or an account's, oldest first, the revoked ones too."""
        rows = await self._pool.fetch(
            f"select {COLUMNS} from api_keys where $1::bigint is null or account_id = $1 order by id",
            account_id,
        )
        return [_key(row) for row in rows]

    async def revoke(self, key_id: int) -> ApiKey:
        """Refused from the next change poll on, at the latest; again is no change. Raises UnknownKey."""
        row = await self._pool.fetchrow(
            "update api_keys set revoked_at = coalesce(revoked_at, clock_timestamp())"
            f" where id = $1 returning {COLUMNS}",
            key_id,
        )
        if row is None:
            raise UnknownKey(f"no key {key_id!r}")
        await wake_feeds(self._valkey)
        return _key(row)

    async def find(self, digest: bytes) -> Principal | None:
        """Whom a key speaks for; None if there is none, it is revoked or its account suspended."""
        row = await self._pool.fetchrow(FIND, digest)
        if row is None:
            return None
        return Principal(
            key_id=row["id"],
            account_id=row["account_id"],
            account_name=row["name"],
            scopes=frozenset(row["scopes"]),
            models=None if row["models"] is None else frozenset(row["models"]),
            subjects=_subjects(row),
            budgets=tuple(Budget(*fields) for fields in json.loads(row["budgets"])),
        )


def _subjects(row: asyncpg.Record) -> tuple[Subject, ...]:
    """Whose limits count; what has none is left out, so that most keys cost the limiter nothing."""
    of_key = Subject("key", row["id"], limits_of(row["limits"]))
    of_account = Subject("account", row["account_id"], limits_of(row["account_limits"]))
    return tuple(subject for subject in (of_key, of_account) if subject.limits.is_any)


def _key(row: asyncpg.Record | None) -> ApiKey:
    assert row is not None  # an insert that returns, returns
    values = dict(row)
    values["scopes"] = tuple(values["scopes"])
    values["models"] = None if values["models"] is None else tuple(values["models"])
    return ApiKey(**values)
