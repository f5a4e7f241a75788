"""The journal: what is appended is read again exactly, and what was torn or spoilt is told from it."""

import asyncio
import errno
import math
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.journal import Journal, JournalFull, journal_root
from billing.journal_files import (
    FRAME,
    FRAME_BYTES,
    START,
    DeadJournal,
    Position,
    count_records,
    make_segment,
    read_batch,
    segment_file,
    segments,
    take_lock,
)
from billing.records import RECORD_BYTES_MAX, UNENCODABLE, decode, encode, readable
from billing.usage import UsageRecord
from config.defaults import Settings
from config.ids import hex7, uuid7
from tests.journals import turn
from tests.waiting import eventually

SETTINGS = Settings(journal_segment_bytes=2**16, journal_bytes_max=2**18, journal_fsync_s=0.005)

texts = st.text(max_size=40).filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text))
counts = st.integers(0, 2**63 - 1)
records = st.builds(
    UsageRecord,
    turn_id=st.builds(hex7), account_id=counts, key_id=counts, started_at=st.floats(0, 1e11), surface=texts,
    model=texts, node_id=st.none() | texts, engine_id=st.none() | texts, stream=st.booleans(), outcome=texts,
    status=st.integers(0, 999), prompt_tokens=counts, cached_tokens=counts, completion_tokens=counts,
    estimated=st.booleans(), ttft_ms=st.none() | counts, duration_ms=counts, amount_nano=counts, price_ref=texts,
    provider_id=st.none() | counts, loss_nano=counts,
    budgets=st.lists(st.tuples(counts, st.floats(0, 1e11) | st.just(-math.inf)), max_size=3).map(tuple),
    idempotency_key=st.none() | texts,
)  # fmt: skip


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal.open(tmp_path, uuid7(), SETTINGS)
    yield opened
    opened.close()


def everything(folder: Path, end: Position | None = None, start: Position = START) -> list[UsageRecord | str]:
    """Every record, and for each bad piece what is wrong with it."""
    found: list[UsageRecord | str] = []
    while (batch := read_batch(folder, start, 7, end)) is not None:
        found += map(decode, batch.payloads) if batch.payloads else [batch.reason]
        start = batch.next
    return found


def spoil(folder: Path, at: int, what: bytes, number: int = 1) -> None:
    with segment_file(folder, number).open("r+b") as file:
        file.seek(at)
        file.write(what)


def offsets(folder: Path) -> list[int]:
    """Where the records of the first segment begin."""
    batch = read_batch(folder, START, 10_000, None)
    assert batch is not None
    return [0, *batch.ends]


@given(records)
def test_a_record_is_decoded_exactly_as_it_was(record: UsageRecord) -> None:
    again = decode(encode(record))
    assert again == record
    assert type(again.started_at) is float


def test_a_turn_id_with_hyphens_is_the_same() -> None:
    record = turn()
    hyphened = encode(record._replace(turn_id=str(UUID(record.turn_id))))
    assert hyphened != encode(record)
    assert decode(hyphened) == record


@pytest.mark.parametrize(
    "fault",
    [{"model": "\ud800"}, {"prompt_tokens": 2**64}, {"turn_id": object()}, {"budgets": ({1, 2},)}],
    ids=repr,
)
def test_a_record_that_json_refuses_is_kept_as_text(fault: dict[str, Any]) -> None:
    payload = encode(turn(**fault))
    assert payload.startswith(b"[%d," % UNENCODABLE)
    assert "m@start" in readable(payload)[1]
    with pytest.raises(ValueError, match="version 0"):
        decode(payload)


def test_a_record_that_is_too_long_loses_the_ends_of_its_texts_and_no_number() -> None:
    payload = encode(turn(model="x" * 10**6, amount_nano=77, idempotency_key="k" * 8000))
    assert len(payload) <= RECORD_BYTES_MAX
    again = decode(payload)
    assert (again.amount_nano, len(again.model), len(again.idempotency_key or "")) == (77, 1000, 8000)
    assert len(encode(turn(idempotency_key="\n" * 10**6))) <= RECORD_BYTES_MAX


@pytest.mark.parametrize("payload", [b"", b"{}", b"[]", b"[1]", b"[1,2]", b"nothing", b"[1,null,3]"])
def test_what_is_no_record_is_refused_and_can_be_shown(payload: bytes) -> None:
    with pytest.raises(ValueError):
        decode(payload)
    assert readable(payload)[1].isascii()


