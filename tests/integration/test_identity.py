"""Accounts and keys on a real PostgreSQL, and how a process hears that a key is no longer good."""

# ruff: noqa: ASYNC110 (what other processes and the stores do can only be looked at again)

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import UUID

import asyncpg
import pytest
from redis.asyncio import Redis

from billing.ledger import Posting, post_turns
from billing.recalls import Recalled
from config.changes import ChangeFeed
from config.clock import SystemClock
from config.defaults import Settings
from config.ids import uuid7
from gateway.identity.accounts import (
    AccountExists,
    AccountStore,
    IdempotencyConflict,
    TooLittleAvailable,
    UnknownAccount,
    UnknownTimeZone,
)
from gateway.identity.keyring import InvalidKey, KeyRing, Principal
from gateway.identity.keys import KeyExists, KeyStore, UnknownKey
from tests.waiting import eventually

PEPPER = b"pepper-of-the-tests"
NEVER_S = 3600.0


@asynccontextmanager
async def process(
    pool: asyncpg.Pool, valkey: Redis | None, settings: Settings, keys: KeyStore | None = None
) -> AsyncIterator[KeyRing]:
    """The key ring of one gateway process, kept up to date by its change feed."""
    ring = KeyRing(keys or KeyStore(pool, PEPPER), PEPPER, settings, SystemClock())
    feed = ChangeFeed(pool, valkey, settings)
    feed.on("key", ring.forget_key)
    feed.on("account", ring.forget_account)
    task = asyncio.create_task(feed.run())
    try:
        while not feed.is_reading or (valkey is not None and not await is_heard(valkey)):
            await asyncio.sleep(0.001)
        yield ring
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def is_heard(valkey: Redis) -> bool:
    return bool((await valkey.pubsub_numsub("poolgate:changes"))[0][1])


async def forgotten(ring: KeyRing, secret: str) -> None:
    while ring.lookup(secret) is not None:
        await asyncio.sleep(0.001)


@pytest.fixture
def accounts(pool: asyncpg.Pool) -> AccountStore:
    return AccountStore(pool)


@pytest.fixture
def keys(pool: asyncpg.Pool) -> KeyStore:
    return KeyStore(pool, PEPPER)


async def test_an_account_is_found_by_name_and_by_id(accounts: AccountStore) -> None:
    made = await accounts.create("acme", email="a@acme.example", balance_nano=5, is_provider=True)
    assert await accounts.show("acme") == made
    assert await accounts.show(made.id) == made
    assert await accounts.list() == [made]
    assert (made.status, made.is_renter, made.is_admin, made.approval_status) == (
        "active", True, False, "approved",
    )  # fmt: skip


async def test_an_account_whose_name_is_a_number_is_found_by_it_before_another_by_its_id(
    accounts: AccountStore,
) -> None:
    first = await accounts.create("acme")
    named = await accounts.create(str(first.id))
    assert await accounts.show(str(first.id)) == named


async def test_top_ups_and_take_backs_move_the_balance_once_for_each_key(accounts: AccountStore) -> None:
    made = await accounts.create("acme", balance_nano=100)
    for _ in range(2):
        assert (await accounts.credit(made.id, 50, "order-1")).balance_nano == 150
    with pytest.raises(IdempotencyConflict, match="amount differs"):
        await accounts.credit(made.id, 51, "order-1")
    with pytest.raises(TooLittleAvailable):
        await accounts.credit(made.id, -151)
    assert (await accounts.credit(made.id, -150)).balance_nano == 0


async def test_balance_held_and_spent_add_up_while_a_process_has_part_of_the_wallet(
    pool: asyncpg.Pool, accounts: AccountStore
) -> None:
    account = await accounts.create("acme", balance_nano=1000)
    incarnation = await leased(pool, account.id, granted=400, free=150, held=100)
    shown = await accounts.show(account.id)
    assert (shown.balance_nano, shown.held_nano, shown.spent_nano) == (600 + 150, 100, 150)
    await post_turns(pool, incarnation, [Posting(uuid7(), account.id, None, 150, 0)], shard=0)
    await pool.execute(
        "insert into usage_days values ($1, '2026-03-01', 1, 'm', 2, 10, 0, 5, 150)", account.id
    )
    shown = await accounts.show(account.id)
    assert (shown.balance_nano, shown.held_nano, shown.spent_nano) == (600 + 150, 100, 150)
    assert (shown.turns, shown.prompt_tokens, shown.completion_tokens) == (2, 10, 5)
    assert await accounts.list() == [shown]


