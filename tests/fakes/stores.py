"""Stores that fail as real ones do: frozen with every process of theirs, or killed; and settings that use them."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import psutil

from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.postgres import migrate, open_pool
from tests.waiting import is_gone, wait_until


@contextmanager
def frozen(stores: EmbeddedStores, name: str) -> Iterator[None]:
    """SIGSTOP: connections stay open and nothing answers. A server's children are stopped too."""
    processes = _tree(stores, name)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            if process.is_running():
                process.send_signal(signal.SIGCONT)


def kill(stores: EmbeddedStores, name: str) -> None:
    """SIGKILL, and wait until it is gone; `stores.restart(name)` brings it back."""
    pid = stores.pids[name]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_gone(pid))
    wait_until(lambda: name in stores.poll())


@asynccontextmanager
async def using(
    stores: EmbeddedStores, settings: Settings, **changes: Any
) -> AsyncIterator[tuple[Settings, asyncpg.Pool]]:
    """Settings over `stores`, which are migrated here, with short time-outs; and a pool of the test's own."""
    await migrate(stores.database_url)
    changed = replace(
        settings,
        database_url=stores.database_url,
        redis_url=stores.redis_url,
        **{"database_timeout_s": 0.5, "valkey_timeout_s": 0.25} | changes,
    )
    pool = await open_pool(changed.database_url, max_size=2, timeout_s=10)
    try:
        yield changed, pool
    finally:
        pool.terminate()


def _tree(stores: EmbeddedStores, name: str) -> list[psutil.Process]:
    top = psutil.Process(stores.pids[name])
    return [top, *top.children(recursive=True)]
