"""Owns connections to PostgreSQL and the migrations of its schema: plain SQL files, in order, forward only.

What the tables mean is left to whoever wrote `sql/NNNN_name.sql`; where PostgreSQL comes from, to `embedded`.
"""

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg

AWAY = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
"""What a statement raises when PostgreSQL is gone, going or frozen. asyncpg calls a connection that dies amid one an
internal error of its own."""

Row: TypeAlias = asyncpg.Record | Mapping[str, Any]
"""Columns by name: of a query, or made by hand."""

_ROOT = Path(__file__).parents[1]
SQL_FOLDERS = (_ROOT / "config" / "sql", _ROOT / "billing" / "sql")
"""Each package keeps the files of its own tables; the numbers run through all of them."""
APPLICATION_NAME = "poolgate"

# The server ends a statement at `timeout_s`; the client waits a little longer, so that the server's own error
# arrives.
_CLIENT_PATIENCE_S = 0.5
# Idle connections beyond the first are given back after this, so that a burst doesn't hold the server's
# slots.
_IDLE_LIFETIME_S = 300.0
# Two gateways that start together: the second waits for the first one's migrations.
_MIGRATION_WAIT_S = 600.0
_MIGRATION_LOCK = 0x706F6F6C67617465  # "poolgate" in ASCII: any constant that no one else takes
_FILE_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_TABLE = """
create table if not exists schema_migrations (
    name text primary key,
    checksum text not null,
    applied_at timestamptz not null default now()
)"""


class MigrationRefused(RuntimeError):
    """The migrations on disk and those in the database do not follow from each other."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: its name without `.sql`, its text, and the SHA-256 of that."""

    name: str
    text: str
    checksum: str


async def open_pool(url: str, *, max_size: int, timeout_s: float, resets: bool = True) -> asyncpg.Pool:
    """A pool whose statements end after `timeout_s`, in the server and in the client; connecting does, too.

    Nothing connects yet: where the server can't be reached, the first statement raises OSError, TimeoutError or
    asyncpg.PostgresError. Without `resets` a connection that comes back is not cleared of what was set in its session: its
    users set nothing and lock nothing beyond a transaction, and each use costs one round trip less. An open transaction is
    rolled back all the same.
    """
    return await asyncpg.create_pool(
        url,
        min_size=0,  # a pool that keeps a floor logs a traceback whenever PostgreSQL goes away
        max_size=max_size,
        timeout=timeout_s,
        command_timeout=timeout_s + _CLIENT_PATIENCE_S,
        max_inactive_connection_lifetime=_IDLE_LIFETIME_S,
        reset=None if resets else _as_it_is,
        server_settings={
            "application_name": APPLICATION_NAME,
            "statement_timeout": str(max(1, round(timeout_s * 1000))),
            # A client that died inside a transaction must not keep its locks.
            "idle_in_transaction_session_timeout": str(max(1, round(timeout_s * 2000))),
        },
    )


async def _as_it_is(_: object) -> None:
    """In the place of asyncpg's reset."""


async def migrate(
    url: str,
    progress: Callable[[str], None] = lambda _line: None,
    *,
    folders: Sequence[Path] = SQL_FOLDERS,
) -> list[str]:
    """Apply the files that the database lacks, each in a transaction of its own; the names applied, in order.

    Any number of processes may call it at once: one does it, the others wait. Raises MigrationRefused where
    an applied file was changed or is missing (the database is newer than this code), or where a file would
    have to be slipped in between.
    """
    wanted = read_migrations(*folders)
    connection = await asyncpg.connect(
        url, server_settings={"application_name": f"{APPLICATION_NAME} migrate"}
    )
    try:
        await _take_lock(connection, progress)
        await connection.execute(_TABLE)
        rows = await connection.fetch("select name, checksum from schema_migrations order by name")
        missing = to_apply(wanted, [(row["name"], row["checksum"]) for row in rows])
        for migration in missing:
            progress(f"applying {migration.name}")
            await _apply(connection, migration)
        return [migration.name for migration in missing]
    finally:
        await connection.close()  # gives the lock back, too


def read_migrations(*folders: Path) -> list[Migration]:
    """The files of these folders in order; MigrationRefused for a name or number that leaves the order open."""
    found: list[Migration] = []
    for path in sorted(
        (path for folder in folders for path in folder.glob("*.sql")), key=lambda path: path.name
    ):
        if not _FILE_NAME.fullmatch(path.name):
            raise MigrationRefused(f"{path}: a migration is named NNNN_words.sql, in small letters")
        if found and found[-1].name[:4] == path.name[:4]:
            raise MigrationRefused(f"{path.name} and {found[-1].name}.sql have the same number")
        text = path.read_text(encoding="utf-8")
        found.append(Migration(path.stem, text, hashlib.sha256(text.encode()).hexdigest()))
    return found


def to_apply(wanted: Sequence[Migration], applied: Sequence[tuple[str, str]]) -> list[Migration]:
    """What is to be done, given (name, checksum) of what was. Raises MigrationRefused."""
    by_name = {migration.name: migration for migration in wanted}
    for name, checksum in applied:
        if name not in by_name:
            raise MigrationRefused(
                f"the database has migration {name}, which this poolgate does not know: it is older than the "
                "database. Run the newer one"
            )
        if by_name[name].checksum != checksum:
            raise MigrationRefused(
                f"migration {name} was changed after it was applied: restore the file, and put the change "
                "into a new one"
            )
    done = {name for name, _ in applied}
    last = max(done, default="")
    missing = [migration for migration in wanted if migration.name not in done]
    for migration in missing:
        if migration.name < last:
            raise MigrationRefused(
                f"migration {migration.name} comes before {last}, which is applied: give it a new number"
            )
    return missing


async def _take_lock(connection: asyncpg.Connection, progress: Callable[[str], None]) -> None:
    if await connection.fetchval("select pg_try_advisory_lock($1)", _MIGRATION_LOCK):
        return
    progress("another process migrates this database: waiting for it")
    async with asyncio.timeout(_MIGRATION_WAIT_S):
        await connection.execute("select pg_advisory_lock($1)", _MIGRATION_LOCK)


async def _apply(connection: asyncpg.Connection, migration: Migration) -> None:
    async with connection.transaction():
        try:
            await connection.execute(migration.text)
        except asyncpg.PostgresError as error:
            error.add_note(f"in migration {migration.name}, which was rolled back")
            raise
        await connection.execute(
            "insert into schema_migrations (name, checksum) values ($1, $2)",
            migration.name,
            migration.checksum,
        )
