"""The shipper on a real PostgreSQL: every turn is in the book exactly once, whatever happens on the way."""

import asyncio
import math
import os
import random
import string
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import pytest

from billing import audit
from billing.incarnations import close_incarnation
from billing.journal import Journal
from billing.journal_files import START, Batch, read_batch, segment_file
from billing.shipment import Shipped
from billing.shipper import Shipper
from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.ids import uuid7
from config.metrics import Metrics
from tests.fakes.stores import kill, using
from tests.journals import NOW, balances, journal_of, of_platform, open_accounts, turn, turns
from tests.waiting import eventually


def random_text(length: int) -> str:
    """Nothing that PostgreSQL could compress."""
    return "".join(random.Random(3).choices(string.printable[:62], k=length))


@pytest.fixture(autouse=True)
async def accounts(pool: asyncpg.Pool) -> None:
    await open_accounts(pool, 3, balance_nano=1_000_000)


async def test_a_turn_is_in_the_book_as_it_was_and_charged(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    record = turn(node_id=None, ttft_ms=None, estimated=True, provider_id=2, loss_nano=8)
    journal = await journal_of(pool, settings, tmp_path, record, turn(amount_nano=0, provider_id=2))
    await Shipper(pool, settings, journal).ship_all()
    row = dict(await pool.fetchrow("select * from usage where amount_nano > 0"))
    assert row.pop("posting_id") is not None
    assert row.pop("started_at").timestamp() == pytest.approx(record.started_at, abs=1e-6)
    row["turn_id"] = row["turn_id"].hex
    assert row == {name: getattr(record, name) for name in row}
    assert await balances(pool) == [999_900, 1_000_000, 1_000_000]
    assert [await of_platform(pool, kind) for kind in ("earnings", "fee", "loss")] == [75 + 6, 25, -6]
    assert await pool.fetchval("select last_used_at is not null from api_keys where id = 1")
    assert (journal.pending, journal.pending_bytes) == (0, 0)
    assert await turns(pool) == 2
    journal.remove()


async def assert_sound(pool: asyncpg.Pool, settings: Settings) -> None:
    """The audit finds nothing broken, whatever happened."""
    findings = await audit.run(pool, settings)
    assert [finding for finding in findings if finding.state == "broken"] == []


class LosesAnswers(Shipper):
    """PostgreSQL commits, and the connection is gone before it could say so."""

    lost = 0

    async def _ship(self, batch: Batch) -> Shipped:
        shipped = await super()._ship(batch)
        self.lost += 1
        if self.lost % 2:
            raise ConnectionResetError
        return shipped


@asynccontextmanager
async def running(part: Shipper | Journal) -> AsyncIterator[None]:
    task = asyncio.create_task(part.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def actions(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [getattr(record, "action", "") for record in caplog.records]


async def test_batches_whose_answers_were_lost_are_charged_once(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    records = [turn(account_id=1 + n % 3) for n in range(60)]
    journal = await journal_of(pool, settings, tmp_path, *records)
    shipper = LosesAnswers(pool, replace(settings, usage_batch_max=7), journal)
    async with running(shipper):
        await eventually(lambda: not journal.pending)
    assert shipper.lost == 9
    assert (await turns(pool), await balances(pool)) == (60, [998_000] * 3)
    assert journal.pending_bytes == 0
    await assert_sound(pool, settings)


async def test_a_turn_that_comes_twice_is_charged_once_in_a_batch_and_over_batches_and_journals(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    record, other = turn(budgets=()), turn(account_id=2)
    journals = [await journal_of(pool, settings, tmp_path, record, other, record, record) for _ in range(2)]
    journals[1].append(other)
    small = replace(settings, usage_batch_max=3)
    await asyncio.gather(*(Shipper(pool, small, journal).ship_all() for journal in journals))
    assert (await turns(pool), await balances(pool)) == (2, [999_900, 999_900, 1_000_000])
    await assert_sound(pool, settings)


async def test_shippers_side_by_side_charge_each_turn_once_and_none_gives_up(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    records = [turn(account_id=1 + n % 3, provider_id=n % 2 + 1, amount_nano=7) for n in range(900)]
    orders = [records, records[::-1], records[::2] + records[1::2], records[::-1]]
    journals = [await journal_of(pool, settings, tmp_path, *order) for order in orders]
    small = replace(settings, usage_batch_max=50)
    shippers = [Shipper(pool, small, journal) for journal in journals]
    assert await asyncio.gather(*(shipper.close(60) for shipper in shippers)) == [True] * 4
    assert (await turns(pool), await balances(pool)) == (900, [1_000_000 - 2100] * 3)
    assert await of_platform(pool, "earnings") + await of_platform(pool, "fee") == 6300
    await assert_sound(pool, settings)


async def test_a_connection_killed_in_the_middle_of_a_batch_changes_nothing(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = await journal_of(pool, settings, tmp_path, turn(), turn(account_id=2))
    shipper = Shipper(pool, settings, journal)
    async with pool.acquire() as blocker, running(shipper):
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("select from ledger_accounts where owner_id = 2 for update")

        async def stuck() -> int | None:  # its rows are inserted, its wallets are not charged
            found: int | None = await pool.fetchval(
                "select pid from pg_stat_activity where wait_event_type = 'Lock' and query like '%post_turns%'"
                " and datname = current_database()"
            )
            return found

        await eventually(stuck)
        assert await pool.fetchval("select pg_terminate_backend($1)", await stuck())
        await eventually(lambda: "usage_unwritable" in actions(caplog))
        assert journal.pending == 2
        await transaction.rollback()
        await eventually(lambda: not journal.pending)
    assert (await turns(pool), await balances(pool)) == (2, [999_900, 999_900, 1_000_000])
    await assert_sound(pool, settings)


@pytest.fixture
def durable_stores(tmp_path: Path) -> Iterator[EmbeddedStores]:
    """Stores of which a kill takes nothing that was committed, unlike the tests' usual ones."""
    with EmbeddedStores.start(tmp_path / "durable") as stores:
        yield stores


async def test_turns_wait_in_the_journal_for_postgresql_to_come_back(
    durable_stores: EmbeddedStores, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "poolgate")
    async with using(durable_stores, settings) as (changed, own_pool):
        await open_accounts(own_pool, 1, balance_nano=1_000_000)
        journal = await journal_of(own_pool, changed, tmp_path, turn())
        shipper = Shipper(own_pool, changed, journal)
        async with running(shipper):
            await eventually(lambda: not journal.pending)
            kill(durable_stores, "postgres")
            for _ in range(500):
                journal.append(turn())
            await eventually(lambda: "usage_unwritable" in actions(caplog))
            durable_stores.restart("postgres")
            await eventually(lambda: not journal.pending)
        assert (await turns(own_pool), await balances(own_pool)) == (501, [1_000_000 - 50_100])
        await assert_sound(own_pool, settings)
    told = [action for action in actions(caplog) if action.startswith("usage_")]
    assert told == ["usage_unwritable", "usage_writable"]


async def test_closing_gives_up_in_time_and_leaves_the_journal_to_whoever_comes(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = await journal_of(pool, settings, tmp_path, turn(), turn())
    await pool.close()
    assert not await Shipper(pool, settings, journal).close(timeout_s=0.05)
    assert actions(caplog) == ["usage_unwritable", "journal_left"]
    assert journal.pending == 2


@pytest.mark.parametrize(
    "fault",
    [
        {"model": "nul\0byte"}, {"model": "\ud800"}, {"prompt_tokens": -1}, {"prompt_tokens": 2**63},
        {"prompt_tokens": 2**64}, {"started_at": float("nan")}, {"started_at": 1e300}, {"started_at": -1e300},
        {"model": None}, {"status": "many"}, {"turn_id": "no uuid"}, {"turn_id": "nul\0byte"},
        {"amount_nano": 100_001}, {"amount_nano": 2**63 - 1, "account_id": 3}, {"account_id": 99},
        {"started_at": NOW - 500 * 86_400}, {"started_at": 0.0}, {"surface": random_text(8000)},
    ],
    ids=lambda fault: repr(fault)[:40],
)  # fmt: skip
async def test_a_record_at_fault_goes_to_quarantine_and_blocks_no_other(
    pool: asyncpg.Pool,
    settings: Settings,
    tmp_path: Path,
    fault: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    records = [turn(**fault) if n == 3 else turn() for n in range(7)]
    journal = await journal_of(pool, settings, tmp_path, *records)
    metrics = Metrics()
    assert await Shipper(pool, settings, journal, metrics).close()
    is_fine = "surface" in fault  # merely long
    assert await turns(pool) == 6 + is_fine
    assert (await balances(pool))[0] == 999_400 - 100 * is_fine
    assert journal.pending == 0
    if not is_fine:
        kept = await pool.fetchrow("select * from usage_quarantine")
        assert "m@start" in kept["record"]
        assert kept["reason"]
        assert actions(caplog) == ["usage_quarantined"]
        assert b"poolgate_usage_quarantined_total 1.0" in metrics.render()
    await assert_sound(pool, settings)


async def test_a_model_name_that_no_index_takes_goes_to_quarantine(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    journal = await journal_of(pool, settings, tmp_path, turn(), turn(model=random_text(8000)), turn())
    assert await Shipper(pool, settings, journal).close()
    assert (await turns(pool), await pool.fetchval("select count(*) from usage_quarantine")) == (2, 1)
    await assert_sound(pool, settings)


async def test_a_piece_of_the_journal_that_is_no_record_is_kept_and_passed_over(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = await journal_of(pool, settings, tmp_path, *(turn() for _ in range(9)))
    batch = read_batch(journal.folder, START, 9, None)
    assert batch is not None
    with segment_file(journal.folder, 1).open("r+b") as file:
        file.seek(batch.ends[1] + 60)
        file.write(b"spoilt")
        file.seek(batch.ends[4])
        file.write(b"\xff\xff\xff\xff")
    assert await Shipper(pool, settings, journal).close()
    assert await turns(pool) == 4  # the second bad one has hidden what followed
    reasons = await pool.fetch("select turn_id, reason, record from usage_quarantine order by id")
    assert [row["turn_id"] for row in reasons] == [
        f"{journal.incarnation_id}/1/{batch.ends[at]}" for at in (1, 4)
    ]
    assert b"spoilt" in bytes.fromhex(reasons[0]["record"])
    kept = reasons[1]["reason"].rpartition(" as ")[2]
    assert os.stat(kept).st_ino == os.stat(segment_file(journal.folder, 1)).st_ino  # noqa: PTH116
    assert actions(caplog) == ["usage_quarantined"] * 2


async def test_turns_of_an_incarnation_that_was_given_up_are_paid_by_the_platform(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = await journal_of(pool, settings, tmp_path, turn(provider_id=2))
    shipper = Shipper(pool, settings, journal)
    await shipper.ship_all()
    async with pool.acquire() as connection, connection.transaction():
        await close_incarnation(connection, journal.incarnation_id, "abandoned")
    for _ in range(2):
        journal.append(turn(provider_id=2))
    await shipper.ship_all()
    assert shipper.is_abandoned
    assert await balances(pool) == [999_900, 1_000_000, 1_000_000]
    assert await of_platform(pool, "loss") == -150, "the provider's share; a fee to itself it does not pay"
    assert await of_platform(pool, "earnings") == 225
    assert await pool.fetchval("select sum(amount_nano) from usage_days") == 100, "nobody spent the rest"
    assert await turns(pool) == 3
    assert actions(caplog) == ["incarnation_abandoned"]
    assert await pool.fetchval("select sum(leased_nano) from ledger_accounts") == 0
    await assert_sound(pool, settings)


async def test_the_books_position_counts_after_its_return_from_a_backup(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    journal = await journal_of(pool, settings, tmp_path, turn(), turn(), turn())
    shipper = Shipper(pool, replace(settings, usage_batch_max=1), journal)
    await shipper.ship_once()
    kept = await pool.fetchrow("select shipped_segment, shipped_offset from incarnations")
    await shipper.ship_all()
    await pool.execute("update incarnations set shipped_segment = $1, shipped_offset = $2", *kept)
    journal.append(turn())
    await shipper.ship_all()
    assert (await turns(pool), journal.pending) == (4, 0)
    assert (await balances(pool))[0] == 999_600


async def test_a_batch_that_takes_too_long_comes_again_smaller(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    class Slow(Shipper):
        sizes: ClassVar[list[int]] = []

        async def _ship(self, batch: Batch) -> Shipped:
            self.sizes.append(len(batch.payloads))
            if len(batch.payloads) > 10:
                raise TimeoutError
            return await super()._ship(batch)

    journal = await journal_of(pool, settings, tmp_path, *(turn() for _ in range(40)))
    assert await Slow(pool, replace(settings, usage_batch_max=40), journal).close()
    assert Slow.sizes[:4] == [40, 20, 10, 20]
    assert (await turns(pool), journal.pending) == (40, 0)


async def test_the_claim_of_a_keyed_turn_is_finished_by_its_record_alone(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    mine, foreign = turn(idempotency_key="k"), turn(idempotency_key="taken", amount_nano=0)
    journal = await journal_of(pool, settings, tmp_path, mine, foreign)
    for key, turn_id in (("k", mine.turn_id), ("taken", uuid7()), ("other", mine.turn_id)):
        await pool.execute(
            "insert into idempotency_claims (account_id, key, request_hash, incarnation_id, turn_id)"
            " values (1, $1, '', $2, $3)",
            key, journal.incarnation_id, turn_id,
        )  # fmt: skip
    await Shipper(pool, settings, journal).ship_all()
    rows = await pool.fetch("select key, state, finished_at is not null from idempotency_claims order by key")
    assert [tuple(row) for row in rows] == [
        ("k", "finished", True),
        ("other", "running", False),
        ("taken", "running", False),
    ]


async def test_rollups_add_up_over_batches_hours_days_keys_and_models(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    records = [
        turn(
            account_id=1 + n % 3, key_id=1 + n % 4, model=f"m{n % 2}", started_at=NOW - n * 997, amount_nano=n % 5,
            cached_tokens=n % 7, provider_id=n % 3 or None,
        )
        for n in range(400)
    ]  # fmt: skip
    journal = await journal_of(pool, settings, tmp_path, *records)
    await Shipper(pool, replace(settings, usage_batch_max=90), journal).ship_all()
    assert await turns(pool) == 400
    assert await pool.fetchval("select sum(turns) from usage_days") == 400
    await assert_sound(pool, settings)


async def test_turns_count_in_their_budgets_once_and_not_when_the_platform_pays(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    hour = NOW - NOW % 3600
    in_both = turn(budgets=((1, hour), (2, -math.inf)), amount_nano=40)
    journal = await journal_of(
        pool, settings, tmp_path, in_both, turn(budgets=((1, hour),), amount_nano=2), in_both
    )
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "insert into budgets (account_id, period, limit_nano) values (1, 'hour', 1000), (1, 'total', 1000)"
        )
        await connection.execute(
            "insert into budget_windows (budget_id, starts_at, ends_at, leased_nano)"
            " values (1, to_timestamp($1), 'infinity', 500), (2, '-infinity', 'infinity', 500)",
            hour,
        )
        await connection.execute(
            "insert into budget_leases (incarnation_id, budget_id, starts_at, granted_nano)"
            " select $1, budget_id, starts_at, 500 from budget_windows",
            journal.incarnation_id,
        )
    shipper = LosesAnswers(pool, settings, journal)
    assert await shipper.close()
    windows = "select spent_nano, leased_nano from budget_windows order by budget_id"
    assert [tuple(row) for row in await pool.fetch(windows)] == [(42, 458), (40, 460)]
    async with pool.acquire() as connection, connection.transaction():
        await close_incarnation(connection, journal.incarnation_id, "abandoned")
    journal.append(turn(budgets=((1, hour),)))
    await shipper.ship_all()
    assert [tuple(row) for row in await pool.fetch(windows)] == [(42, 0), (40, 0)]
    await assert_sound(pool, settings)


async def test_seen_moves_with_what_is_shipped(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path
) -> None:
    journal = await journal_of(pool, settings, tmp_path, turn())
    await pool.execute("update incarnations set seen_at = '2001-01-01'")
    await Shipper(pool, settings, journal).ship_all()
    row = await pool.fetchrow("select seen_at, shipped_segment, shipped_offset from incarnations")
    assert row["seen_at"].year > 2001
    assert (row["shipped_segment"], row["shipped_offset"]) == journal.end


async def test_a_journal_that_the_database_does_not_know_waits_until_it_does(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal.open(tmp_path, uuid7(), settings)
    journal.append(turn(amount_nano=0))
    shipper = Shipper(pool, settings, journal)
    async with running(shipper):
        await eventually(lambda: "usage_unwritable" in actions(caplog))
        await pool.execute(
            "insert into incarnations (id, host, pid, journal) values ($1, 'here', 1, '')",
            journal.incarnation_id,
        )
        await eventually(lambda: not journal.pending)
    assert repr(shipper).endswith(f"at={journal.end}>")


async def test_a_record_of_another_version_goes_to_quarantine(
    pool: asyncpg.Pool, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await journal_of(pool, settings, tmp_path, turn())
    monkeypatch.setattr("billing.records.VERSION", 2)
    journal.append(turn())
    monkeypatch.undo()
    assert await Shipper(pool, settings, journal).close()
    assert await turns(pool) == 1
    assert "version" in await pool.fetchval("select reason from usage_quarantine")
