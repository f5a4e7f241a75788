"""Budgets on a real PostgreSQL: windows by calendar, hard stops, thresholds told once, changes without a restart."""

import asyncio
import datetime as dt
import json

import asyncpg
import pytest

from billing.budgets import AMOUNT_MAX_NANO, BudgetStore, UnknownBudget, post_budgets
from billing.lease_store import _OPEN_WINDOWS
from billing.leases import Budget, BudgetExceeded
from config.defaults import Settings
from gateway.__main__ import main
from tests.integration.test_leases import Process, make_account, process
from tests.waiting import eventually

RICH = 10**12


@pytest.fixture
def store(pool: asyncpg.Pool) -> BudgetStore:
    return BudgetStore(pool)


async def budget(
    store: BudgetStore, account: int, period: str, limit_nano: int, key: int | None = None
) -> Budget:
    made = await store.set(account, key, period, limit_nano)
    return Budget(made.id, key, period)


async def make_key(pool: asyncpg.Pool, account: int) -> int:
    return await pool.fetchval(
        "insert into api_keys (account_id, digest, prefix) values ($1, sha256('of the key'), 'sk') returning id",
        account,
    )


async def spend(at: Process, account: int, amount: int, budgets: tuple[Budget, ...]) -> None:
    """A turn that is charged its hold, shipped with its budgets."""
    hold = await at.leases.hold(account, amount, budgets)
    at.settle(account, hold, amount)
    await at.ship()
    charges = [(id_, dt.datetime.fromtimestamp(start, dt.UTC), amount) for id_, start in hold.budgets]
    async with at.pool.acquire() as connection, connection.transaction():
        await post_budgets(connection, at.incarnation.id, charges)


async def windows(pool: asyncpg.Pool) -> list[asyncpg.Record]:
    return await pool.fetch("select * from budget_windows order by budget_id, starts_at")


async def open_at(pool: asyncpg.Pool, budget_id: int, at: str) -> tuple[dt.datetime, dt.datetime]:
    """The window in which this moment lies, made if it lacks."""
    moment = dt.datetime.fromisoformat(at)
    await pool.execute(_OPEN_WINDOWS, [budget_id], moment)
    rows = await pool.fetch(
        "select starts_at, ends_at from budget_windows where budget_id = $1 and starts_at <= $2 and $2 < ends_at",
        budget_id, moment,
    )  # fmt: skip
    assert len(rows) == 1
    return rows[0]["starts_at"], rows[0]["ends_at"]


async def test_a_turn_counts_in_every_window_of_its_key_and_account(
    pool: asyncpg.Pool, settings: Settings, store: BudgetStore
) -> None:
    account = await make_account(pool, "acme", RICH)
    key = await make_key(pool, account)
    budgets = (
        await budget(store, account, "hour", 1_000),
        await budget(store, account, "total", 5_000),
        await budget(store, account, "day", 300, key),
    )
    async with process(pool, settings) as one:
        for _ in range(3):
            await spend(one, account, 100, budgets)
        with pytest.raises(BudgetExceeded) as refused:
            await one.leases.hold(account, 100, budgets)
        assert refused.value.budget == budgets[2]
        await spend(one, account, 700, budgets[:2])  # another key of the account
        with pytest.raises(BudgetExceeded) as refused:
            await one.leases.hold(account, 1, budgets[:2])
        assert refused.value.budget == budgets[0]
    assert [state.spent_nano for state in await store.list()] == [1_000, 1_000, 300]


async def test_a_free_turn_passes_an_exhausted_budget(
    pool: asyncpg.Pool, settings: Settings, store: BudgetStore
) -> None:
    account = await make_account(pool, "acme", RICH)
    none = await budget(store, account, "day", 0)
    async with process(pool, settings) as one:
        with pytest.raises(BudgetExceeded):
            await one.leases.hold(account, 1, (none,))
        hold = await one.leases.hold(account, 0, (none,))
        assert (hold.settle(0), hold.budgets) == ((0, 0), ())


