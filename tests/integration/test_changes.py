"""The change log on a real PostgreSQL and Valkey: what is written, and that each change is delivered, once."""

# ruff: noqa: ASYNC110 (what other processes and the stores do can only be looked at again)

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import asyncpg
import pytest
from redis.asyncio import Redis

from config import changes
from config.changes import EVERYTHING, ChangeFeed, announce, trim_changes, wake_feeds
from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.postgres import migrate, open_pool
from config.valkey import open_valkey

Heard = asyncio.Queue[tuple[str, str]]
NEVER_S = 3600.0


@asynccontextmanager
async def running(feed: ChangeFeed) -> AsyncIterator[Heard]:
    """A feed that polls; what it delivered, after the first EVERYTHING of each kind."""
    heard: Heard = asyncio.Queue()
    for kind in ("key", "account", "node"):
        feed.on(kind, lambda entity, kind=kind: heard.put_nowait((kind, entity)))  # type: ignore[misc]
    task = asyncio.create_task(feed.run())
    try:
        for kind in ("key", "account", "node"):
            assert await heard.get() == (kind, EVERYTHING)
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def mark(pool: asyncpg.Pool, heard: Heard) -> list[tuple[str, str]]:
    """What was delivered up to now: everything before a change that is made now."""
    await announce(pool, "node", "mark")
    found = []
    while (change := await heard.get()) != ("node", "mark"):
        found.append(change)
    return found


async def logged(pool: asyncpg.Pool, statement: str) -> list[tuple[str, str]]:
    await pool.execute("delete from changes")
    await pool.execute(statement)
    return [tuple(row) for row in await pool.fetch("select kind, entity from changes order by id")]


KEY = ("key", "ab" * 32)
NODE = ("node", "00000000-0000-0000-0000-000000000001")


@pytest.fixture
async def rows(pool: asyncpg.Pool) -> None:
    await pool.execute("insert into accounts (name, is_provider) values ('a', true)")
    await pool.execute(
        f"insert into api_keys (account_id, digest, prefix) values (1, '\\x{KEY[1]}', 'sk'),"
        f" (1, '\\x{'cd' * 32}', 'sk')"
    )
    await pool.execute(f"insert into nodes (id, account_id) values ('{NODE[1]}', 1)")
    await pool.execute(
        f"insert into engines (node_id, engine_id, url, state) values ('{NODE[1]}', 'e', 'http://x', 'ready')"
    )


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("update api_keys set revoked_at = now() where id = 1", [KEY]),
        ("update api_keys set models = '{m}' where id = 1", [KEY]),
        ("update api_keys set scopes = '{}' where id = 1", [KEY]),
        ("delete from api_keys where id = 1", [KEY]),
        ("update api_keys set last_used_at = now()", []),
        ("insert into accounts (name) values ('b')", []),
        ("update accounts set status = 'suspended'", [("account", "1")]),
        ("update accounts set approval_status = 'pending'", [("account", "1")]),
        ("update accounts set time_zone = 'Asia/Riyadh'", [("account", "1")]),
        ("update accounts set limits = '{\"concurrency\": 1}'", [("account", "1")]),
        ("insert into tiers (name) values ('t')", []),
        (
            "insert into tiers (name) values ('t'); update tiers set limits = '{\"concurrency\": 1}'",
            [("account", "*")],
        ),
        ("update api_keys set limits = '{\"concurrency\": 1}' where id = 1", [KEY]),
        ("update ledger_accounts set credit_nano = 10 where kind = 'wallet'", [("wallet", "1")]),
        ("update ledger_accounts set debit_nano = 0, leased_nano = 0", []),
        (
            "insert into budgets (account_id, period, limit_nano) values (1, 'day', 10)",
            [("budget", "1"), ("account", "1")],
        ),
        ("update nodes set last_heartbeat_at = now(), gpu_status = '{\"t\": 1}', agent_version = '2'", []),
        ("update nodes set state = 'online'", [NODE, ("node_command", NODE[1])]),
        ("update nodes set epoch = epoch + 1", [NODE]),
        ("update nodes set cached_models = '{m}'", [NODE]),
        ("update engines set updated_at = now(), restarts = 3", []),
        ("update engines set state = 'draining'", [NODE]),
        ('update engines set models = \'[{"id": "m"}]\'', [NODE]),
        ("delete from engines", [NODE]),
    ],
)
async def test_rows_that_processes_must_hear_of_are_logged_and_no_others(
    pool: asyncpg.Pool, statement: str, expected: list[tuple[str, str]]
) -> None:
    assert await logged(pool, statement) == expected


async def test_polling_alone_delivers_each_change_once(pool: asyncpg.Pool, settings: Settings) -> None:
    async with running(ChangeFeed(pool, None, settings)) as heard:
        await announce(pool, "key", "aa")
        await announce(pool, "account", "7")
        assert await mark(pool, heard) == [("key", "aa"), ("account", "7")]
        assert await mark(pool, heard) == []
        assert await mark(pool, heard) == []


