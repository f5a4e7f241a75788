"""Brings a journal into the book, batch by batch from its shipped position on, whatever becomes of PostgreSQL.

What one batch does there is shipment.py's. Only the batch in hand is in memory: all else waits in the journal.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from uuid import UUID

import asyncpg

from billing.journal_files import START, Batch, Position, read_batch, segment_file
from billing.records import readable
from billing.shipment import Place, Shipped, UnknownIncarnation, quarantine, read_place, ship
from config.defaults import Settings
from config.metrics import Metrics
from config.postgres import AWAY

log = logging.getLogger("poolgate.shipper")

RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
"""Pauses while PostgreSQL is away: tried again before journals grow long, and not hammered."""

CLOSE_S = 10.0
"""How long `close` goes on trying: half of what service managers grant a process that they stop."""

PLATFORM_SHARDS = 16
"""The platform's accounts are so many rows each: as many processes as share a database seldom meet in one."""

PIECE_BYTES_MAX = 64 * 2**10
"""What the database gets of a piece that is no record; a longer one is a whole segment's rest, kept as a file."""

COLLISIONS_MAX = 10
"""Deadlocks and the like in a row, after which a batch waits as if PostgreSQL were away."""

REFUSED = (
    ValueError, TypeError, OverflowError, asyncpg.DataError, asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError, asyncpg.RaiseError,
)  # fmt: skip
"""A record of the batch is at fault: it would be refused again for ever."""

COLLIDED = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
"""Another transaction went first."""

TOO_LONG = (asyncpg.QueryCanceledError, TimeoutError)
"""PostgreSQL did not end a batch in time: perhaps it was too large."""


class Source(Protocol):
    """A journal, of this process (journal.Journal) or of one that ended (journal_files.DeadJournal)."""

    folder: Path
    incarnation_id: UUID

    @property
    def end(self) -> Position | None:
        """Where it ends, if it is appended to."""

    def shipped(self, position: Position, records: int) -> None:
        """All before `position` is in the book, `records` more than before."""

    async def recount(self, position: Position) -> None:
        """All before `position` is in the book, which is not where we thought."""