async def test_what_processes_have_leased_but_do_not_use_is_recalled_before_a_take_back_is_refused(
    pool: asyncpg.Pool, accounts: AccountStore
) -> None:
    account = await accounts.create("acme", balance_nano=1000)
    await leased(pool, account.id, granted=400, free=400, held=0)

    async def answer() -> None:
        await eventually(lambda: pool.fetchval("select true from changes where kind = 'recall'"))
        await pool.execute("update spend_leases set returned_nano = 400, free_nano = 0")
        await pool.execute("update ledger_accounts set leased_nano = 0 where kind = 'wallet'")

    credited, _ = await asyncio.gather(accounts.credit(account.id, -1000), answer())
    assert credited.balance_nano == 0


async def test_a_suspension_waits_for_what_is_free_and_tells_what_is_held(
    pool: asyncpg.Pool, accounts: AccountStore
) -> None:
    account = await accounts.create("acme", balance_nano=1000)
    await leased(pool, account.id, granted=400, free=300, held=100)
    _, left = await accounts.suspend(account.id, timeout_s=0)
    assert left == Recalled(free_nano=300, held_nano=100)  # the process does not answer
    suspending = asyncio.create_task(accounts.suspend(account.id, timeout_s=60))
    await pool.execute("update spend_leases set returned_nano = 300, free_nano = 0")
    suspended, left = await suspending
    assert (suspended.status, left) == ("suspended", Recalled(free_nano=0, held_nano=100))


async def leased(pool: asyncpg.Pool, account_id: int, *, granted: int, free: int, held: int) -> UUID:
    """A process has taken a part of the wallet and reported what of it is free and held."""
    incarnation = uuid7()
    await pool.execute(
        "insert into incarnations (id, host, pid, journal) values ($1, 'h', 1, 'j')", incarnation
    )
    await pool.execute(
        "insert into spend_leases (incarnation_id, account_id, granted_nano, free_nano, held_nano)"
        " values ($1, $2, $3, $4, $5)", incarnation, account_id, granted, free, held,
    )  # fmt: skip
    await pool.execute("update ledger_accounts set leased_nano = $1 where owner_id = $2", granted, account_id)
    return incarnation


async def test_a_time_zone_is_one_that_postgresql_knows(accounts: AccountStore) -> None:
    account = await accounts.create("acme")
    assert (await accounts.set_time_zone(account.id, "Asia/Riyadh")).time_zone == "Asia/Riyadh"
    with pytest.raises(UnknownTimeZone):
        await accounts.set_time_zone(account.id, "Asia/Atlantis")


async def test_a_name_is_taken_once(accounts: AccountStore) -> None:
    await accounts.create("acme")
    with pytest.raises(AccountExists, match="acme"):
        await accounts.create("acme")


async def test_what_is_not_there_is_said(accounts: AccountStore, keys: KeyStore) -> None:
    with pytest.raises(UnknownAccount):
        await accounts.show("nobody")
    with pytest.raises(UnknownAccount):
        await accounts.credit(99, 1)
    with pytest.raises(UnknownAccount):
        await keys.create(99, prefix="sk-")
    with pytest.raises(UnknownKey):
        await keys.revoke(99)


async def test_a_key_speaks_for_its_account(
    pool: asyncpg.Pool, settings: Settings, accounts: AccountStore, keys: KeyStore
) -> None:
    account = await accounts.create("acme")
    key, secret = await keys.create(account.id, prefix="sk-pg-", name="laptop", models=["m"])
    ring = KeyRing(keys, PEPPER, settings, SystemClock())
    assert await ring.load(secret) == Principal(
        key.id, account.id, "acme", frozenset({"inference"}), frozenset({"m"})
    )
    assert await keys.list(account.id) == await keys.list() == [key]
    assert (key.name, key.prefix, key.models) == ("laptop", secret[:12], ("m",))


async def test_a_secret_that_was_brought_along_works_once(accounts: AccountStore, keys: KeyStore) -> None:
    account = await accounts.create("acme")
    _, secret = await keys.create(account.id, prefix="sk-pg-", secret="my-own-secret")
    assert secret == "my-own-secret"
    with pytest.raises(KeyExists) as refused:
        await keys.create(account.id, prefix="sk-pg-", secret="my-own-secret")
    assert "my-own" not in str(refused.value)


