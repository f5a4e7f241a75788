"""Many keys, each of an account of its own, used over and over: after the first time round the worker does not grow.

All of it is HTTP to a real `poolgate serve`: keys seen first, leases, limits, budgets, journal and shipping included.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg
import psutil

from bench.accounts import make_accounts
from bench.load import Job
from bench.processes import MODEL, LoadProcess, served
from billing.money import NANO
from config.defaults import Settings
from gateway.identity.secrets import load_pepper
from tests.fakes.engine import FakeEngine

GROWTH_MB_MAX = 5.0
CONNECTIONS = 64
QUIET_S = 3.0
"""After the last turn of a round: its lists of batches are freed, and reports are sent."""

KEY_LIMITS = {"requests_minute": 100_000, "tokens_minute": 10**9, "concurrency": 1000}
TIER_LIMITS = {"requests_minute": 1_000_000, "requests_day": 10**9}


@dataclass(frozen=True, slots=True)
class Size:
    """Each of `keys` is used once a round; what `rounds` add to the first is the growth.

    `remembered`: how many keys and subjects of limits the worker may remember, at most. `lease_idle_s`: as the setting.
    """

    keys: int
    rounds: int
    remembered: int
    lease_idle_s: float


SHORT = Size(keys=1_500, rounds=3, remembered=400, lease_idle_s=0.5)
"""Fewer are remembered than used: whatever is forgotten and made anew must leave nothing behind."""

LONG = Size(keys=100_000, rounds=10, remembered=200_000, lease_idle_s=7200.0)
"""Every account keeps its lease: so many keys can't make a worker hold more, and its growth is no question of its pace."""


async def many_keys(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Size, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """What the worker has of its own after the first round, and how much more after the last."""
    settings = replace(
        settings, workers=1, heartbeat_grace_s=3600.0, heartbeat_interval_s=30.0, log_level="warning",
        key_cache_max=size.remembered, limit_subjects_max=size.remembered, lease_idle_s=size.lease_idle_s,
    )  # fmt: skip
    keys = await make_accounts(
        pool, load_pepper(settings), "many", size.keys, balance_nano=1000 * NANO, key_limits=KEY_LIMITS,
        tier_limits=TIER_LIMITS, account_budget=("month", 1_000_000 * NANO),
    )  # fmt: skip
    tell(f"{size.keys:,} accounts with a key each")
    async with (
        served(settings, pool, folder) as gateway,
        FakeEngine("--max-num-seqs", "1024", "--no-record") as engine,
        LoadProcess() as load,
    ):
        await gateway.register(engine.url)
        (worker,) = gateway.workers()
        body = {
            "model": MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 4,
            "ignore_eos": True,
        }  # fmt: skip
        job = Job(gateway.url, keys=keys, body=body, connections=CONNECTIONS, requests=size.keys)
        fresh = _own_mb(worker)
        after: list[float] = []
        seconds = 0.0
        for number in range(1, size.rounds + 1):
            outcome = await load.run(job)
            assert outcome.verdicts == {"whole": size.keys}, outcome
            await gateway.until_settled(number * size.keys)
            await asyncio.sleep(QUIET_S)
            seconds += outcome.seconds
            after.append(_own_mb(worker))
            tell(
                f"turn {number * size.keys:,}: {after[-1]:.1f} MB, {size.keys / outcome.seconds:.0f} turns/s"
            )
        (still,) = gateway.workers()
        assert still.pid == worker.pid, "the worker was replaced"
    numbers = {
        "keys, each of an account of its own": size.keys,
        "turns": size.keys * size.rounds,
        "turns a second": round(size.keys * size.rounds / seconds),
        "MB of the worker before the first turn": fresh,
        f"MB at turn {size.keys:,}": after[0],
        "bytes a key": round((after[0] - fresh) * 2**20 / min(size.keys, size.remembered)),
        f"MB at turn {size.keys * size.rounds:,}": after[-1],
        "MB grown between them": round(after[-1] - after[0], 2),
        "MB allowed": GROWTH_MB_MAX,
    }
    assert after[-1] - after[0] <= GROWTH_MB_MAX, (numbers, after)
    tell(str(numbers))
    return numbers


def _own_mb(worker: psutil.Process) -> float:
    """What the process has that is no file's. The journal's mapped pages count as its own to others (USS), but they are
    the system's cache of a file, come back at each segment's end, and can be had at any time."""
    rollup = Path(f"/proc/{worker.pid}/smaps_rollup").read_text()
    (line,) = (line for line in rollup.splitlines() if line.startswith("Anonymous:"))
    return round(int(line.split()[1]) / 1024, 2)
