"""Many accounts for a benchmark or soak, each with a key and money, made in a few statements.

They get what the product's own stores would give them; limits and budgets are told by the caller.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from billing.ledger import AccountRef, Ledger, Transfer
from billing.money import NANO
from config.ids import uuid7
from gateway.identity.secrets import display_prefix, hash_secret, new_secret

HIGH: dict[str, Any] = {
    "key_limits": {"requests_minute": 10_000_000, "tokens_minute": 10**10, "concurrency": 100_000},
    "account_limits": {"requests_day": 10**10},
    "tier_limits": {"requests_minute": 20_000_000, "tokens_day": 10**12},
}
"""Limits of every kind that are kept by blocks, and never reached."""

BUDGETS: dict[str, Any] = {
    "key_budget": ("day", 10**6 * NANO), "account_budget": ("month", 10**6 * NANO),
}  # fmt: skip
"""One of the key and one of its account, never reached."""

LARGE_NANO = 10_000 * NANO

CREDITS_MAX = 5_000
"""Top-ups in one transaction, below any statement time-out."""


async def make_accounts(
    pool: asyncpg.Pool, pepper: bytes, name: str, count: int, *, balance_nano: int,
    key_limits: Mapping[str, int] | None = None, account_limits: Mapping[str, int] | None = None,
    tier_limits: Mapping[str, int] | None = None, key_budget: tuple[str, int] | None = None,
    account_budget: tuple[str, int] | None = None,
) -> list[str]:  # fmt: skip
    """The secrets of `count` keys, each of an account of its own; a budget is a period and its limit."""
    secrets = [new_secret("sk-pg-") for _ in range(count)]
    async with pool.acquire() as connection:
        await connection.execute("insert into tiers (name, limits) values ($1, $2)", name, _json(tier_limits))
        ids = [row["id"] for row in await connection.fetch(
            "insert into accounts (name, tier, limits) select $1 || '-' || n, $1, $3 from generate_series(1, $2) as n"
            " returning id", name, count, _json(account_limits),
        )]  # fmt: skip
        keys = await connection.fetch(
            "insert into api_keys (account_id, digest, prefix, scopes, limits)"
            " select id, digest, prefix, '{inference}', $4"
            " from unnest($1::bigint[], $2::bytea[], $3::text[]) as k (id, digest, prefix) returning id, account_id",
            ids, [hash_secret(pepper, secret) for secret in secrets], [display_prefix(secret) for secret in secrets],
            _json(key_limits),
        )  # fmt: skip
        await _budget(connection, [(key["account_id"], key["id"]) for key in keys], key_budget)
        await _budget(connection, [(account_id, None) for account_id in ids], account_budget)
        for some in _slices(ids):
            async with connection.transaction():
                await Ledger().apply(connection, [_top_up(account_id, balance_nano) for account_id in some])
    return secrets


def _slices(ids: Sequence[int]) -> list[Sequence[int]]:
    return [ids[at : at + CREDITS_MAX] for at in range(0, len(ids), CREDITS_MAX)]


def _top_up(account_id: int, amount_nano: int) -> Transfer:
    clearing, wallet = AccountRef.platform("clearing"), AccountRef.wallet(account_id)
    return Transfer(uuid7(), clearing, wallet, amount_nano, "topup")


async def _budget(
    connection: Any, owners: Sequence[tuple[int, int | None]], budget: tuple[str, int] | None
) -> None:
    if budget is not None:
        rows = [(account_id, key_id, *budget) for account_id, key_id in owners]
        await connection.copy_records_to_table(
            "budgets", columns=("account_id", "key_id", "period", "limit_nano"), records=rows
        )


def _json(limits: Mapping[str, int] | None) -> str:
    return json.dumps(limits or {})