async def test_no_secret_is_in_the_database(
    pool: asyncpg.Pool, accounts: AccountStore, keys: KeyStore
) -> None:
    account = await accounts.create("acme")
    _, secret = await keys.create(account.id, prefix="sk-pg-")
    rows = await pool.fetchval(
        "select (select api_keys::text from api_keys) || (select changes::text from changes)"
    )
    assert secret[12:] not in rows


@pytest.mark.parametrize("heard_by", ["polling alone", "a message alone"])
async def test_a_revoked_key_is_refused_by_every_process(
    pool: asyncpg.Pool, valkey: Redis, settings: Settings, accounts: AccountStore, heard_by: str
) -> None:
    poll_s = settings.change_poll_s if heard_by == "polling alone" else NEVER_S
    line = None if heard_by == "polling alone" else valkey
    settings = replace(settings, change_poll_s=poll_s)
    keys = KeyStore(pool, PEPPER, line)
    account = await accounts.create("acme")
    key, secret = await keys.create(account.id, prefix="sk-pg-")
    async with process(pool, line, settings) as one, process(pool, line, settings) as two:
        for ring in (one, two):
            await ring.load(secret)
        assert (await keys.revoke(key.id)).revoked_at is not None
        for ring in (one, two):
            await forgotten(ring, secret)
            with pytest.raises(InvalidKey):
                await ring.load(secret)


async def test_revoking_again_keeps_the_first_time(accounts: AccountStore, keys: KeyStore) -> None:
    account = await accounts.create("acme")
    key, _ = await keys.create(account.id, prefix="sk-pg-")
    assert await keys.revoke(key.id) == await keys.revoke(key.id)


async def test_a_new_key_works_though_it_was_refused_before(
    pool: asyncpg.Pool, settings: Settings, accounts: AccountStore, keys: KeyStore
) -> None:
    account = await accounts.create("acme")
    async with process(pool, None, settings) as ring:
        with pytest.raises(InvalidKey):
            await ring.load("early-bird")
        await keys.create(account.id, prefix="", secret="early-bird")
        while True:
            try:
                principal = await ring.load("early-bird")
                break
            except InvalidKey:
                await asyncio.sleep(0.001)
    assert principal.account_id == account.id


async def test_a_suspended_accounts_keys_are_refused_until_it_is_active_again(
    pool: asyncpg.Pool, settings: Settings, accounts: AccountStore, keys: KeyStore
) -> None:
    account = await accounts.create("acme")
    _, secret = await keys.create(account.id, prefix="sk-pg-")
    async with process(pool, None, settings) as ring:
        await ring.load(secret)
        await accounts.set_status(account.id, "suspended")
        await forgotten(ring, secret)
        with pytest.raises(InvalidKey):
            await ring.load(secret)
        await accounts.set_status(account.id, "active")
        while True:
            try:
                assert await ring.load(secret)
                break
            except InvalidKey:
                await asyncio.sleep(0.001)


class SlowAnswer(KeyStore):
    """Holds the first answer back on its way from PostgreSQL."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        super().__init__(pool, PEPPER)
        self.looked = asyncio.Event()
        self.gate = asyncio.Event()

    async def find(self, digest: bytes) -> Principal | None:
        principal = await super().find(digest)
        self.looked.set()
        await self.gate.wait()
        return principal


async def test_an_answer_that_is_older_than_the_revocation_does_not_revive_the_key(
    pool: asyncpg.Pool, settings: Settings, accounts: AccountStore, keys: KeyStore
) -> None:
    account = await accounts.create("acme")
    key, secret = await keys.create(account.id, prefix="sk-pg-")
    other, known = await keys.create(account.id, prefix="sk-pg-")
    slow = SlowAnswer(pool)
    async with process(pool, None, settings, slow) as ring:
        slow.gate.set()
        await ring.load(known)
        slow.gate.clear()
        slow.looked.clear()
        caller = asyncio.create_task(ring.load(secret))
        await slow.looked.wait()
        await keys.revoke(key.id)
        await keys.revoke(other.id)
        await forgotten(ring, known)  # so both revocations were delivered
        slow.gate.set()
        with pytest.raises(InvalidKey):
            await caller
        assert ring.lookup(secret) is None
