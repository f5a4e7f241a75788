"""Three times what the engines can do, by a greedy and a modest account, through two workers: who waits, and for how long.

The modest one asks for less than half of what there is, so it should hardly wait, whatever the other one sends. Nothing may
hang, and every turn is served, refused or expired, and settled.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg

from bench.load import Job, Outcome
from bench.processes import MODEL, LoadProcess, served
from billing.money import NANO
from config.defaults import Settings
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from tests.fakes.engine import FakeEngine

ENGINES, SLOTS, TOKENS, PACE_MS = 2, 4, 20, 20.0
CAPACITY = ENGINES * SLOTS / (TOKENS * PACE_MS / 1000)
"""Turns a second: 20."""

GREEDY, MODEST = 2.7 * CAPACITY, 0.3 * CAPACITY
QUEUE_TURNS, QUEUE_WAIT_S = 120, 4.0
"""The greedy account's turns wait for about twice as long as they may, so that some expire and some find no room."""


@dataclass(frozen=True, slots=True)
class Size:
    """How long the overload lasts."""

    seconds: float


SHORT = Size(seconds=6.0)
LONG = Size(seconds=60.0)


async def overloaded(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Size, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """How many turns of each account were served, and how long its answers took."""
    settings = replace(
        settings, workers=2, heartbeat_grace_s=3600.0, heartbeat_interval_s=30.0, queue_turns_max=QUEUE_TURNS,
        queue_wait_s=QUEUE_WAIT_S, keepalive_comment_s=0.5,
    )  # fmt: skip
    flags = ("--no-record", "--max-num-seqs", str(SLOTS), "--max-num-queued-reqs", str(SLOTS))
    async with (
        served(settings, pool, folder) as gateway,
        FakeEngine(*flags, pace_ms=PACE_MS, burst=True) as first, FakeEngine(*flags, pace_ms=PACE_MS) as second,
        LoadProcess() as one, LoadProcess() as other,
    ):  # fmt: skip
        for engine in (first, second):
            await gateway.register(engine.url)
        await gateway.until_engines(ENGINES)
        accounts = [await _account(pool, settings, name) for name in ("greedy", "modest")]
        jobs = [
            _job(gateway.url, key, rate, size, stream=stream)
            for (_, key), rate, stream in zip(accounts, (GREEDY, MODEST), (False, True), strict=True)
        ]
        tell(f"{GREEDY + MODEST:.0f} turns a second, of which {CAPACITY:.0f} can be served")
        greedy, modest = await asyncio.gather(
            *(load.run(job) for load, job in zip((one, other), jobs, strict=True))
        )
        outcomes = await gateway.until_settled(sum(job.requests for job in jobs))
        rows = await pool.fetch(
            "select account_id, outcome, status, count(*) as turns, sum(amount_nano) as amount from usage group by 1, 2, 3"
        )
        left = [(await engine.record())["running"] for engine in (first, second)]
    of = {account: name for (account, _), name in zip(accounts, ("greedy", "modest"), strict=True)}
    finished = {of[row["account_id"]]: row["turns"] for row in rows if row["outcome"] == "finished"}
    numbers: dict[str, float] = {
        "greedy: asked": jobs[0].requests, "greedy: served": finished.get("greedy", 0),
        "greedy: answer, p50 (ms)": round(greedy.p50_ms), "greedy: answer, p99 (ms)": round(greedy.p99_ms),
        "modest: asked": jobs[1].requests, "modest: served": finished.get("modest", 0),
        "modest: answer, p50 (ms)": round(modest.p50_ms), "modest: answer, p99 (ms)": round(modest.p99_ms),
        "an answer without waiting (ms)": TOKENS * PACE_MS,
    }  # fmt: skip
    tell(str(numbers))
    for job, outcome in zip(jobs, (greedy, modest), strict=True):
        _check(job, outcome)
    assert set(outcomes) <= {"finished", "refused"}, outcomes
    assert {(row["outcome"], row["status"]) for row in rows} <= {("finished", 200), ("refused", 503)}, rows
    assert all(row["amount"] == 0 for row in rows if row["outcome"] == "refused"), rows
    assert left == [0, 0], left
    # Fair: the modest account gets what it asks for, and waits less than the greedy one waits at best.
    assert finished["modest"] == jobs[1].requests, numbers
    assert modest.p50_ms < greedy.p50_ms / 2, numbers
    return numbers


def _check(job: Job, outcome: Outcome) -> None:
    """Whole, or refused: nothing was cut, and nothing hung."""
    assert set(outcome.verdicts) <= {"whole", "refused"}, outcome
    assert sum(outcome.verdicts.values()) == job.requests, outcome
    assert set(outcome.statuses) <= {"200", "503"}, outcome


async def _account(pool: asyncpg.Pool, settings: Settings, name: str) -> tuple[int, str]:
    account = await AccountStore(pool).create(name, balance_nano=1000 * NANO)
    _, key = await KeyStore(pool, load_pepper(settings)).create(account.id, prefix="sk-pg-")
    return account.id, key


def _job(url: str, key: str, rate: float, size: Size, *, stream: bool) -> Job:
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": TOKENS, "ignore_eos": True,
    }  # fmt: skip
    return Job(
        url, key=key, body={**body, "stream": True} if stream else body, connections=200, rate=rate,
        requests=round(rate * size.seconds), give_up_s=60.0,
    )  # fmt: skip
