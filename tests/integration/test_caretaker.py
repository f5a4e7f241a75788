"""The caretaker's chores over a real PostgreSQL: done by one process for all, taken over, and patient after an absence."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime

import asyncpg
import pytest

from config.defaults import Settings
from config.postgres import open_pool
from gateway import caretaker
from gateway.caretaker import LOCK, Caretaker
from gateway.identity.accounts import AccountStore
from nodes.heartbeats import NodeStore
from nodes.protocol import Heartbeat
from tests.fakes.stores import frozen, kill, using
from tests.waiting import eventually

GRACE_S = 0.6


@pytest.fixture
def quick(settings) -> Settings:
    return replace(settings, heartbeat_grace_s=GRACE_S, database_timeout_s=1.0)


@asynccontextmanager
async def caretaking(settings: Settings) -> AsyncIterator["asyncio.Task[None]"]:
    """One gateway process's caretaker, with pools of its own."""
    async with (
        await open_pool(settings.database_url, max_size=1, timeout_s=settings.database_timeout_s) as watch,
        await open_pool(settings.database_url, max_size=1, timeout_s=settings.database_timeout_s) as pool,
    ):
        task = asyncio.create_task(Caretaker(watch, pool, settings).run())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])
            watch.terminate()
            pool.terminate()


async def a_node(pool: asyncpg.Pool, *, silent_s: float = 0.0) -> str:
    account = await AccountStore(pool).create(f"provider-{uuid.uuid4()}", is_provider=True)
    node_id = str(uuid.uuid4())
    await NodeStore(pool).record(account.id, Heartbeat(api_key="-", node_id=node_id), ())
    if silent_s:
        await pool.execute(
            "update nodes set last_heartbeat_at = clock_timestamp() - make_interval(secs => $1)", silent_s
        )
    return node_id


def state_is(pool: asyncpg.Pool, state: str) -> Callable[[], object]:
    async def is_so() -> bool:
        return await pool.fetchval("select bool_and(state = $1) from nodes", state) is True

    return is_so


async def holders(pool: asyncpg.Pool) -> int:
    """Sessions that hold the caretaker's lock in this database."""
    found: int = await pool.fetchval(
        "select count(*) from pg_locks l join pg_database d on d.oid = l.database"
        " where l.locktype = 'advisory' and l.granted and d.datname = current_database()"
        " and (l.classid::bigint << 32 | l.objid::bigint) = $1",
        LOCK,
    )
    return found


def one_holds(pool: asyncpg.Pool) -> Callable[[], object]:
    async def is_so() -> bool:
        return await holders(pool) == 1

    return is_so


async def test_a_silent_node_goes_offline_and_that_is_told(quick, pool, caplog):
    silent = await a_node(pool)
    async with caretaking(quick):
        await eventually(state_is(pool, "offline"))
        await eventually(
            lambda: "node_expired" in [record.__dict__.get("action") for record in caplog.records]
        )
        told = [record.node for record in caplog.records if record.__dict__.get("action") == "node_expired"]
    assert told == [silent]


async def test_a_caretaker_that_just_started_lets_nodes_report_first(quick, pool, monkeypatch):
    """However long ago the last heartbeat was: nobody may have been there to take the next ones."""
    await a_node(pool, silent_s=3600)
    calls: list[float] = []
    began_s = asyncio.get_running_loop().time()
    expire = NodeStore.expire

    async def noted(store: NodeStore, before: datetime) -> list[str]:
        calls.append(asyncio.get_running_loop().time() - began_s)
        return await expire(store, before)

    monkeypatch.setattr(NodeStore, "expire", noted)
    async with caretaking(quick):
        await eventually(state_is(pool, "offline"))
    assert calls[0] >= GRACE_S


async def test_one_process_is_the_caretaker_and_another_takes_over(quick, pool):
    async with caretaking(quick) as first:
        await eventually(one_holds(pool))
        async with caretaking(quick):
            await asyncio.sleep(GRACE_S)
            assert await holders(pool) == 1
            first.cancel()
            await asyncio.wait([first])
            await eventually(one_holds(pool))
            await a_node(pool)
            await eventually(state_is(pool, "offline"))


async def test_one_whose_connection_was_cut_is_replaced(quick, pool):
    async with caretaking(quick), caretaking(quick):
        await eventually(one_holds(pool))
        pid = await pool.fetchval("select pid from pg_locks where locktype = 'advisory' and granted")
        await pool.execute("select pg_terminate_backend($1)", pid)
        await eventually(one_holds(pool))
        await a_node(pool)
        await eventually(state_is(pool, "offline"))


async def test_it_leaves_no_lock_behind(quick, pool):
    async with caretaking(quick):
        await eventually(one_holds(pool))
    assert await holders(pool) == 0


async def test_partitions_are_made_and_old_changes_trimmed_by_the_caretaker(quick, pool):
    await pool.execute(
        "insert into changes (kind, entity, at) values ('key', 'old', now() - interval '2 days')"
    )
    async with caretaking(quick):

        async def is_done() -> bool:
            old = await pool.fetchval("select count(*) from changes where entity = 'old'")
            days = await pool.fetchval("select count(*) from pg_inherits where inhparent = 'usage'::regclass")
            return bool(old == 0 and days > 5)

        await eventually(is_done)


async def test_a_chore_that_fails_is_tried_again_and_ends_nothing(quick, pool, monkeypatch):
    tries: list[int] = []

    async def failing(*_: object) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise asyncpg.LockNotAvailableError("a long report holds it")

    monkeypatch.setattr(caretaker, "keep_partitions", failing)
    monkeypatch.setattr(caretaker, "RETRY_S", 0.05)
    await a_node(pool)
    async with caretaking(quick):
        await eventually(lambda: len(tries) >= 3)
        await eventually(state_is(pool, "offline"))


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_after_an_absence_of_postgres_nodes_get_their_grace_before_anyone_is_thrown_out(
    quick, private_stores, how
):
    async with (
        using(private_stores, quick, database_timeout_s=0.3, heartbeat_grace_s=1.5) as (own, _),
        caretaking(own),
    ):
        own_pool = await open_pool(own.database_url, max_size=1, timeout_s=10)
        await eventually(one_holds(own_pool))
        await a_node(own_pool)
        await own_pool.execute("checkpoint")
        own_pool.terminate()
        if how == "frozen":
            with frozen(private_stores, "postgres"):
                await asyncio.sleep(own.heartbeat_grace_s * 1.5)
        else:
            kill(private_stores, "postgres")
            await asyncio.sleep(own.heartbeat_grace_s * 1.5)
            private_stores.restart("postgres")
        back_s = asyncio.get_running_loop().time()
        again = await open_pool(own.database_url, max_size=1, timeout_s=10)
        try:
            await eventually(state_is(again, "offline"))
        finally:
            again.terminate()
        assert asyncio.get_running_loop().time() - back_s > own.heartbeat_grace_s * 0.9
