"""Journals whose process is dead: whoever is alive on the host ships them, closes their leases and removes them.

How a journal gets into the book is shipper.py's; what becomes of leases whose journal nobody can reach, incarnations.py's.
"""

import asyncio
import contextlib
import logging
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from uuid import UUID

import asyncpg

from billing.incarnations import close_incarnation
from billing.journal_files import LOCK, START, Batch, DeadJournal, count_records
from billing.shipment import Shipped, UnknownIncarnation, read_place
from billing.shipper import COLLIDED, COLLISIONS_MAX, Shipper
from config.defaults import Settings
from config.metrics import Metrics
from config.postgres import AWAY

log = logging.getLogger("poolgate.recovery")

ADOPT_S = 1.0
"""How often dead processes are looked for: a killed worker's turns are in the book moments later."""

SILENT_S = 30.0
"""Six beats: the process of another host whose journal seems to be nobody's would have been heard of."""

LEFTOVER_S = 3600.0
"""A folder that was being made or removed for so long is nobody's any more: its process died amid that."""


@dataclass(slots=True)
class Recovered:
    """What was done with one journal."""

    incarnation_id: UUID
    folder: Path | None
    state: Literal["closed", "abandoned"] = "closed"
    records: int = 0
    turns: int = 0  # new ones: the others were in the book
    quarantined: int = 0
    amount_nano: int = 0  # charged to wallets
    lost_nano: int = 0  # paid by the platform: its leases had been given up, or a hold was exceeded
    accounts: dict[int, int] = field(default_factory=dict)  # what each wallet was charged

    def add(self, batch: Batch, shipped: Shipped) -> None:
        """Count one batch that is in the book."""
        self.records += len(batch.payloads)
        self.turns += shipped.turns
        self.quarantined += shipped.is_quarantined
        self.amount_nano += shipped.amount_nano
        self.lost_nano += shipped.loss_nano
        for account_id, amount_nano in shipped.charged:
            self.accounts[account_id] = self.accounts.get(account_id, 0) + amount_nano


class ProcessLives(RuntimeError):
    """The journal's process holds its lock."""


