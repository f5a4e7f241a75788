"""Statements from transfers: what moved, by the account's own days, between two balances that fit."""

import datetime as dt
import json
import random
from collections.abc import Callable
from uuid import UUID

import asyncpg
import pytest

from billing.statements import Line, Statement, read_statement
from config.defaults import Settings
from gateway.__main__ import main
from tests import books
from tests.books import apply, resolving, spending, topup

DAY = dt.date(2026, 3, 10)


def at(day: int, hour: int) -> dt.datetime:
    return dt.datetime(2026, 3, day, hour, tzinfo=dt.UTC)


async def dated(pool: asyncpg.Pool, transfer: UUID, moment: dt.datetime) -> None:
    """Transfers are as of when they are made; a test can't wait for tomorrow."""
    await pool.execute("alter table transfers disable trigger transfers_immutable")
    await pool.execute("update transfers set at = $2 where id = $1 or posting_id = $1", transfer, moment)


async def moved(pool: asyncpg.Pool, account_id: int) -> None:
    """A top-up on the 9th, turns and a top-up on the 10th, a posted pending transfer on the 11th (UTC)."""
    process = await books.incarnation(pool)
    first, second = topup(account_id, 10_000), topup(account_id, 500)
    await apply(pool, first, second)
    await books.lease(pool, process, account_id, 5_000)
    postings = [await books.use(pool, process, account_id, [100, 11]) for _ in range(2)]
    pending = spending(account_id, 1_000, phase="pending")
    post, void = resolving(pending.id, "post", 700), spending(account_id, 1_000, phase="pending")
    await apply(pool, pending, post, void, resolving(void.id, "void"))
    for transfer, moment in (
        (first.id, at(9, 12)), (second.id, at(10, 8)), (postings[0], at(10, 9)), (postings[1], at(10, 22)),
        (pending.id, at(10, 1)), (post.id, at(11, 1)),
    ):  # fmt: skip
        await dated(pool, transfer, moment)


async def test_a_statement_groups_what_moved_by_day_and_kind(pool: asyncpg.Pool) -> None:
    acme = await books.account(pool)
    await moved(pool, acme)
    assert await read_statement(pool, acme, DAY, dt.date(2026, 3, 11)) == Statement(
        DAY, dt.date(2026, 3, 11), "UTC", 10_000,
        (Line(DAY, "topup", 1, 500), Line(DAY, "turn", 2, -222), Line(dt.date(2026, 3, 11), "job", 1, -700)),
        9_578,
    )  # fmt: skip


async def test_days_are_those_of_the_accounts_time_zone(pool: asyncpg.Pool) -> None:
    acme = await books.account(pool)
    await pool.execute("update accounts set time_zone = 'Asia/Riyadh'")
    await moved(pool, acme)
    statement = await read_statement(pool, acme, DAY, DAY)
    # 22:00 UTC is 01:00 of the next day there.
    assert statement.lines == (Line(DAY, "topup", 1, 500), Line(DAY, "turn", 1, -111))
    following = await read_statement(pool, acme, dt.date(2026, 3, 11), dt.date(2026, 3, 11))
    assert [line.amount_nano for line in following.lines] == [-700, -111]


async def test_what_a_provider_earned_has_its_own(pool: asyncpg.Pool) -> None:
    acme, rack = await books.account(pool, 10_000), await books.account(pool)
    process = await books.incarnation(pool)
    await books.lease(pool, process, acme, 5_000)
    await books.use(pool, process, acme, [100], provider_id=rack)
    statement = await read_statement(pool, rack, of="earnings")
    assert (statement.opening_nano, statement.closing_nano) == (0, 75)
    assert [(line.kind, line.amount_nano) for line in statement.lines] == [("turn", 75)]
    assert (await read_statement(pool, rack)).lines == ()
    assert (await read_statement(pool, acme, of="earnings")).closing_nano == 0


async def test_nobody_has_no_statement(pool: asyncpg.Pool) -> None:
    with pytest.raises(LookupError):
        await read_statement(pool, 99)


async def test_opening_and_lines_make_closing_and_the_next_opening_is_this_closing(
    pool: asyncpg.Pool,
) -> None:
    rng = random.Random(7)
    acme = await books.account(pool)
    moments: list[tuple[dt.datetime, int]] = []
    for _ in range(60):
        amount = rng.randint(1, 1000)
        is_in = sum(of for _, of in moments) < amount or rng.random() < 0.6
        transfer = topup(acme, amount) if is_in else spending(acme, amount)
        (result,) = await apply(pool, transfer)
        assert result.is_moved
        moments.append((at(rng.randint(1, 20), rng.randint(0, 23)), amount if is_in else -amount))
        await dated(pool, transfer.id, moments[-1][0])
    for cut in range(2, 20):
        one = await read_statement(pool, acme, dt.date(2026, 3, 2), dt.date(2026, 3, cut))
        two = await read_statement(pool, acme, dt.date(2026, 3, cut + 1), dt.date(2026, 3, 31))
        for statement in (one, two):
            lines = sum(line.amount_nano for line in statement.lines)
            assert statement.opening_nano + lines == statement.closing_nano
        assert (
            one.closing_nano == two.opening_nano == sum(of for when, of in moments if when < at(cut + 1, 0))
        )
    assert two.closing_nano == await books.available(pool, acme)


@pytest.fixture
def cli(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    monkeypatch.setenv("REDIS_URL", settings.redis_url)

    def run(*typed: str, code: int = 0) -> str:
        assert main(typed) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return run


def test_the_command_prints_this_month_or_what_it_is_told(cli: Callable[..., str]) -> None:
    cli("account", "create", "--name", "acme", "--balance", "5")
    table = cli("statement", "acme")
    assert "top-ups" in table
    assert "5.00 SAR" in table
    today = json.loads(cli("statement", "acme", "--json"))
    assert (today["opening_nano"], today["closing_nano"]) == (0, 5 * 10**9)
    assert today["lines"][0] | {"day": ""} == {
        "day": "",
        "kind": "topup",
        "postings": 1,
        "amount_nano": 5 * 10**9,
    }
    month = json.loads(cli("statement", "acme", "--month", "2024-02", "--json"))
    assert (month["first_day"], month["last_day"], month["closing_nano"]) == ("2024-02-01", "2024-02-29", 0)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--month", "2026-13"), "a month such as 2026-11"),
        (("--since", "yesterday"), "a day such as 2026-11-01"),
        (("--month", "2026-11", "--since", "2026-11-01"), "leave --since and --until away"),
        (("--since", "2026-11-02", "--until", "2026-11-01"), "is before"),
    ],
)
def test_a_period_that_is_none_is_told(cli: Callable[..., str], typed: tuple[str, ...], said: str) -> None:
    assert said in cli("statement", "acme", *typed, code=1)
