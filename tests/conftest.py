"""Fixtures of every test: PostgreSQL and Valkey started once a run, in them a fresh database for each."""

import asyncio
import gc
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
import uvloop
from redis.asyncio import Redis

from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.postgres import migrate, open_pool
from config.settings import load_settings
from config.valkey import open_valkey
from tests.fakes.clock import FakeClock

# A test database is thrown away: it need not survive a power cut.
FAST_POSTGRES = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
TEMPLATE = "poolgate_template"
# Long enough that a loaded machine doesn't fail a test that is not about time.
TEST_TIMEOUT_S = 10.0

_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "root: proves what only root can do, and is left out for others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Becoming another user takes root: elsewhere those tests are deselected, and pytest says how many."""
    if os.geteuid() != 0:
        left_out = [item for item in items if item.get_closest_marker("root")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("root")]


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the event loop that the gateway runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True, scope="module")
def garbage() -> Iterator[None]:
    """What a module's tests left open is told there, not amid another's when a collection happens to come."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def stores() -> Iterator[EmbeddedStores]:
    """The stores of the whole run; tests that stop or kill stores take `private_stores`."""
    folder = Path(tempfile.mkdtemp(prefix="poolgate-test-"))
    try:
        with EmbeddedStores.start(folder, postgres_options=FAST_POSTGRES) as running:
            yield running
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def private_stores(tmp_path: Path) -> Iterator[EmbeddedStores]:
    """Stores of this test alone, to be killed or stopped at will. Nothing is migrated."""
    with EmbeddedStores.start(tmp_path / "private", postgres_options=FAST_POSTGRES) as running:
        yield running


@pytest.fixture(scope="session")
def migrated_template(stores: EmbeddedStores) -> str:
    """The name of a database with the whole schema, which others are copied from."""
    _run(_admin(stores.database_url, f"create database {TEMPLATE}"))
    _run(migrate(database_named(stores.database_url, TEMPLATE)))
    return TEMPLATE


@pytest.fixture
def database_url(stores: EmbeddedStores, migrated_template: str) -> Iterator[str]:
    """The address of a fresh, migrated database; dropped afterwards, whoever is still connected."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    _run(
        _admin(stores.database_url, f"create database {name} template {migrated_template} strategy file_copy")
    )
    yield database_named(stores.database_url, name)
    _run(_admin(stores.database_url, f"drop database {name} with (force)"))


@pytest.fixture
def redis_url(stores: EmbeddedStores) -> str:
    """The address of an empty Valkey database."""
    _run(_flush(stores.redis_url))
    return stores.redis_url


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[asyncpg.Pool]:
    """Connections to the fresh database."""
    async with await open_pool(database_url, max_size=8, timeout_s=TEST_TIMEOUT_S) as opened:
        yield opened


@pytest.fixture
async def valkey(redis_url: str) -> AsyncIterator[Redis]:
    """A client of the empty Valkey."""
    async with open_valkey(redis_url, timeout_s=TEST_TIMEOUT_S) as opened:
        yield opened


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Settings over this test's stores, with short intervals; `dataclasses.replace` changes one."""
    return load_settings(
        environ={}, database_url=database_url, redis_url=redis_url, data_dir=str(tmp_path / "data"),
        key_pepper="pepper-of-the-tests", valkey_timeout_s=TEST_TIMEOUT_S, change_poll_s=0.05,
        usage_flush_s=0.02,
        load_share_s=0.02, health_interval_s=0.1, heartbeat_interval_s=0.2, heartbeat_grace_s=60.0,
        breaker_open_s=0.05, engine_poll_s=0.05, engine_restart_s=0.05, connect_timeout_s=TEST_TIMEOUT_S,
        shutdown_grace_s=5.0, drain_idle_s=0.1, heartbeat_requests_minute=100_000, api_requests_minute=100_000,
        marketplace_requests_minute=100_000, node_networks="127.0.0.0/8,::1/128",
    )  # fmt: skip


@pytest.fixture
def clock() -> FakeClock:
    """Time that stands still."""
    return FakeClock()


def database_named(url: str, name: str) -> str:
    """The same server's address, for another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}")).replace("postgresql:/", "postgresql:///", 1)


def _run(work: Coroutine[None, None, object]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


async def _admin(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def _flush(url: str) -> None:
    async with open_valkey(url, timeout_s=TEST_TIMEOUT_S) as valkey:
        await valkey.flushdb()
