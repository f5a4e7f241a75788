"""The journal of one gateway process: settled turns on disk, until they are in the book.

`append` copies a record into a mapped file that has its place on disk already: no system call, no wait, and what was
appended survives the process, as the pages are the system's. Against a power cut they are forced to disk every
`journal_fsync_s`. Reading and shipping are shipper.py's.
"""

import asyncio
import logging
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import UUID
from zlib import crc32

from billing.journal_files import (
    FRAME,
    FRAME_BYTES,
    START,
    Position,
    count_records,
    make_segment,
    remove_folder,
    segment_file,
    take_lock,
)
from billing.records import encode
from billing.usage import UsageRecord
from config.cores import roam
from config.defaults import Settings

log = logging.getLogger("poolgate.journal")

_pack_frame: Final = FRAME.pack_into
_crc32: Final = crc32  # which `checksum` calls too

AHEAD_RETRY_S = 1.0
"""How soon the segment ahead is tried again where there was no room for it."""

IDLE_S = 1.0
"""How often an idle journal looks after its segments."""


class JournalFull(Exception):
    """There is no room for one more record, which is lost unless its caller keeps it: look at `is_full` before a turn."""


def journal_root(settings: Settings) -> Path:
    """Where the journals of this host's processes are."""
    return Path(settings.journal_dir) if settings.journal_dir else Path(settings.data_dir) / "journal"


