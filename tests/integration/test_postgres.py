"""The pool's time-outs and the migrations, against a real PostgreSQL."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from config.embedded import EmbeddedStores
from config.postgres import MigrationRefused, migrate, open_pool
from tests.conftest import TEST_TIMEOUT_S, database_named
from tests.waiting import eventually


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "0001_one.sql").write_text("create table one (n int); insert into one values (1);")
    (tmp_path / "0002_two.sql").write_text("create table two as select n + 1 as n from one;")
    return tmp_path


@pytest.fixture
def empty_url(stores: EmbeddedStores) -> Iterator[str]:
    """A database in which nothing was migrated."""

    async def execute(statement: str) -> None:
        connection = await asyncpg.connect(stores.database_url)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(execute("create database test_empty"))
    yield database_named(stores.database_url, "test_empty")
    asyncio.run(execute("drop database test_empty with (force)"))


async def fetch(url: str, query: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()


async def test_migrations_are_applied_once_in_order(empty_url: str, folder: Path):
    told: list[str] = []
    assert await migrate(empty_url, told.append, folders=(folder,)) == ["0001_one", "0002_two"]
    assert told == ["applying 0001_one", "applying 0002_two"]
    assert await migrate(empty_url, folders=(folder,)) == []
    assert [row["n"] for row in await fetch(empty_url, "select n from two")] == [2]


async def test_migrations_at_the_same_time_are_applied_once(empty_url: str, folder: Path):
    (folder / "0003_slow.sql").write_text("select pg_sleep(0.1); insert into one values (2);")
    done = await asyncio.gather(*(migrate(empty_url, folders=(folder,)) for _ in range(5)))
    assert sorted(done) == [[], [], [], [], ["0001_one", "0002_two", "0003_slow"]]
    assert len(await fetch(empty_url, "select n from one")) == 2


async def test_a_migration_that_fails_leaves_nothing_and_can_be_mended(empty_url: str, folder: Path):
    broken = folder / "0003_broken.sql"
    broken.write_text("create table three (n int); select 1/0;")
    with pytest.raises(asyncpg.DivisionByZeroError) as failed:
        await migrate(empty_url, folders=(folder,))
    assert "0003_broken" in failed.value.__notes__[0]
    assert (await fetch(empty_url, "select to_regclass('three') as found"))[0]["found"] is None
    broken.write_text("create table three (n int);")
    assert await migrate(empty_url, folders=(folder,)) == ["0003_broken"]


async def test_a_changed_migration_is_refused_and_nothing_is_applied(empty_url: str, folder: Path):
    await migrate(empty_url, folders=(folder,))
    (folder / "0001_one.sql").write_text("create table other (n int);")
    (folder / "0003_three.sql").write_text("create table three (n int);")
    with pytest.raises(MigrationRefused, match="0001_one was changed"):
        await migrate(empty_url, folders=(folder,))
    assert (await fetch(empty_url, "select to_regclass('three') as found"))[0]["found"] is None


async def test_the_schema_of_the_package_is_in_the_test_database(pool: asyncpg.Pool):
    assert await pool.fetchval("select count(*) from schema_migrations") > 0


async def test_a_statement_that_takes_too_long_is_ended_by_the_server(database_url: str):
    async with await open_pool(database_url, max_size=1, timeout_s=0.2) as pool:
        with pytest.raises(asyncpg.QueryCanceledError):
            await pool.execute("select pg_sleep(60)")
        assert await pool.fetchval("select 1") == 1


async def test_a_server_that_hangs_does_not_hold_the_client(private_stores: EmbeddedStores):
    async with await open_pool(private_stores.database_url, max_size=1, timeout_s=0.2) as pool:
        backend = psutil.Process(await pool.fetchval("select pg_backend_pid()"))
        backend.suspend()
        with pytest.raises(TimeoutError):
            await pool.execute("select 1")
        backend.resume()


async def test_connections_say_who_they_are(pool: asyncpg.Pool):
    assert await pool.fetchval("show application_name") == "poolgate"
    assert await pool.fetchval("show statement_timeout") == f"{TEST_TIMEOUT_S:g}s"


async def test_an_abandoned_transaction_gives_its_locks_back(database_url: str):
    async def is_free() -> bool:
        held = await fetch(
            database_url, "select 1 from pg_stat_activity where state like 'idle in transaction%'"
        )
        return not held

    async with await open_pool(database_url, max_size=1, timeout_s=0.1) as pool, pool.acquire() as connection:
        await connection.execute("begin")
        assert not await is_free()
        await eventually(is_free)


async def test_an_unreachable_server_is_said_by_the_first_statement(tmp_path: Path):
    async with await open_pool(
        f"postgresql:///postgres?host={tmp_path}&user=x", max_size=1, timeout_s=1
    ) as pool:
        with pytest.raises(OSError, match="No such file"):
            await pool.execute("select 1")