async def test_two_processes_never_overspend_a_budget(
    pool: asyncpg.Pool, settings: Settings, store: BudgetStore
) -> None:
    account = await make_account(pool, "acme", RICH)
    budgets = (await budget(store, account, "month", 40 * 100),)
    served: list[int] = []

    async def turn(at: Process) -> None:
        try:
            hold = await at.leases.hold(account, 3 * 100, budgets)
        except BudgetExceeded:
            return
        await asyncio.sleep(0.005)
        hold.settle(100)
        served.append(1)

    async with process(pool, settings) as one, process(pool, settings) as two:
        await asyncio.gather(*(turn(at) for at in (one, two) for _ in range(60)))
        assert 38 <= len(served) <= 40


async def test_an_exhausted_budget_of_one_key_does_not_hold_up_another_key(
    pool: asyncpg.Pool, settings: Settings, store: BudgetStore
) -> None:
    account = await make_account(pool, "acme", RICH)
    key = await make_key(pool, account)
    tight = (await budget(store, account, "day", 100, key),)
    async with process(pool, settings, hold_wait_s=30.0) as one:
        first = await one.leases.hold(account, 100, tight)
        waits = asyncio.create_task(one.leases.hold(account, 100, tight))
        await eventually(lambda: one.leases._accounts[account].waiters)
        await one.leases.hold(account, 100, ())
        assert not waits.done()
        first.void()
        await waits


async def test_raising_and_resetting_take_effect_without_a_restart(
    pool: asyncpg.Pool, settings: Settings, store: BudgetStore
) -> None:
    account = await make_account(pool, "acme", RICH)
    day = await budget(store, account, "day", 100)

    async def spends() -> bool:
        try:
            await spend(one, account, 100, (day,))
        except BudgetExceeded:
            return False
        return True

    async with process(pool, settings) as one:
        assert await spends()
        assert not await spends()
        await store.set(account, None, "day", 200)
        await eventually(spends)
        assert not await spends()
        assert (await store.reset(day.id)).left_nano == 200
        await eventually(spends)
        await store.set(account, None, "day", 50)  # lower than spent
        with pytest.raises(BudgetExceeded):
            while True:
                await spend(one, account, 1, (day,))
        await store.remove(day.id)
        await eventually(spends)


async def test_a_lowered_limit_takes_back_what_is_free(
    pool: asyncpg.Pool, settings: Settings, store: BudgetStore
) -> None:
    account = await make_account(pool, "acme", RICH)
    day = await budget(store, account, "day", 10_000)
    async with process(pool, settings) as one:
        await spend(one, account, 10, (day,))
        leased = (await store.list())[0].leased_nano
        assert leased > 0
        await store.set(account, None, "day", 10)

        async def is_returned() -> bool:
            return (await store.list())[0].leased_nano == 0

        await eventually(is_returned)


async def test_thresholds_are_told_once_a_window_and_once_more_after_a_reset(
    pool: asyncpg.Pool, settings: Settings, store: BudgetStore
) -> None:
    account = await make_account(pool, "acme", RICH)
    day = await budget(store, account, "day", 1_000)

    async def told() -> list[str]:
        return [row["kind"] for row in await pool.fetch("select kind from billing_events order by id")]

    async with process(pool, settings) as one:
        await spend(one, account, 799, (day,))
        assert await told() == []
        await spend(one, account, 1, (day,))
        assert await told() == ["budget_threshold"]
        await spend(one, account, 100, (day,))
        await spend(one, account, 100, (day,))
        assert await told() == ["budget_threshold", "budget_exhausted"]
        await store.reset(day.id)
        await eventually(lambda: one.leases.try_hold(account, 1, ()) is not None)
        payload = json.loads(
            await pool.fetchval("select payload from billing_events where kind = 'budget_exhausted'")
        )
        assert (payload["budget_id"], payload["limit_nano"], payload["spent_nano"]) == (day.id, 1_000, 1_000)
        hold = await one.leases.hold(account, 900, (day,))
        hold.settle(900)
        start = dt.datetime.fromtimestamp(hold.budgets[0][1], dt.UTC)
        async with pool.acquire() as connection, connection.transaction():
            await post_budgets(connection, one.incarnation.id, [(day.id, start, 900)])
        assert await told() == ["budget_threshold", "budget_exhausted", "budget_threshold"]