def test_the_folder_is_for_its_owner_alone_and_named_after_the_incarnation(tmp_path: Path) -> None:
    id_ = uuid7()
    journal = Journal.open(tmp_path / "root", id_, SETTINGS)
    assert journal.folder == tmp_path / "root" / str(id_)
    for path in (journal.folder, journal.folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(segment_file(journal.folder, 1).stat().st_mode) == 0o600
    assert segment_file(journal.folder, 1).stat().st_blocks * 512 >= SETTINGS.journal_segment_bytes
    journal.remove()
    assert list((tmp_path / "root").iterdir()) == []


def test_journals_are_in_the_data_folder_unless_they_have_one() -> None:
    assert journal_root(replace(SETTINGS, data_dir="d")) == Path("d/journal")
    assert journal_root(replace(SETTINGS, journal_dir="/fast")) == Path("/fast")


def test_what_was_appended_is_read_in_its_order_over_segments(journal: Journal) -> None:
    written = [turn(amount_nano=n) for n in range(1000)]
    for record in written:
        journal.append(record)
    assert segments(journal.folder) == [1, 2, 3]
    assert everything(journal.folder, journal.end) == written
    assert everything(journal.folder) == written
    assert journal.pending == 1000
    assert count_records(journal.folder, START, journal.end) == 1000


def test_a_batch_ends_where_it_was_told_and_halves_in_two(journal: Journal) -> None:
    for n in range(9):
        journal.append(turn(amount_nano=n))
    batch = read_batch(journal.folder, START, 5, journal.end)
    assert batch is not None
    first, second = batch.halves()
    assert [len(part.payloads) for part in (batch, first, second)] == [5, 2, 3]
    assert (first.start, first.next, second.next) == (START, second.start, batch.next)
    again = read_batch(journal.folder, first.next, 3, journal.end)
    assert again == second


def test_nothing_is_read_beyond_the_writers_end(journal: Journal) -> None:
    journal.append(turn())
    end = journal.end
    journal.append(turn())
    assert len(everything(journal.folder, end)) == 1


@given(st.integers(0, 3), st.data())
def test_a_journal_cut_at_any_byte_has_all_records_before_it(
    tmp_path_factory: pytest.TempPathFactory, whole: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    make_segment(folder, 1, 2**16)
    written = [turn(amount_nano=n) for n in range(4)]
    frames = [FRAME.pack(len(p := encode(r)), _crc(p)) + p for r in written]
    torn = frames[whole][: data.draw(st.integers(0, len(frames[whole]) - 1))]
    spoil(folder, 0, b"".join(frames[:whole]) + torn)
    found = everything(folder)
    assert found[:whole] == written[:whole]
    assert all(isinstance(rest, str) for rest in found[whole:])


def test_a_record_killed_before_its_length_was_written_is_no_record(journal: Journal) -> None:
    journal.append(turn())
    spoil(journal.folder, journal.end.offset + FRAME_BYTES, b"half of a payload")
    assert len(everything(journal.folder, journal.end)) == 1
    found = everything(journal.folder)  # a dead one: what stands behind its end is for a person to see
    assert found[1:] == ["it stands behind a gap"]


def test_a_bad_checksum_costs_one_record(journal: Journal) -> None:
    written = [turn(amount_nano=n) for n in range(5)]
    for record in written:
        journal.append(record)
    spoil(journal.folder, offsets(journal.folder)[2] + FRAME_BYTES + 40, b"\xff")
    assert everything(journal.folder) == [*written[:2], "its checksum is wrong", *written[3:]]
    batch = read_batch(journal.folder, Position(1, offsets(journal.folder)[2]), 9, None)
    assert batch is not None
    assert b"m@start" in batch.bad


@pytest.mark.parametrize("length", [RECORD_BYTES_MAX + 1, 2**32 - 1, 2**31])
def test_a_length_that_can_not_be_costs_the_rest_of_its_segment(journal: Journal, length: int) -> None:
    written = [turn(amount_nano=n) for n in range(400)]
    for record in written:
        journal.append(record)
    in_first = len(offsets(journal.folder)) - 1
    spoil(journal.folder, offsets(journal.folder)[2], struct.pack("<I", length))
    assert everything(journal.folder) == [
        *written[:2], f"its length {length} can't be right", *written[in_first:],
    ]  # fmt: skip


def test_records_behind_a_page_that_a_power_cut_lost_are_told(journal: Journal) -> None:
    for n in range(600):
        journal.append(turn(amount_nano=n))
    at = offsets(journal.folder)[3]
    spoil(journal.folder, at, bytes(500))
    batch = read_batch(journal.folder, Position(1, at), 9, None)
    assert batch is not None
    assert (batch.is_rest, batch.next) == (True, Position(1, SETTINGS.journal_segment_bytes))
    assert isinstance(everything(journal.folder, start=batch.next)[0], UsageRecord)


def test_a_position_in_a_segment_that_is_gone_goes_on_in_the_next(journal: Journal) -> None:
    for n in range(600):
        journal.append(turn(amount_nano=n))
    segment_file(journal.folder, 1).unlink()
    first = everything(journal.folder)[0]
    assert isinstance(first, UsageRecord)
    assert first.amount_nano > 0


def test_a_journal_has_one_owner(journal: Journal) -> None:
    assert take_lock(journal.folder) is None
    assert DeadJournal.open(journal.folder) is None
    journal.close()
    dead = DeadJournal.open(journal.folder)
    assert dead is not None
    assert DeadJournal.open(journal.folder) is None
    dead.remove()
    assert not journal.folder.exists()
    assert DeadJournal.open(journal.folder) is None


def test_a_lock_that_is_taken_as_its_folder_goes_is_the_lock_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.open(tmp_path, uuid7(), SETTINGS)
    opened = os.open

    def open_then_lose(path: Path, *options: Any) -> int:
        fd = opened(path, *options)
        if Path(path).name == "lock":
            monkeypatch.setattr(os, "open", opened)
            journal.remove()
        return fd

    monkeypatch.setattr(os, "open", open_then_lose)
    assert take_lock(journal.folder) is None


async def test_shipped_segments_are_removed_and_one_is_kept_ahead(journal: Journal) -> None:
    task = asyncio.create_task(journal.run())
    try:
        await eventually(lambda: segments(journal.folder) == [1, 2])
        for n in range(1000):
            journal.append(turn(amount_nano=n))
        journal.shipped(Position(3, 100), 990)
        await eventually(lambda: segments(journal.folder) == [3, 4])
        assert journal.pending == 10
        assert journal.pending_bytes == journal.end.offset - 100
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_it_is_full_one_segment_before_its_bound_and_still_takes_what_has_begun(
    journal: Journal,
) -> None:
    while not journal.is_full:
        journal.append(turn())
    bound, segment = SETTINGS.journal_bytes_max, SETTINGS.journal_segment_bytes
    assert bound - segment <= journal.pending_bytes < bound - segment + 1000
    for _ in range(500):
        journal.append(turn())
    journal.shipped(journal.end, journal.pending)
    assert not journal.is_full
    assert repr(journal).endswith(f"pending=0 at={journal.end.segment}:{journal.end.offset}>")


async def test_an_idle_journal_sleeps_until_an_append_and_syncs_that_soon(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billing.journal.IDLE_S", 60.0)
    task = asyncio.create_task(journal.run())
    try:
        for _ in range(3):
            await eventually(lambda: journal._woken is not None)
            journal.append(turn())
            journal.append(turn())
            end = journal.end
            assert journal._synced != end
            await eventually(lambda end=end: journal._synced == end)
    finally:
        task.cancel()
        await asyncio.wait([task])
    journal.append(turn())
    assert journal._woken is None


async def test_an_idle_journal_still_removes_what_was_shipped(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billing.journal.IDLE_S", 0.01)
    while journal.end.segment < 3:
        journal.append(turn())
    task = asyncio.create_task(journal.run())
    try:
        await eventually(lambda: journal._woken is not None)
        journal.shipped(journal.end, journal.pending)
        await eventually(lambda: segments(journal.folder)[0] == journal.end.segment)
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_without_room_for_a_segment_ahead_it_is_full_until_there_is_some(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    allocate = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    monkeypatch.setattr("billing.journal.AHEAD_RETRY_S", 0.01)
    task = asyncio.create_task(journal.run())
    try:
        await eventually(lambda: journal.is_full)
        written = 0
        with pytest.raises(JournalFull, match="No space left"):
            while True:  # what has begun fits the segment that is there
                journal.append(turn())
                written += 1
        assert written > 200
        monkeypatch.setattr(os, "posix_fallocate", allocate)
        await eventually(lambda: not journal.is_full)
        journal.append(turn())
        assert journal.pending == written + 1
    finally:
        task.cancel()
        await asyncio.wait([task])
    actions = [record.action for record in caplog.records]  # type: ignore[attr-defined]
    assert actions == ["journal_stuck", "journal_full"]


async def test_a_segment_that_append_needed_before_it_was_ahead_is_made_once(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that makes it ahead comes late, and must not put zeros in place of records."""
    task = asyncio.create_task(journal.run())
    try:
        written = [turn(amount_nano=n) for n in range(3000)]
        for record in written:
            journal.append(record)
            if record.amount_nano % 50 == 0:
                await asyncio.sleep(0)
        await eventually(lambda: journal._has_ahead)
        assert everything(journal.folder, journal.end) == written
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_sync_that_fails_refuses_new_turns_until_one_succeeds(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("billing.journal._sync_files", fail)
    task = asyncio.create_task(journal.run())
    try:
        journal.append(turn())
        await eventually(lambda: journal.is_full)
        monkeypatch.undo()
        await eventually(lambda: not journal.is_full)
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_disk_that_is_read_only_now_ends_no_process_and_leaks_no_file(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    while len(segments(journal.folder)) < 4:
        journal.append(turn())
    retired = [mapped for _, mapped in journal._retired]
    monkeypatch.setattr(os, "fdatasync", refuse)
    task = asyncio.create_task(journal.run())
    assert len(retired) > 1
    await eventually(lambda: journal.is_full and all(mapped.closed for mapped in retired))
    monkeypatch.undo()
    monkeypatch.setattr("billing.journal._remove_files", refuse)
    journal.shipped(journal.end, 1)
    await eventually(lambda: not journal.is_full)
    assert not task.done()
    monkeypatch.undo()
    await eventually(lambda: 1 not in segments(journal.folder))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_closing_twice_is_closing_once(journal: Journal) -> None:
    journal.append(turn())
    journal.close()
    journal.close()
    assert len(everything(journal.folder)) == 1


def _crc(payload: bytes) -> int:
    from billing.journal_files import checksum

    return checksum(payload)