async def test_a_message_brings_the_poll_forward(
    pool: asyncpg.Pool, valkey: Redis, settings: Settings
) -> None:
    feed = ChangeFeed(pool, valkey, replace(settings, change_poll_s=NEVER_S))
    async with running(feed) as heard:
        while not (await valkey.pubsub_numsub(changes.CHANNEL))[0][1]:
            await asyncio.sleep(0)
        await announce(pool, "key", "aa")
        await wake_feeds(valkey)
        assert await heard.get() == ("key", "aa")


async def test_a_change_that_commits_after_a_later_one_was_delivered_is_not_missed(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    async with running(ChangeFeed(pool, None, settings)) as heard:
        async with pool.acquire() as connection:
            slow = connection.transaction()
            await slow.start()
            await announce(connection, "key", "slow")
            await announce(pool, "key", "fast")
            assert await mark(pool, heard) == [("key", "fast")]
            assert await mark(pool, heard) == []  # nothing comes again while the slow one holds the log open
            await slow.commit()
        assert await mark(pool, heard) == [("key", "slow")]


async def test_a_change_that_was_rolled_back_is_not_delivered(pool: asyncpg.Pool, settings: Settings) -> None:
    async with running(ChangeFeed(pool, None, settings)) as heard:
        async with pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await announce(connection, "key", "never")
            await transaction.rollback()
        assert await mark(pool, heard) == []


async def test_too_many_changes_become_everything_once(
    pool: asyncpg.Pool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "CHANGES_READ_MAX", 3)
    async with running(ChangeFeed(pool, None, settings)) as heard:
        await pool.execute("insert into changes (kind, entity) select 'key', n from generate_series(1, 9) n")
        assert {await heard.get() for _ in range(3)} == {(k, EVERYTHING) for k in ("key", "account", "node")}
        assert await mark(pool, heard) == []


async def test_another_database_behind_the_address_means_that_anything_may_have_changed(
    pool: asyncpg.Pool, settings: Settings
) -> None:
    feed = ChangeFeed(pool, None, settings)
    async with running(feed) as heard:
        feed._snapshot = f"{10**12}:{10**12}:"
        assert await heard.get() == ("key", EVERYTHING)


async def test_a_subscriber_that_fails_takes_no_other_along(
    pool: asyncpg.Pool, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    feed = ChangeFeed(pool, None, settings)

    def fail(entity: str) -> None:
        if entity == "aa":
            raise KeyError(entity)

    feed.on("key", fail)
    async with running(feed) as heard:
        await announce(pool, "key", "aa")
        assert await mark(pool, heard) == [("key", "aa")]
    assert [record.action for record in caplog.records] == ["change_lost"]  # type: ignore[attr-defined]


async def until(condition: Callable[[], Awaitable[bool] | bool]) -> None:
    while True:
        met = condition()
        if met if isinstance(met, bool) else await met:
            return
        await asyncio.sleep(0.005)


async def test_postgresql_may_leave_and_come_back_and_is_said_to_once_each(
    private_stores: EmbeddedStores, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "poolgate")
    await migrate(private_stores.database_url)
    async with await open_pool(private_stores.database_url, max_size=4, timeout_s=10) as pool:
        feed = ChangeFeed(pool, None, settings)
        async with running(feed) as heard:
            assert feed.is_reading
            os.kill(private_stores.pids["postgres"], signal.SIGINT)
            await until(lambda: not feed.is_reading)
            await until(lambda: private_stores.poll() == ["postgres"])
            for _ in range(3):  # fails again, which is not said again
                await feed._poll_safely()
            private_stores.restart("postgres")
            await until(lambda: feed.is_reading)
            await announce(pool, "key", "aa")
            assert await heard.get() == ("key", "aa")
    actions = [record.action for record in caplog.records if record.name == "poolgate.changes"]  # type: ignore[attr-defined]
    assert actions == ["changes_unreadable", "changes_readable"]


async def test_valkey_may_leave_and_come_back_and_changes_are_delivered_throughout(
    pool: asyncpg.Pool,
    private_stores: EmbeddedStores,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_valkey(private_stores.redis_url, timeout_s=10) as valkey:

        async def is_heard() -> bool:
            return bool((await valkey.pubsub_numsub(changes.CHANNEL))[0][1])

        async with running(ChangeFeed(pool, valkey, settings)) as heard:
            await until(is_heard)
            os.kill(private_stores.pids["valkey"], signal.SIGKILL)
            await until(lambda: private_stores.poll() == ["valkey"])
            await wake_feeds(valkey)  # fails, and nobody minds
            await announce(pool, "key", "aa")
            assert await heard.get() == ("key", "aa")
            await until(lambda: "changes_unheard" in [getattr(r, "action", "") for r in caplog.records])
            private_stores.restart("valkey")
            await until(is_heard)
    actions = [record.action for record in caplog.records if record.levelname == "WARNING"]  # type: ignore[attr-defined]
    assert actions == ["changes_unheard"]


async def test_old_changes_are_deleted_and_young_ones_kept(pool: asyncpg.Pool) -> None:
    await pool.execute(
        "insert into changes (kind, entity, at) values ('key', 'old', now() - interval '2 days')"
    )
    await announce(pool, "key", "young")
    assert await trim_changes(pool) == 1
    assert await pool.fetchval("select entity from changes") == "young"
