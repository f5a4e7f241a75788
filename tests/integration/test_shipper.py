"""The shipper on a real PostgreSQL: every turn is in the book exactly once, whatever happens on the way."""

from pathlib import Path

import asyncpg
import pytest

from billing.shipper import Shipper
from config.defaults import Settings
from tests.journals import balances, journal_of, of_platform, open_accounts, turn, turns


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
    assert row == {name: getattr(record, name) for name in row}
    assert await balances(pool) == [999_900, 1_000_000, 1_000_000]
    assert [await of_platform(pool, kind) for kind in ("earnings", "fee", "loss")] == [75 + 6, 25, -6]
    assert await pool.fetchval("select last_used_at is not null from api_keys where id = 1")
    assert (journal.pending, journal.pending_bytes) == (0, 0)
    assert await turns(pool) == 2
    journal.remove()