def journal_folders(root: Path) -> list[Path]:
    """The folders in `root` that are named as incarnations, the oldest first."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(path for path in root.iterdir() if _incarnation_of(path) is not None and path.is_dir())
    return []


async def adopt(
    root: Path, pool: asyncpg.Pool, settings: Settings, metrics: Metrics | None = None
) -> list[Recovered]:
    """Take over every journal in `root` whose lock is free: a living process's, ours too, is held by it.

    One that this database knows nothing of is left as it is. Raises what PostgreSQL's absence raises.
    """
    done = []
    for folder in await asyncio.to_thread(journal_folders, root):
        with contextlib.suppress(ProcessLives, UnknownIncarnation):
            done.append(await recover(folder, pool, settings, metrics))
    return done


async def recover(
    folder: Path,
    pool: asyncpg.Pool,
    settings: Settings,
    metrics: Metrics | None = None,
    progress: Callable[[Recovered], None] | None = None,
    *,
    host: str | None = None,
) -> Recovered:
    """Ship one dead process's journal, close its leases, remove the folder. Any step may come again.

    `host`: ours, for whoever does this unasked. On a disk that hosts share, a lock may not reach over to the others: a
    process of another host is dead only once PostgreSQL has not heard of it for SILENT_S.

    Raises ProcessLives, UnknownIncarnation, ValueError for a folder that is no journal's, and what PostgreSQL's absence
    raises.
    """
    journal = await asyncio.to_thread(DeadJournal.open, folder)
    if journal is None:
        raise ProcessLives(str(folder))
    recovered = Recovered(journal.incarnation_id, folder)

    def note(batch: Batch, shipped: Shipped) -> None:
        recovered.add(batch, shipped)
        if progress is not None:
            progress(recovered)

    try:
        if host is not None and await _lives_elsewhere(pool, settings, journal.incarnation_id, host):
            raise ProcessLives(str(folder))
        shipper = Shipper(pool, settings, journal, metrics, on_shipped=note)
        try:
            await shipper.ship_all()
        except UnknownIncarnation:
            if await asyncio.to_thread(count_records, folder, START, None):
                raise
            # It began while PostgreSQL was away and ended before it was made known; nothing was charged.
        if shipper.is_abandoned and recovered.records:  # else it was closed, and only its folder is left
            recovered.state = "abandoned"
        with contextlib.suppress(UnknownIncarnation):
            await end_incarnation(
                pool, settings, journal.incarnation_id, "closed"
            )  # no change if it was given up
        await asyncio.to_thread(journal.remove)
    finally:
        journal.close()
    log.info("the journal of a dead process is in the book", extra={
        "action": "journal_adopted", "incarnation": str(recovered.incarnation_id), "records": recovered.records,
        "turns": recovered.turns, "amount_nano": recovered.amount_nano, "lost_nano": recovered.lost_nano,
    })  # fmt: skip
    return recovered


async def abandon(
    incarnation_id: UUID, folder: Path | None, pool: asyncpg.Pool, settings: Settings
) -> Recovered:
    """Give up a process whose journal is lost or unreadable: its leases return, records found later are the platform's loss.

    `folder`: its journal, if there is one; it stays as it is. Raises ProcessLives, UnknownIncarnation.
    """
    journal = None if folder is None else await asyncio.to_thread(_lock_of, folder)
    try:
        await end_incarnation(pool, settings, incarnation_id, "abandoned")
    finally:
        if journal is not None:
            journal.close()
    return Recovered(incarnation_id, folder, "abandoned")


async def end_incarnation(
    pool: asyncpg.Pool, settings: Settings, incarnation_id: UUID, state: Literal["closed", "abandoned"]
) -> None:
    """Return what its leases have left and end it, in a transaction of its own; again is no change.

    Raises UnknownIncarnation, and what PostgreSQL's absence raises.
    """
    for attempt in range(COLLISIONS_MAX):
        try:
            async with (
                asyncio.timeout(2 * settings.database_timeout_s),
                pool.acquire() as connection,
                connection.transaction(),
            ):
                await read_place(connection, incarnation_id)  # raises UnknownIncarnation
                await close_incarnation(connection, incarnation_id, state)
                return
        except COLLIDED:
            if attempt + 1 == COLLISIONS_MAX:
                raise


class Recovery:
    """Adopts, beside everything else that a worker does."""

    def __init__(
        self, root: Path, pool: asyncpg.Pool, settings: Settings, metrics: Metrics | None = None
    ) -> None:
        self._root = root
        self._pool = pool
        self._settings = settings
        self._metrics = metrics
        self._host = socket.gethostname()
        self._told: set[Path] = set()

    async def run(self) -> None:
        """Look every ADOPT_S until cancelled; a journal that can't be shipped now is taken up the next time."""
        while True:
            for folder in await asyncio.to_thread(self._found):
                await self._adopt(folder)
            await asyncio.sleep(ADOPT_S)

    def _found(self) -> list[Path]:
        _sweep(self._root)
        return journal_folders(self._root)

    async def _adopt(self, folder: Path) -> None:
        try:
            await recover(folder, self._pool, self._settings, self._metrics, host=self._host)
        except ProcessLives:
            pass
        except UnknownIncarnation:
            self._tell(folder, "journal_unknown", "is not of this database: it is left as it is")
        except AWAY as error:
            self._tell(
                folder,
                "journal_waits",
                f"can't be shipped now, and is tried again: {error or type(error).__name__}",
            )

    def _tell(self, folder: Path, action: str, what: str) -> None:
        """Once of each: it is looked at every second."""
        if folder not in self._told:
            self._told.add(folder)
            log.warning("the journal %s %s", folder, what, extra={"action": action})


def _lock_of(folder: Path) -> DeadJournal | None:
    """None where nothing is left to lock: a folder without its lock file was damaged."""
    journal = DeadJournal.open(folder)
    if journal is None and (folder / LOCK).exists():
        raise ProcessLives(str(folder))
    return journal


async def _lives_elsewhere(pool: asyncpg.Pool, settings: Settings, incarnation_id: UUID, host: str) -> bool:
    async with asyncio.timeout(settings.database_timeout_s):
        lives = await pool.fetchval(
            "select state = 'live' and host <> $2 and seen_at > clock_timestamp() - make_interval(secs => $3)"
            " from incarnations where id = $1",
            incarnation_id, host, SILENT_S,
        )  # fmt: skip
    return bool(lives)


def _incarnation_of(folder: Path) -> UUID | None:
    with contextlib.suppress(ValueError):
        return UUID(folder.name)
    return None


def _sweep(root: Path) -> None:
    """Remove what processes left that died while they made or removed a folder."""
    for folder in _leftovers(root):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(folder)


def _leftovers(root: Path) -> Iterator[Path]:
    for pattern in (".new-*", ".gone-*"):
        yield from root.glob(pattern)