async def test_the_largest_budget_that_can_be_set_posts_its_turns(
    pool: asyncpg.Pool, settings: Settings, store: BudgetStore
) -> None:
    account = await make_account(pool, "acme", RICH)
    day = await budget(store, account, "day", AMOUNT_MAX_NANO)
    async with process(pool, settings) as one:
        await spend(one, account, 7, (day,))
    assert [state.spent_nano for state in await store.list()] == [7]
    await store.set(account, None, "day", AMOUNT_MAX_NANO, 100)


async def test_charges_of_a_removed_budget_are_skipped(
    pool: asyncpg.Pool, settings: Settings, store: BudgetStore
) -> None:
    account = await make_account(pool, "acme", RICH)
    day = await budget(store, account, "day", 1_000)
    async with process(pool, settings) as one:
        hold = await one.leases.hold(account, 100, (day,))
        await store.remove(day.id)
        hold.settle(100)
        start = dt.datetime.fromtimestamp(hold.budgets[0][1], dt.UTC)
        async with pool.acquire() as connection, connection.transaction():
            await post_budgets(connection, one.incarnation.id, [(day.id, start, 100)])
        assert await windows(pool) == []
        await one.leases.hold(account, 5_000, (day,))  # whoever still names it is not held back


async def test_a_turn_belongs_to_the_window_of_its_start_and_the_next_window_is_whole(
    pool: asyncpg.Pool, settings: Settings, store: BudgetStore
) -> None:
    account = await make_account(pool, "acme", RICH)
    day = await budget(store, account, "day", 1_000)
    async with process(pool, settings) as one:
        hold = await one.leases.hold(account, 1_000, (day,))
        # The window ends now: a third of its real length ago it began.
        await pool.execute("update budget_windows set ends_at = clock_timestamp()")
        one.leases.forget_budget("*")
        second = await one.leases.hold(account, 1_000, (day,))
        assert hold.budgets[0][1] < second.budgets[0][1]
        hold.settle(1_000)
        second.void()
        for start, amount in ((hold.budgets[0][1], 1_000),):
            moment = dt.datetime.fromtimestamp(start, dt.UTC)
            async with pool.acquire() as connection, connection.transaction():
                await post_budgets(connection, one.incarnation.id, [(day.id, moment, amount)])
        old, new = await windows(pool)
        assert (old["spent_nano"], new["spent_nano"]) == (1_000, 0)
        assert new["starts_at"] == old["ends_at"]
        await one.leases.hold(account, 1_000, (day,))


@pytest.mark.parametrize(
    ("zone", "period", "at", "starts", "ends"),
    [
        ("UTC", "hour", "2025-03-05T10:20+00:00", "2025-03-05T10:00+00:00", "2025-03-05T11:00+00:00"),
        ("Asia/Riyadh", "day", "2025-03-05T22:00+00:00", "2025-03-05T21:00+00:00", "2025-03-06T21:00+00:00"),
        ("UTC", "week", "2025-03-05T10:20+00:00", "2025-03-03T00:00+00:00", "2025-03-10T00:00+00:00"),
        ("UTC", "month", "2024-02-10T00:00+00:00", "2024-02-01T00:00+00:00", "2024-03-01T00:00+00:00"),
        # 23 and 25 hours
        ("Europe/Berlin", "day", "2025-03-30T12:00+00:00", "2025-03-29T23:00+00:00", "2025-03-30T22:00+00:00"),
        ("Europe/Berlin", "day", "2025-10-26T12:00+00:00", "2025-10-25T22:00+00:00", "2025-10-26T23:00+00:00"),
        # the hour that comes twice is two hours
        ("America/New_York", "hour", "2025-11-02T05:30+00:00", "2025-11-02T05:00+00:00", "2025-11-02T06:00+00:00"),
        ("America/New_York", "hour", "2025-11-02T06:30+00:00", "2025-11-02T06:00+00:00", "2025-11-02T07:00+00:00"),
        # a day without its midnight, and one with two
        ("Africa/Cairo", "day", "2025-04-25T10:00+00:00", "2025-04-24T22:00+00:00", "2025-04-25T21:00+00:00"),
        ("America/Havana", "day", "2025-11-02T04:30+00:00", "2025-11-01T04:00+00:00", "2025-11-02T05:00+00:00"),
        ("America/Havana", "day", "2025-11-02T05:30+00:00", "2025-11-02T05:00+00:00", "2025-11-03T05:00+00:00"),
    ],
)  # fmt: skip
async def test_windows_go_by_the_calendar_of_the_accounts_zone(
    pool: asyncpg.Pool, store: BudgetStore, zone: str, period: str, at: str, starts: str, ends: str
) -> None:
    account = await make_account(pool, "acme", RICH)
    await pool.execute("update accounts set time_zone = $1", zone)
    made = await budget(store, account, period, 100)
    assert await open_at(pool, made.id, at) == (
        dt.datetime.fromisoformat(starts), dt.datetime.fromisoformat(ends),
    )  # fmt: skip


