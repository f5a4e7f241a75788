"""A dead process's journal: shipped by whoever comes, once, to the last turn that it acknowledged."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from billing import recovery
from billing.incarnations import close_incarnation
from billing.journal import Journal
from billing.journal_files import START, read_batch, segment_file
from billing.recovery import ProcessLives, Recovery, abandon, adopt, journal_folders, recover
from billing.shipment import UnknownIncarnation
from config.defaults import Settings
from config.ids import uuid7
from gateway.__main__ import main
from tests.journals import balances, incarnate, journal_of, open_accounts, turn, turns
from tests.waiting import eventually

APPENDS_FOR_EVER = """
import sys, uuid
from pathlib import Path
from billing.journal import Journal
from config.defaults import Settings
from tests.journals import turn
journal = Journal.open(Path(sys.argv[1]), uuid.UUID(sys.argv[2]), Settings(journal_segment_bytes=2**16))
while True:
    record = turn(amount_nano=1)
    journal.append(record)
    print(record.turn_id, flush=True)
"""


@pytest.fixture(autouse=True)
async def accounts(pool: asyncpg.Pool) -> None:
    await open_accounts(pool, 2, balance_nano=1_000_000)


async def a_dead_one(pool: asyncpg.Pool, settings: Settings, root: Path, *amounts: int) -> Path:
    """The folder of a journal with turns of these amounts, its lock free."""
    journal = await journal_of(pool, settings, root, *(turn(amount_nano=amount) for amount in amounts))
    journal.close()
    return journal.folder


async def states(pool: asyncpg.Pool) -> list[str]:
    return [row["state"] for row in await pool.fetch("select state from incarnations order by id")]


async def leased(pool: asyncpg.Pool) -> int:
    found: int = await pool.fetchval("select sum(leased_nano)::bigint from ledger_accounts")
    return found


async def test_what_a_killed_process_acknowledged_is_in_the_book_and_nothing_twice(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    for enough in (50, 1000):
        id_ = await incarnate(pool, tmp_path, lease_nano=100_000)
        arguments = [sys.executable, "-c", APPENDS_FOR_EVER, str(tmp_path), str(id_)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:  # noqa: ASYNC220
            assert child.stdout is not None
            acknowledged = [child.stdout.readline() for _ in range(enough)]
            with pytest.raises(ProcessLives):
                await recover(tmp_path / str(id_), pool, settings)
            os.kill(child.pid, signal.SIGKILL)
            acknowledged += child.stdout.readlines()
        (done,) = await adopt(tmp_path, pool, settings)
        there = {row[0].hex for row in await pool.fetch("select turn_id from usage")}
        assert {line.strip() for line in acknowledged if line.endswith("\n")} <= there
        assert done.turns == done.records == done.amount_nano
        assert (
            len(acknowledged) <= done.records <= len(acknowledged) + 1
        )  # one may not have been said any more
    assert journal_folders(tmp_path) == []
    assert await states(pool) == ["closed", "closed"]
    assert (await balances(pool))[0] == 1_000_000 - await turns(pool)
    assert await leased(pool) == 0


async def test_a_journal_that_was_shipped_in_part_is_shipped_from_there(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    folder = await a_dead_one(pool, settings, tmp_path, 1, 2, 4)
    batch = read_batch(folder, START, 1, None)
    assert batch is not None
    await pool.execute("update incarnations set shipped_segment = $1, shipped_offset = $2", *batch.next)
    (done,) = await adopt(tmp_path, pool, settings)
    assert (done.records, done.amount_nano, done.accounts) == (2, 6, {1: 6})


async def test_two_adopters_at_once_take_each_journal_once(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    for _ in range(6):
        await a_dead_one(pool, settings, tmp_path, 10)
    found = await asyncio.gather(*(adopt(tmp_path, pool, settings) for _ in range(3)))
    assert sorted(done.records for one in found for done in one if done.records) == [1] * 6
    assert await turns(pool) == 6
    assert await states(pool) == ["closed"] * 6


async def test_the_journal_of_a_living_process_is_left_alone(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    journal = await journal_of(pool, settings, tmp_path, turn())
    assert await adopt(tmp_path, pool, settings) == []
    with pytest.raises(ProcessLives):
        await abandon(journal.incarnation_id, journal.folder, pool, settings)
    assert await states(pool) == ["live"]
    journal.close()


async def test_the_journal_of_another_hosts_process_is_left_until_nobody_hears_of_that(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    """Locks of some shared disks hold on one host only."""
    folder = await a_dead_one(pool, settings, tmp_path, 10)
    await pool.execute("update incarnations set host = 'elsewhere'")
    unasked = Recovery(tmp_path, pool, settings)
    await unasked._adopt(folder)
    assert (await states(pool), await turns(pool), folder.exists()) == (["live"], 0, True)
    await pool.execute(
        "update incarnations set seen_at = seen_at - make_interval(secs => $1)", recovery.SILENT_S
    )
    await unasked._adopt(folder)
    assert (await states(pool), await turns(pool), folder.exists()) == (["closed"], 1, False)


async def test_turns_of_one_that_was_given_up_are_paid_by_the_platform(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    folder = await a_dead_one(pool, settings, tmp_path, 30, 12)
    await abandon(UUID(folder.name), None, pool, settings)
    assert await leased(pool) == 0
    (done,) = await adopt(tmp_path, pool, settings)
    assert (done.state, done.amount_nano, done.lost_nano, done.accounts) == ("abandoned", 0, 42, {})
    assert await balances(pool) == [1_000_000] * 2
    assert await pool.fetchval("select sum(loss_nano) from usage") == 42
    assert not folder.exists()


async def test_a_folder_that_outlived_its_closed_incarnation_only_goes(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = await a_dead_one(pool, settings, tmp_path)
    async with pool.acquire() as connection, connection.transaction():
        await close_incarnation(connection, UUID(folder.name), "closed")
    (done,) = await adopt(tmp_path, pool, settings)
    assert (done.state, done.records) == ("closed", 0)
    assert not folder.exists()
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


async def test_a_journal_of_another_database_is_left_and_told_once_and_an_empty_one_goes(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(recovery, "ADOPT_S", 0.01)
    for record in (turn(), None):
        journal = Journal.open(tmp_path, uuid7(), settings)
        if record:
            journal.append(record)
        journal.close()
    mine = await a_dead_one(pool, settings, tmp_path, 5)
    task = asyncio.create_task(Recovery(tmp_path, pool, settings).run())
    await eventually(lambda: len(journal_folders(tmp_path)) == 1)
    await asyncio.gather(*(eventually(lambda: not mine.exists()) for _ in range(3)))
    task.cancel()
    await asyncio.wait([task])
    told = [getattr(record, "action", "") for record in caplog.records]
    assert told.count("journal_unknown") == 1
    with pytest.raises(UnknownIncarnation):
        await recover(journal_folders(tmp_path)[0], pool, settings)


async def test_a_recovery_without_postgresql_waits_for_it(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "ADOPT_S", 0.01)
    folder = await a_dead_one(pool, settings, tmp_path, 5)
    await pool.execute("alter table incarnations rename to gone")
    task = asyncio.create_task(Recovery(tmp_path, pool, settings).run())
    await asyncio.sleep(0)
    await pool.execute("alter table gone rename to incarnations")
    await eventually(lambda: not folder.exists())
    task.cancel()
    await asyncio.wait([task])
    assert await states(pool) == ["closed"]


def test_what_a_process_left_that_died_while_it_made_a_folder_goes_in_time(tmp_path: Path) -> None:
    old, young = tmp_path / f".new-{uuid7()}", tmp_path / f".gone-{uuid7()}"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (0, 0))
    recovery._sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [young.name]


async def cli(settings: Settings, capsys: pytest.CaptureFixture[str], *typed: str, code: int = 0) -> str:
    assert await asyncio.to_thread(main, typed) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


@pytest.fixture(autouse=True)
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    monkeypatch.setenv("REDIS_URL", settings.redis_url)
    monkeypatch.setenv("POOLGATE_DATA_DIR", settings.data_dir)


async def test_recover_ships_a_folder_of_journals_and_says_what_it_did(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await a_dead_one(pool, settings, tmp_path, 25_000, 50_000)
    living = await journal_of(pool, settings, tmp_path, turn(), lease_nano=10)
    shown = await cli(settings, capsys, "recover", str(tmp_path))
    assert "0.000075 SAR" in shown
    assert "its process lives" in shown
    assert "a1" in shown
    living.close()
    one = json.loads(await cli(settings, capsys, "recover", str(living.folder), "--json"))
    assert [(done["state"], done["records"], done["quarantined"]) for done in one] == [("closed", 1, 1)]
    assert "there is no journal" in await cli(settings, capsys, "recover", str(tmp_path))
    assert "is no folder" in await cli(settings, capsys, "recover", str(tmp_path / "none"), code=1)


async def test_recover_abandon_returns_the_leases_of_a_lost_journal_and_of_no_living_process(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    living = await journal_of(pool, settings, tmp_path, turn())
    id_ = str(living.incarnation_id)
    for named in (id_, str(living.folder)):
        assert "stop it first" in await cli(settings, capsys, "recover", "--abandon", named, code=1)
    living.close()
    segment_file(living.folder, 1).unlink()
    assert "its leases are back" in await cli(settings, capsys, "recover", "--abandon", id_)
    assert (await states(pool), await leased(pool)) == (["abandoned"], 0)
    again = json.loads(await cli(settings, capsys, "recover", "--abandon", id_, "--json"))
    assert again[0]["state"] == "abandoned"
    refused = await cli(settings, capsys, "recover", "--abandon", str(uuid7()), code=1)
    assert "knows no process" in refused
    assert "names no single process" in await cli(
        settings, capsys, "recover", "--abandon", str(tmp_path), code=1
    )
