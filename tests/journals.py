"""Journals over a book with money in it: wallets that are leased to an incarnation, and turns that spend from them."""

import socket
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from billing.journal import Journal
from billing.usage import UsageRecord
from config.defaults import Settings
from config.ids import hex7, uuid7

NOW = time.time()


def turn(**changes: Any) -> UsageRecord:
    """A turn of account 1 that cost 100."""
    record = UsageRecord(
        turn_id=hex7(), account_id=1, key_id=1, started_at=NOW, surface="openai", model="m", node_id="n",
        engine_id="e", stream=True, outcome="finished", status=200, prompt_tokens=10, cached_tokens=4,
        completion_tokens=5, estimated=False, ttft_ms=12, duration_ms=80, amount_nano=100, price_ref="m@start",
    )  # fmt: skip
    return record._replace(**changes)


async def open_accounts(pool: asyncpg.Pool, count: int, *, balance_nano: int) -> None:
    """Accounts 1..count, each with a key of the same id and so much in its wallet."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "insert into accounts (name) select 'a' || n from generate_series(1, $1) n", count
        )
        await connection.execute(
            "insert into api_keys (account_id, name, digest, prefix)"
            " select n, 'laptop', sha256(n::text::bytea), 'sk-pg-' from generate_series(1, $1) n",
            count,
        )
        await connection.execute(
            "with paid as (insert into transfers (id, debit_id, credit_id, amount_nano, kind)"
            "  select gen_random_uuid(), (select id from ledger_accounts where kind = 'clearing' limit 1), w.id, $1, 'topup'"
            "  from ledger_accounts w where w.kind = 'wallet' returning amount_nano),"
            " credited as (update ledger_accounts set credit_nano = credit_nano + $1 where kind = 'wallet')"
            " update ledger_accounts set debit_nano = debit_nano + (select sum(amount_nano) from paid)"
            " where kind = 'clearing' and shard = 0",
            balance_nano,
        )


async def incarnate(pool: asyncpg.Pool, folder: Path, *, lease_nano: int = 0) -> UUID:
    """A live incarnation, with a lease of so much of every wallet."""
    made = uuid7()
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "insert into incarnations (id, host, pid, journal) values ($1, $2, 1, $3)",
            made, socket.gethostname(), str(folder),
        )  # fmt: skip
        if lease_nano:
            await connection.execute(
                "insert into spend_leases (incarnation_id, account_id, granted_nano)"
                " select $1, owner_id, $2 from ledger_accounts where kind = 'wallet'",
                made,
                lease_nano,
            )
            await connection.execute(
                "update ledger_accounts set leased_nano = leased_nano + $1 where kind = 'wallet'", lease_nano
            )
    return made


async def journal_of(
    pool: asyncpg.Pool, settings: Settings, root: Path, *records: UsageRecord, lease_nano: int = 100_000
) -> Journal:
    """The journal of a new incarnation with a lease of every wallet, with these records in it."""
    journal = Journal.open(root, await incarnate(pool, root, lease_nano=lease_nano), settings)
    for record in records:
        journal.append(record)
    return journal


async def balances(pool: asyncpg.Pool) -> list[int]:
    """What the wallets have, leased or not."""
    return [
        row[0]
        for row in await pool.fetch(
            "select credit_nano - debit_nano from ledger_accounts where kind = 'wallet' order by owner_id"
        )
    ]


async def of_platform(pool: asyncpg.Pool, kind: str) -> int:
    """What the accounts of one kind have together."""
    found: int = await pool.fetchval(
        "select coalesce(sum(credit_nano - debit_nano), 0)::bigint from ledger_accounts where kind = $1", kind
    )
    return found


async def turns(pool: asyncpg.Pool) -> int:
    found: int = await pool.fetchval("select count(*) from usage")
    return found


async def ship_everything(
    pool: asyncpg.Pool, settings: Settings, root: Path, *records: UsageRecord, lease_nano: int = 100_000
) -> None:
    """These turns, through a journal into the book."""
    from billing.shipper import Shipper

    journal = await journal_of(pool, settings, root, *records, lease_nano=lease_nano)
    await Shipper(pool, settings, journal).ship_all()
    journal.remove()