class Journal:
    """Appended to by one process, in its event loop; it holds the journal's lock until `close`."""

    def __init__(self, folder: Path, lock: int, settings: Settings) -> None:
        """Use `open`."""
        self.folder = folder
        self.incarnation_id = UUID(folder.name)
        self._settings = settings
        self._lock = lock
        self._size = settings.journal_segment_bytes
        # Turns in flight when the last new one was let in still find room.
        self._bytes_full = settings.journal_bytes_max - self._size
        self._number = START.segment
        self._at = 0
        self._fd, self._map = self._mapped(self._number)
        self._retired: list[tuple[int, mmap.mmap]] = []  # full, to be synced once more
        self._has_ahead = False
        self._has_no_room = False  # for the segment ahead
        self._is_failing = False  # the last sync did
        # Not the loop's own executor: a disk that hangs must not keep its threads, and `close` waits for ours alone.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="journal", initializer=roam)
        self._making: Future[None] | None = None
        self._woken: asyncio.Future[None] | None = None  # set by an append while `run` has nothing to sync
        self._make_at_s = 0.0
        self._synced = START
        self._shipped = START
        self._removed = START.segment - 1
        self._appended_records = self._shipped_records = 0

    @classmethod
    def open(cls, root: Path, incarnation_id: UUID, settings: Settings) -> "Journal":
        """A new journal, the folder `incarnation_id` in `root`. OSError: it can't be made, so no turn may begin."""
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Under another name until it is locked: a folder with the name of an incarnation and a free lock is a dead one's.
        making = root / f".new-{incarnation_id}"
        making.mkdir(mode=0o700)
        lock = take_lock(making, is_new=True)
        assert lock is not None, f"{making} is new and has our process's own name"
        make_segment(making, START.segment, settings.journal_segment_bytes)
        folder = making.rename(root / str(incarnation_id))
        return cls(folder, lock, settings)

    def __repr__(self) -> str:
        state = " full" if self.is_full else ""
        return f"<Journal {self.folder.name} pending={self.pending} at={self._number}:{self._at}{state}>"

    def append(self, record: UsageRecord) -> None:
        """Take a settled turn: durable against the death of this process when it returns, so the answer may end.

        It waits for nothing, and refuses nothing while there is a byte left. Raises JournalFull.
        """
        payload = encode(record)
        length = len(payload)
        at = self._at
        start = at + FRAME_BYTES
        end = start + length
        if end > self._size:
            self._roll(record)
            at, start, end = 0, FRAME_BYTES, FRAME_BYTES + length
        mapped = self._map
        # The length last: a process killed amid this leaves a length of zero, which ends the journal.
        mapped[start:end] = payload
        _pack_frame(mapped, at, length, _crc32(payload, length))
        self._at = end
        self._appended_records += 1
        if self._woken is not None:
            self._wake()

    def _wake(self) -> None:
        woken, self._woken = self._woken, None
        if woken is not None and not woken.done():
            woken.set_result(None)

    @property
    def is_full(self) -> bool:
        """Whether new turns must be refused, since their records might find no room."""
        return self._has_no_room or self._is_failing or self.pending_bytes >= self._bytes_full

    @property
    def pending(self) -> int:
        """Records that PostgreSQL has not confirmed."""
        return self._appended_records - self._shipped_records

    @property
    def pending_bytes(self) -> int:
        """What they take on disk."""
        return (self._number - self._shipped.segment) * self._size + self._at - self._shipped.offset

    @property
    def end(self) -> Position:
        """Where the next record goes."""
        return Position(self._number, self._at)

    def shipped(self, position: Position, records: int) -> None:
        """All before `position` is in the book, `records` more than before; whole segments before it may go."""
        self._shipped = position
        self._shipped_records += records

    async def recount(self, position: Position) -> None:
        """The book says that all before `position` is in it, whatever we thought."""
        appended = self._appended_records
        waiting = await asyncio.to_thread(count_records, self.folder, position, self.end)
        self._shipped, self._shipped_records = position, appended - waiting

    async def run(self) -> None:
        """Force to disk what was appended, keep a segment ahead and remove those shipped, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.journal_fsync_s)
            self._make_ahead()
            await self._sync()
            await self._remove_shipped()
            if self.end == self._synced and self._has_ahead and not self._retired:
                await self._await_append()

    async def _await_append(self) -> None:
        """Everything is on disk: the next append ends the pause, which is no longer than a shipped segment may stay."""
        self._woken = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait([self._woken], timeout=IDLE_S)
        finally:
            self._woken = None

    def close(self) -> None:
        """Force to disk what is left and give the lock back; the folder stays, for whoever ships the rest."""
        if self._lock < 0:
            return
        self._threads.shutdown()
        retired, self._retired = self._retired, []
        try:
            _sync_files(self._fd, retired)
        except OSError as error:
            log.critical("the journal can't be synced: %s", error, extra={"action": "journal_stuck"})
        self._map.close()
        os.close(self._fd)
        os.close(self._lock)
        self._lock = -1

    def remove(self) -> None:
        """The same, and the folder goes: everything in it is in the book."""
        remove_folder(self.folder)
        self.close()

    def _roll(self, record: UsageRecord) -> None:
        """Go on in the next segment; where there was no time to make it ahead, make it now."""
        number = self._number + 1
        try:
            if not self._has_ahead:
                with suppress(FileExistsError):
                    make_segment(self.folder, number, self._size, is_written=False)
            fd, mapped = self._mapped(number)
        except OSError as error:
            self._has_no_room = True
            log.critical("there is no room for a turn's record, which is lost: %s", error, extra={
                "action": "journal_full", "turn_id": record.turn_id, "account_id": record.account_id,
                "amount_nano": record.amount_nano,
            })  # fmt: skip
            raise JournalFull(str(error)) from error
        self._retired.append((self._fd, self._map))
        self._fd, self._map = fd, mapped
        self._number, self._at, self._has_ahead = number, 0, False

    def _mapped(self, number: int) -> tuple[int, mmap.mmap]:
        fd = os.open(segment_file(self.folder, number), os.O_RDWR | os.O_CLOEXEC)
        try:
            return fd, mmap.mmap(fd, self._size)
        except BaseException:
            os.close(fd)
            raise

    def _make_ahead(self) -> None:
        """Beside the syncs, which must not wait for it."""
        if self._making is not None:
            if not self._making.done():
                return
            making, self._making = self._making, None
            self._note_made(making.exception())
        now_s = time.monotonic()
        if not self._has_ahead and now_s >= self._make_at_s:
            self._make_at_s = now_s + AHEAD_RETRY_S
            self._making_number = self._number + 1
            self._making = self._threads.submit(make_segment, self.folder, self._making_number, self._size)

    def _note_made(self, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, FileExistsError):
            if not self._has_no_room:
                log.critical("there is no room for the journal's next segment; new turns are refused: %s", error, extra={
                    "action": "journal_stuck", "pending": self.pending,
                })  # fmt: skip
            self._has_no_room = True
            return
        # An append that could not wait has made it itself, and gone on in it.
        self._has_ahead = self._making_number == self._number + 1
        self._has_no_room = False
        self._make_at_s = 0.0

    async def _sync(self) -> None:
        end = self.end
        if end == self._synced and not self._retired:
            return
        retired, self._retired = self._retired, []
        try:
            await self._in_thread(_sync_files, self._fd, retired)
        except OSError as error:
            if not self._is_failing:
                log.critical("the journal can't be synced; new turns are refused: %s", error, extra={
                    "action": "journal_stuck", "pending": self.pending,
                })  # fmt: skip
            self._is_failing = True
            return
        self._synced, self._is_failing = end, False

    async def _remove_shipped(self) -> None:
        last = self._shipped.segment - 1
        if last > self._removed:
            files = [segment_file(self.folder, number) for number in range(self._removed + 1, last + 1)]
            # On a disk that is read-only now: the syncs tell of it, and turns that run must not end for a file that stays.
            with suppress(OSError):
                await self._in_thread(_remove_files, files)
                self._removed = last

    async def _in_thread(self, work: Callable[..., None], *given: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)


def _sync_files(current: int, retired: Sequence[tuple[int, mmap.mmap]]) -> None:
    """The retired ones are closed, whatever becomes of them; OSError if any could not be synced."""
    failures = []
    for fd, mapped in retired:
        try:
            os.fdatasync(fd)
        except OSError as error:
            failures.append(error)
        mapped.close()
        os.close(fd)
    os.fdatasync(current)
    if failures:
        raise failures[0]


def _remove_files(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
