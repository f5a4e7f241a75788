"""Owns how commands reach PostgreSQL: the one that is set, that runs in the data folder, or is started for them.

What is asked of it is left to the commands.
"""

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import asyncpg

from config.defaults import Settings
from config.embedded import (
    DataFolderInUse,
    EmbeddedNotRunning,
    EmbeddedStartFailed,
    embedded_urls,
    stores_for,
)
from config.postgres import migrate, open_pool
from gateway.cli.output import Refused, stderr
from gateway.cli.parsing import settings_of

Answer = TypeVar("Answer")
Work = Callable[["asyncpg.Pool[asyncpg.Record]", Settings], Awaitable[Answer]]


def with_database(args: argparse.Namespace, work: Work[Answer]) -> Answer:
    """Run `work(pool, settings)`; failures to reach or understand the database become `Refused`."""
    settings = settings_of(args)
    with database_of(settings) as url:
        return asyncio.run(_run(url, settings, work))


@contextmanager
def database_of(settings: Settings) -> Iterator[str]:
    """Address of the PostgreSQL that `settings` mean. One that is started for this is migrated first."""
    is_ours = not settings.database_url and not _runs(Path(settings.data_dir))
    if is_ours:
        stderr().print(f"starting the stores of {settings.data_dir} for this command", style="dim")
    try:
        with stores_for(settings) as (url, _):
            if is_ours:
                asyncio.run(migrate(url))
            yield url
    except (DataFolderInUse, EmbeddedStartFailed, EmbeddedNotRunning) as error:
        raise Refused(str(error)) from error


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what asyncpg and the network raise into a sentence with what to do; never shows the password."""
    place = place_of(url)
    try:
        yield
    except asyncpg.UndefinedTableError as error:
        raise Refused(f"the database at {place} has no tables yet: run `poolgate migrate` first") from error
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError) as error:
        raise Refused(f"PostgreSQL at {place} refused the login: correct DATABASE_URL") from error
    except asyncpg.InvalidCatalogNameError as error:
        raise Refused(f"{error} at {place}: create it (`createdb`), or correct DATABASE_URL") from error
    except (OSError, TimeoutError, asyncpg.CannotConnectNowError, asyncpg.TooManyConnectionsError) as error:
        said = str(error) or "no answer in time"
        raise Refused(
            f"PostgreSQL at {place} can't be reached ({said}): start it, or correct DATABASE_URL"
        ) from error


def place_of(url: str) -> str:
    """The host part of a database address, or the folder of its socket."""
    from urllib.parse import parse_qs, urlsplit

    parts = urlsplit(url)
    host = parse_qs(parts.query).get("host", [""])[0] or parts.netloc.rpartition("@")[2]
    return host or "the default socket"


async def _run(url: str, settings: Settings, work: Work[Answer]) -> Answer:
    with explained(url):
        pool = await open_pool(url, max_size=1, timeout_s=settings.database_timeout_s)
        try:
            return await work(pool, settings)
        finally:
            await pool.close()


def _runs(data_dir: Path) -> bool:
    try:
        embedded_urls(data_dir)
    except EmbeddedNotRunning:
        return False
    return True
