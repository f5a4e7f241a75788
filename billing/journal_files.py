"""The files of a journal: a folder an incarnation with its lock, segments of framed records, and how they are read.

A record is its length (4 bytes), a CRC-32 over length and payload (4 bytes), the payload; the rest of a segment is
zeros. Who appends is journal.py's business, where the records go shipper.py's.
"""

import fcntl
import os
import shutil
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple
from uuid import UUID

from billing.records import RECORD_BYTES_MAX

FRAME = struct.Struct("<II")  # length and CRC-32, little-endian
FRAME_BYTES: Final = FRAME.size

READ_BYTES_MAX = 4 * 2**20
"""Read at once: bounds the memory of shipping, and a batch of 5,000 records has less than half of it."""

ZEROS = bytes(2**20)
LOCK = "lock"


class Position(NamedTuple):
    """A place in a journal: everything before it is in the book."""

    segment: int
    offset: int


START = Position(1, 0)


@dataclass(frozen=True, slots=True)
class Batch:
    """What was read from `start` on: records, or else one piece that is none; `next` is where it ends."""

    start: Position
    next: Position
    payloads: Sequence[bytes] = ()
    ends: Sequence[int] = ()  # offset behind each payload
    bad: bytes = b""
    reason: str = ""
    is_rest: bool = False  # nothing else of its segment can be found either

    def halves(self) -> tuple["Batch", "Batch"]:
        """Two batches for one of at least two records."""
        middle = len(self.payloads) // 2
        between = Position(self.start.segment, self.ends[middle - 1])
        return (
            Batch(self.start, between, self.payloads[:middle], self.ends[:middle]),
            Batch(between, self.next, self.payloads[middle:], self.ends[middle:]),
        )


def checksum(payload: bytes) -> int:
    """CRC-32 of a payload, begun with its length, so that it covers both."""
    return zlib.crc32(payload, len(payload))


def segment_file(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.seg"


def segments(folder: Path) -> list[int]:
    """The numbers of the segments that are there, in order."""
    return sorted(int(path.stem) for path in folder.glob("*.seg") if path.stem.isdigit())


def make_segment(folder: Path, number: int, size: int, *, is_written: bool = True) -> None:
    """A whole segment of zeros, or OSError and nothing (FileExistsError: it is there).

    It takes its place on disk now. Being written (not only reserved), its later syncs change no metadata of the file
    system, whose journal would make them, and now and then an append, wait.
    """
    made = folder / f"{number:08d}.{'ahead' if is_written else 'now'}"  # two threads may make the same one
    fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
        for at in range(0, size if is_written else 0, len(ZEROS)):
            os.pwrite(fd, ZEROS[: size - at], at)
        os.fdatasync(fd)
        segment_file(folder, number).hardlink_to(made)  # unlike a rename, never in place of another one
    finally:
        os.close(fd)
        made.unlink(missing_ok=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Names made or removed in it survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def take_lock(folder: Path, *, is_new: bool = False) -> int | None:
    """A descriptor that holds the folder's lock as long as it is open; None if somebody has it, or the folder went."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if is_new else 0)
    try:
        fd = os.open(folder / LOCK, flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have removed the folder meanwhile: then this is the lock of nothing.
        if os.fstat(fd).st_ino == (folder / LOCK).stat().st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def read_batch(folder: Path, position: Position, records_max: int, end: Position | None) -> Batch | None:
    """What comes next from `position` on, of one segment; None at the journal's end.

    `end`: where the journal ends, if its writer lives; else it ends where the last segment has no more records.
    """
    there = [number for number in segments(folder) if number >= position.segment]
    for number in there:
        offset = position.offset if number == position.segment else 0
        stop = end.offset if end is not None and number == end.segment else None
        batch = _read_segment(folder, Position(number, offset), records_max, stop)
        if batch is not None:
            return replace(batch, start=position)
        if end is not None and number == end.segment:
            break
    return None


def count_records(folder: Path, position: Position, end: Position | None) -> int:
    """How many records there are from `position` on."""
    count = 0
    while (batch := read_batch(folder, position, 2**30, end)) is not None:
        count, position = count + len(batch.payloads), batch.next
    return count


def _read_segment(folder: Path, start: Position, records_max: int, stop: int | None) -> Batch | None:
    """Records from `start` up to the first zero length, the first bad one, or `stop`; or the bad one itself."""
    with segment_file(folder, start.segment).open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size if stop is None else stop
        data = os.pread(file.fileno(), max(0, min(size - start.offset, READ_BYTES_MAX)), start.offset)
        payloads: list[bytes] = []
        ends: list[int] = []
        at, is_bad = 0, False
        while at + FRAME_BYTES <= len(data) and len(payloads) < records_max:
            length, crc = FRAME.unpack_from(data, at)
            if not length:
                break
            after = at + FRAME_BYTES + length
            if after > len(data) and length <= RECORD_BYTES_MAX and start.offset + after <= size:
                break  # the rest of it comes with the next batch
            payload = data[at + FRAME_BYTES : after]
            if checksum(payload) != crc:  # also of a length that leads beyond the segment
                is_bad = True
                break
            payloads.append(payload)
            ends.append(start.offset + after)
            at = after
        if payloads:
            return Batch(start, Position(start.segment, ends[-1]), payloads, ends)
        if is_bad:
            return _bad_piece(data, start, length, size)
        if stop is None:
            return _beyond_the_end(file.fileno(), start, size)
        return None


def _bad_piece(data: bytes, start: Position, length: int, size: int) -> Batch:
    """The piece is as long as it says if that is plausible; else nothing in this segment can be found any more."""
    after = FRAME_BYTES + length
    if length <= RECORD_BYTES_MAX and start.offset + after <= size:
        return Batch(
            start,
            Position(start.segment, start.offset + after),
            bad=data[:after],
            reason="its checksum is wrong",
        )
    rest = Position(start.segment, size)
    return Batch(start, rest, bad=data, reason=f"its length {length} can't be right", is_rest=True)


def _beyond_the_end(fd: int, start: Position, size: int) -> Batch | None:
    """A power cut may keep a later page and lose an earlier one: what stands behind a gap is for a person to see."""
    at = start.offset
    while at < size:
        data = os.pread(fd, len(ZEROS), at)
        if not data:
            break
        if data != ZEROS[: len(data)]:
            rest = Position(start.segment, size)
            return Batch(start, rest, bad=data.strip(b"\0"), reason="it stands behind a gap", is_rest=True)
        at += len(data)
    return None


class DeadJournal:
    """The journal of a process that ended, locked by us: what a shipper needs of it."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self.incarnation_id = UUID(folder.name)
        self._lock = lock

    @classmethod
    def open(cls, folder: Path) -> "DeadJournal | None":
        """None while its process lives, or another one has taken it over. ValueError: the folder is not a journal's."""
        UUID(folder.name)
        lock = take_lock(folder)
        return None if lock is None else cls(folder, lock)

    @property
    def end(self) -> None:
        """Not known: where records end."""

    def shipped(self, position: Position, records: int) -> None:
        """Nothing to do: its files go together when all of it is shipped."""

    async def recount(self, position: Position) -> None:
        """Nothing to do: nobody asks how many wait."""

    def remove(self) -> None:
        """The folder and everything in it; the lock goes with it."""
        remove_folder(self.folder)
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def remove_folder(folder: Path) -> None:
    """Under its lock: first out of sight in one step, then file by file."""
    gone = folder.with_name(f".gone-{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    sync_folder(folder.parent)
