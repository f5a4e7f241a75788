"""What tests of the book need: accounts with money, processes with leases, and turns that were used and posted."""

import datetime as dt
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from billing.ledger import AccountRef, Ledger, Posting, Result, Transfer, post_turns, share_nano
from config.ids import uuid7

TODAY = dt.datetime.now(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)


async def account(pool: asyncpg.Pool, funds_nano: int = 0) -> int:
    account_id: int = await pool.fetchval(
        "insert into accounts (name) values ($1) returning id", str(uuid4())
    )
    if funds_nano:
        (result,) = await apply(pool, topup(account_id, funds_nano))
        assert result.status == "done"
    return account_id


def topup(account_id: int, amount_nano: int, **of: Any) -> Transfer:
    clearing, wallet = AccountRef.platform("clearing"), AccountRef.wallet(account_id)
    return Transfer(uuid7(), clearing, wallet, amount_nano, "topup", **of)


def spending(account_id: int, amount_nano: int, **of: Any) -> Transfer:
    return Transfer(
        uuid7(), AccountRef.wallet(account_id), AccountRef.platform("fee"), amount_nano, "job", **of
    )


def resolving(pending: UUID, phase: Any, amount_nano: int = 0, **of: Any) -> Transfer:
    return Transfer(uuid7(), None, None, amount_nano, "", phase, pending, **of)


async def apply(pool: asyncpg.Pool, *transfers: Transfer, shard: int = 0) -> list[Result]:
    async with pool.acquire() as connection, connection.transaction():
        return await Ledger(shard).apply(connection, transfers)


async def available(pool: asyncpg.Pool, account_id: int) -> int:
    found: int = await pool.fetchval(
        "select credit_nano - debit_nano - pending_debit_nano - leased_nano from ledger_accounts"
        " where kind = 'wallet' and owner_id = $1",
        account_id,
    )
    return found


async def incarnation(pool: asyncpg.Pool, state: str = "live") -> UUID:
    made = uuid7()
    await pool.execute(
        "insert into incarnations (id, host, pid, journal, state) values ($1, 'host', 1, '/journal', $2)",
        made,
        state,
    )
    return made


async def lease(pool: asyncpg.Pool, incarnation_id: UUID, account_id: int, amount_nano: int) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "update ledger_accounts set leased_nano = leased_nano + $2 where kind = 'wallet' and owner_id = $1",
            account_id,
            amount_nano,
        )
        await connection.execute(
            "insert into spend_leases (incarnation_id, account_id, granted_nano) values ($1, $2, $3)"
            " on conflict (incarnation_id, account_id) do update set granted_nano ="
            " spend_leases.granted_nano + excluded.granted_nano",
            incarnation_id,
            account_id,
            amount_nano,
        )


async def use(
    pool: asyncpg.Pool,
    incarnation_id: UUID,
    account_id: int,
    amounts: list[int],
    *,
    provider_id: int | None = None,
    started_at: dt.datetime = TODAY,
) -> UUID:
    """Turns of these amounts in the usage table and its rollups, and their posting, which is returned."""
    posting_id, total = uuid7(), sum(amounts)
    share = 0 if provider_id is None else share_nano(total, 7500, "down")
    async with pool.acquire() as connection, connection.transaction():
        await connection.executemany(
            "insert into usage (turn_id, account_id, key_id, started_at, surface, model, stream, outcome, status,"
            " prompt_tokens, cached_tokens, completion_tokens, estimated, duration_ms, amount_nano, price_ref,"
            " posting_id, provider_id)"
            " values ($1, $2, 1, $3, 'chat', 'm', false, 'finished', 200, 10, 0, 5, false, 1, $4, 'p', $5, $6)",
            [(uuid7(), account_id, started_at, amount, posting_id, provider_id) for amount in amounts],
        )
        for table, since in (("hours", started_at.replace(minute=0)), ("days", started_at.date())):
            column = table.removesuffix("s")
            await connection.execute(
                f"insert into usage_{table} values ($1, $2, 1, 'm', $3, $4, 0, $5, $6)"
                f" on conflict (account_id, {column}, key_id, model) do update set"
                f" turns = usage_{table}.turns + excluded.turns,"
                f" prompt_tokens = usage_{table}.prompt_tokens + excluded.prompt_tokens,"
                f" completion_tokens = usage_{table}.completion_tokens + excluded.completion_tokens,"
                f" amount_nano = usage_{table}.amount_nano + excluded.amount_nano",
                account_id, since, len(amounts), 10 * len(amounts), 5 * len(amounts), total,
            )  # fmt: skip
        posting = Posting(posting_id, account_id, provider_id, total, share)
        await post_turns(connection, incarnation_id, [posting], shard=0)
    return posting_id