async def test_a_zone_change_applies_from_the_next_window_on(pool: asyncpg.Pool, store: BudgetStore) -> None:
    account = await make_account(pool, "acme", RICH)
    made = await budget(store, account, "day", 100)
    before = await open_at(pool, made.id, "2025-03-05T10:00+00:00")
    await pool.execute("update accounts set time_zone = 'Asia/Tokyo'")
    assert await open_at(pool, made.id, "2025-03-05T23:00+00:00") == before
    starts, ends = await open_at(pool, made.id, "2025-03-06T00:00+00:00")
    assert (starts, ends.isoformat()) == (before[1], "2025-03-06T15:00:00+00:00")


async def test_a_zone_that_nobody_knows_is_refused(pool: asyncpg.Pool) -> None:
    await make_account(pool, "acme", 0)
    with pytest.raises(asyncpg.DataError):
        await pool.execute("update accounts set time_zone = 'Mars/Olympus'")


@pytest.mark.parametrize(("period", "limit", "soft"), [("year", 1, 80), ("day", -1, 80), ("day", 1, 0)])
async def test_a_budget_that_cannot_be_is_refused(
    pool: asyncpg.Pool, store: BudgetStore, period: str, limit: int, soft: int
) -> None:
    account = await make_account(pool, "acme", 0)
    with pytest.raises(ValueError):
        await store.set(account, None, period, limit, soft)
    for unknown in (
        store.reset(99),
        store.remove(99),
        store.set(99, None, "day", 1),
        store.set(account, 9, "day", 1),
    ):
        with pytest.raises(UnknownBudget):
            await unknown


def test_the_command_line_sets_lists_resets_and_removes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    monkeypatch.setenv("REDIS_URL", settings.redis_url)
    monkeypatch.setenv("POOLGATE_DATA_DIR", settings.data_dir)
    monkeypatch.setenv("POOLGATE_KEY_PEPPER", settings.key_pepper)

    def run(*typed: str, code: int = 0) -> str:
        assert main(typed) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    run("account", "create", "--name", "acme")
    key = json.loads(run("key", "create", "--account", "acme", "--json"))["id"]
    assert "poolgate budget set" in run("budget", "list")
    made = json.loads(
        run("budget", "set", "--account", "acme", "--period", "day", "--limit", "10.00", "--json")
    )
    assert (made["limit_nano"], made["soft_percent"], made["key_id"]) == (10**10, 80, None)
    assert "1.50 SAR a month" in run(
        "budget", "set", "--key", str(key), "--period", "month", "--limit", "1.5"
    )
    again = json.loads(
        run("budget", "set", "--account", "acme", "--period", "day", "--limit", "20", "--json")
    )
    assert (again["id"], again["limit_nano"]) == (made["id"], 2 * 10**10)
    assert [row["period"] for row in json.loads(run("budget", "list", "--json"))] == ["day", "month"]
    assert "20.00 SAR" in run("budget", "list", "--account", "acme")
    assert "20.00 SAR are left" in run("budget", "reset", str(made["id"]))
    assert "is removed" in run("budget", "remove", str(made["id"]))
    assert "poolgate budget list" in run("budget", "remove", str(made["id"]), code=1)
    said = run("budget", "set", "--account", "acme", "--period", "day", "--limit", "1", "--soft", "0", code=1)
    assert "1 to 100 percent" in said