class Shipper:
    """Ships one journal. `run` until cancelled, then `close`; `ship_once` for a single batch."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        settings: Settings,
        journal: Source,
        metrics: Metrics | None = None,
        on_shipped: Callable[[Batch, Shipped], None] | None = None,
    ) -> None:
        """`on_shipped` hears of each batch that is in the book, and of each record in quarantine."""
        self._pool = pool
        self._settings = settings
        self._journal = journal
        self._metrics = metrics
        self._on_shipped = on_shipped
        self._position = START
        self._is_placed = False  # whether the book was asked where it is, since an answer of it was lost
        self._todo: list[Batch] = []  # read, not confirmed; the next one last
        self._unsure: Batch | None = None  # sent, and its answer lost
        self._batch_max = settings.usage_batch_max
        self._collisions = 0
        self._shipping = asyncio.Lock()
        self._shard = journal.incarnation_id.int % PLATFORM_SHARDS
        self._is_away = False
        self._is_told = False
        self.is_abandoned = False
        """Whether the book gave this incarnation up: its leases are gone, and the platform pays for its turns."""

    def __repr__(self) -> str:
        return f"<Shipper {self._journal.folder.name} at={self._position}{' away' if self._is_away else ''}>"

    async def run(self) -> None:
        """Ship until cancelled; `close` afterwards ships the rest."""
        pause_s = RETRY_MIN_S
        while True:
            await asyncio.sleep(pause_s if self._is_away else self._settings.usage_flush_s)
            pause_s = RETRY_MIN_S if await self._ship_all() else min(2 * pause_s, RETRY_MAX_S)

    async def ship_all(self) -> None:
        """Ship to the journal's end as it is now; raises what PostgreSQL's absence raises, and UnknownIncarnation.

        Not to where it ends later: under load each batch would be what came during the one before, a dozen turns, and cost
        nearly as much as one of a thousand.
        """
        end = self._journal.end
        while await self.ship_once() and (end is None or self._position < end):
            pass

    async def ship_once(self) -> bool:
        """Take the next step, mostly a batch; False at the journal's end. Raises as `ship_all`."""
        async with self._shipping:
            if not self._is_placed:
                await self._find_place()
            if not self._todo and not await self._read():
                return False
            batch = self._todo[-1]
            try:
                await self._step(batch)
            except BaseException:
                # It may be in the book all the same: that is asked first.
                self._is_placed, self._unsure = False, batch
                raise
            return True

    async def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Ship what is left, for at most `timeout_s`; whether all of it is in the book. The journal stays as it is."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not await self._ship_all():  # noqa: ASYNC110 - it waits for PostgreSQL
                    await asyncio.sleep(RETRY_MIN_S)
                return True
        log.error("not all turns could be shipped: they wait in %s", self._journal.folder, extra={
            "action": "journal_left", "folder": str(self._journal.folder),
        })  # fmt: skip
        return False

    async def _ship_all(self) -> bool:
        """False if PostgreSQL is away, which is said once."""
        try:
            await self.ship_all()
        except (*AWAY, UnknownIncarnation) as error:
            self._note_away(error)
            return False
        self._note_back()
        return True

    async def _find_place(self) -> None:
        """Also after the database's return from a backup: where the book is counts, not where it was."""
        async with asyncio.timeout(self._settings.database_timeout_s), self._pool.acquire() as connection:
            place = await read_place(connection, self._journal.incarnation_id)
        self.is_abandoned = not place.is_live
        unsure, self._unsure = self._unsure, None
        self._todo.clear()
        if unsure is not None and place.position == unsure.next:
            self._go_on(unsure, Shipped(place, is_done=True))
        elif place.position != self._position:
            self._position = place.position
            await self._journal.recount(place.position)
        self._is_placed = True

    async def _read(self) -> bool:
        """In a thread: an hour's journal may have to come from the disk."""
        if self._position == self._journal.end:  # mostly nothing came, and no thread is asked
            return False
        batch = await asyncio.to_thread(
            read_batch, self._journal.folder, self._position, self._batch_max, self._journal.end
        )
        if batch is not None:
            self._todo.append(batch)
        return batch is not None

    async def _step(self, batch: Batch) -> None:
        """One transaction; then the batch is done, or comes again, in halves if a record of it was refused."""
        try:
            if batch.payloads:
                shipped = await self._ship(batch)
            else:
                shipped = await self._set_aside(
                    batch, (self._name(batch), batch.bad[:PIECE_BYTES_MAX].hex()), batch.reason
                )
        except REFUSED as error:
            await self._divide(batch, error)
        except COLLIDED:
            self._collisions += 1
            if self._collisions > COLLISIONS_MAX:
                raise
        except TOO_LONG:
            self._batch_max = max(1, self._batch_max // 2)
            raise
        else:
            self._collisions = 0
            self._note_place(shipped.place)
            if shipped.is_done:
                self._todo.pop()
                self._go_on(batch, shipped)
            else:  # somebody else has shipped, or the database is another one
                self._todo.clear()
                self._is_placed = False

    async def _divide(self, batch: Batch, error: Exception) -> None:
        """Halves, until the record at fault stands alone and goes to quarantine."""
        if len(batch.payloads) > 1:
            first, second = batch.halves()
            self._todo[-1:] = [second, first]
            return
        record = readable(batch.payloads[0]) if batch.payloads else (self._name(batch), "")
        try:
            shipped = await self._set_aside(batch, record, str(error) or type(error).__name__)
        except REFUSED:  # it can't even be kept as text: its bytes are kept beside the journal
            path = self._keep(batch)
            shipped = await self._set_aside(batch, (self._name(batch), f'"{path}"'), "kept as a file")
        if shipped.is_done:
            self._todo.pop()
            self._go_on(batch, shipped)
        else:
            self._is_placed = False

    async def _ship(self, batch: Batch) -> Shipped:
        async with (
            asyncio.timeout(2 * self._settings.database_timeout_s),
            self._pool.acquire() as connection,
            connection.transaction(),
        ):
            return await ship(connection, self._journal.incarnation_id, batch, self._settings, self._shard)

    async def _set_aside(self, batch: Batch, record: tuple[str, str], reason: str) -> Shipped:
        kept = f"; the segment is kept as {self._keep_segment(batch)}" if batch.is_rest else ""
        async with (
            asyncio.timeout(self._settings.database_timeout_s),
            self._pool.acquire() as connection,
            connection.transaction(),
        ):
            shipped = await quarantine(connection, self._journal.incarnation_id, batch, record, reason + kept)
        if shipped.is_done:
            self._note_quarantined(record[0], reason + kept)
        return shipped

    def _go_on(self, batch: Batch, shipped: Shipped) -> None:
        self._position = batch.next
        self._batch_max = min(2 * self._batch_max, self._settings.usage_batch_max)
        self._journal.shipped(batch.next, len(batch.payloads))
        if self._on_shipped is not None:
            self._on_shipped(batch, shipped)

    def _name(self, batch: Batch) -> str:
        """What a piece without a turn id is called: always the same, however often it comes."""
        return f"{self._journal.incarnation_id}/{batch.start.segment}/{batch.start.offset}"

    def _keep_segment(self, batch: Batch) -> Path:
        """A second name for the segment's file, which takes no room."""
        path = self._kept(batch).with_suffix(".seg")
        with suppress(FileExistsError):
            path.hardlink_to(segment_file(self._journal.folder, batch.next.segment))
        return path

    def _keep(self, batch: Batch) -> Path:
        path = self._kept(batch).with_suffix(".record")
        path.write_bytes(batch.bad or batch.payloads[0])
        return path

    def _kept(self, batch: Batch) -> Path:
        folder = self._journal.folder.parent / "quarantine"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / self._name(batch).replace("/", "-")

    def _note_quarantined(self, record_id: str, reason: str) -> None:
        log.error("a turn's record was refused and put in quarantine: %s", reason, extra={
            "action": "usage_quarantined", "turn_id": record_id, "incarnation": str(self._journal.incarnation_id),
        })  # fmt: skip
        if self._metrics is not None:
            self._metrics.quarantined.inc()

    def _note_place(self, place: Place) -> None:
        if not place.is_live and not self._is_told:
            self._is_told = True
            log.error("the leases of incarnation %s were given up: the platform pays for its turns",
                self._journal.incarnation_id, extra={"action": "incarnation_abandoned"},
            )  # fmt: skip
        self.is_abandoned = not place.is_live

    def _note_away(self, error: Exception) -> None:
        if not self._is_away:
            log.warning(
                "turns can't be shipped and wait in the journal: %s", error or type(error).__name__,
                extra={"action": "usage_unwritable"},
            )  # fmt: skip
        self._is_away = True

    def _note_back(self) -> None:
        if self._is_away:
            log.info("turns are shipped again", extra={"action": "usage_writable"})
        self._is_away = False
