"""`make bench`: what the money costs, in CPU of a worker a request, and in what PostgreSQL and Valkey are asked.

One worker with everything on stands beside one whose money is switched off (bench/unbilled.py); rounds alternate between
them, and differences are taken within a round. How the numbers are made, and what they leave out, is in bench/README.md.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from redis.asyncio import Redis

from bench.accounts import make_accounts
from bench.load import Job
from bench.machine import machine
from bench.processes import MODEL, ROOT, LoadProcess, await_ready, environment, free_port
from bench.tables import Row, as_text, rows_as_markdown, write_section
from billing.money import NANO
from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.metrics import FOLDER_VARIABLE
from config.postgres import migrate, open_pool
from config.procs import Child, spawn_python
from config.settings import load_settings
from gateway.identity.accounts import AccountStore
from gateway.identity.secrets import load_pepper
from gateway.supervisor import listening_sockets, raise_descriptor_limit
from gateway.worker import orders
from nodes.heartbeats import NodeStore
from nodes.protocol import EngineReport, Heartbeat, ModelInfo
from tests.fakes.engine import FakeEngine

RESULTS = ROOT / "bench" / "RESULTS.md"
TITLE = "What the money costs"
NODES = 10
CONNECTIONS = 16
REQUESTS = 4000
DRAIN_S = 1.5
"""After the last answer: shipping and the report of leases, which are inside the CPU of both workers' windows."""

SETTLED_S = 60.0
RATE, RATE_S = 500.0, 12
FLUSH_S = 12.0
"""A connection of PostgreSQL that became idle tells what it committed within 10 s."""

PER = 1000
SEED = 3
HIGH = {
    "key_limits": {"requests_minute": 10_000_000, "tokens_minute": 10**10, "concurrency": 100_000},
    "account_limits": {"requests_day": 10**10},
    "tier_limits": {"requests_minute": 20_000_000, "tokens_day": 10**12},
}
EXACT = HIGH | {"key_limits": HIGH["key_limits"] | {"requests_minute": 600}}
BUDGETS = {"key_budget": ("day", 10**6 * NANO), "account_budget": ("month", 10**6 * NANO)}
LARGE_NANO = 10_000 * NANO
EXACT_ACCOUNTS = 100
"""Each of them stays below its 600 a minute."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker process; it has no supervisor here, whose CPU is that of a timer."""

    process: Child
    url: str

    @property
    def cpu_s(self) -> float:
        """User and system time of all its threads, of the dead ones too, in nanoseconds' steps (clock_getcpuclockid(3))."""
        return time.clock_gettime((~self.process.pid << 3) | 2)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the stores were asked since they began."""

    at_s: float
    transactions: int
    commands: int
    scripts: int

    def since(self, before: "Asked") -> tuple[float, ...]:
        return (self.at_s - before.at_s, self.transactions - before.transactions, self.commands - before.commands,
            self.scripts - before.scripts)  # fmt: skip


@dataclass
class Bench:
    """Both workers, the load, and the stores seen from outside."""

    billed: Worker
    free: Worker
    load: LoadProcess
    pool: asyncpg.Pool  # in the gateway's database
    stats: asyncpg.Connection  # in another one: what it asks is not counted
    valkey: Redis
    pepper: bytes
    turns: int = 0

    async def accounts(self, name: str, count: int, **options: Any) -> list[str]:
        return await make_accounts(self.pool, self.pepper, name, count, balance_nano=LARGE_NANO, **options)

    async def put(self, worker: Worker, keys: Sequence[str], **changes: Any) -> None:
        """A load of whole answers, all of which must come; returns when their usage is in PostgreSQL, if it will be."""
        body = {
            "model": MODEL, "messages": [{"role": "user", "content": "a few words " * 8}],
            "max_tokens": 16, "ignore_eos": True,
        }  # fmt: skip
        job = Job(worker.url, keys=keys, body=body, connections=CONNECTIONS, requests=REQUESTS)
        job = replace(job, **changes)
        outcome = await self.load.run(job)
        assert outcome.verdicts == {"whole": job.requests}, outcome
        self.turns += job.requests if worker is self.billed else 0

    async def settled(self) -> None:
        """Every turn is in the book."""
        async with asyncio.timeout(SETTLED_S):
            while await self.pool.fetchval("select count(*) from usage") < self.turns:  # noqa: ASYNC110 - in a database
                await asyncio.sleep(0.05)

    async def cpu_us(self, worker: Worker, keys: Sequence[str]) -> float:
        """CPU of a worker for one request."""
        before_s = worker.cpu_s
        await self.put(worker, keys)
        await asyncio.sleep(DRAIN_S)
        seconds = worker.cpu_s - before_s
        await self.settled()
        return seconds / REQUESTS * 1e6

    async def asked(self) -> Asked:
        """Now, when every connection has told what it did."""
        await asyncio.sleep(FLUSH_S)
        await self.stats.execute("select pg_stat_clear_snapshot()")
        transactions = await self.stats.fetchval(
            "select xact_commit from pg_stat_database where datname = 'money'"
        )
        commands = (await self.valkey.info("stats"))["total_commands_processed"]
        scripts = (await self.valkey.info("commandstats")).get("cmdstat_evalsha", {"calls": 0})["calls"]
        return Asked(time.monotonic(), transactions, commands, scripts)


async def measure_cpu(bench: Bench, rounds: int) -> list[Row]:
    """All of them in each round, in an order of its own: what follows the heaviest one would else always seem dearer.

    One more round before them warms up.
    """
    plain = await bench.accounts("plain", 1)
    high = await bench.accounts("high", 1, **HIGH, **BUDGETS)
    exact = await bench.accounts("exact", EXACT_ACCOUNTS, **EXACT, **BUDGETS)
    off = "money off"
    arms = {
        off: (bench.free, high),
        "hold, settlement, journal, shipping": (bench.billed, plain),
        "and two budgets, high limits": (bench.billed, high),
        f"and two budgets, a low limit ({EXACT_ACCOUNTS} accounts)": (bench.billed, exact),
    }
    found: dict[str, list[float]] = defaultdict(list)
    order = list(arms)
    shuffled = random.Random(SEED)
    for number in range(rounds + 1):
        tell(f"CPU, round {number} of {rounds}" if number else "CPU, warming up")
        shuffled.shuffle(order)
        costs = {name: await bench.cpu_us(*arms[name]) for name in order}
        if not number:
            continue
        for name in arms:
            found[f"CPU a request, {name}"].append(costs[name])
            if name != off:
                found[f"more than off, {name}"].append(costs[name] - costs[off])
    return [_row(name, "µs", values) for name, values in sorted(found.items())]


async def measure_asked(bench: Bench, sizes: Sequence[int]) -> list[Row]:
    """What PostgreSQL and Valkey are asked at RATE requests a second, less what they are asked anyway."""
    loads = [
        (_named(count), await bench.accounts(f"many-{count}", count, **HIGH, **BUDGETS)) for count in sizes
    ]
    low = await bench.accounts("low", EXACT_ACCOUNTS, **EXACT, **BUDGETS)
    loads.append((f"{_named(EXACT_ACCOUNTS)}, a low limit", low))
    tell("stores, idle")
    await bench.asked()  # what was set up is told
    before = await bench.asked()
    await asyncio.sleep(RATE_S)
    asked = await bench.asked()
    idle_s, *idle = asked.since(before)
    rows = [
        _row(f"{name} a second, idle", "", [count / idle_s])
        for name, count in zip(("PostgreSQL transactions", "Valkey commands"), idle, strict=False)
    ]
    for of, keys in loads:
        # The first turns go as fast as PostgreSQL takes them; those after them at a pace, which is what batches depend on.
        # The second round only says when each account comes again.
        some = max(len(keys), int(RATE * RATE_S))
        for name, rate, requests in (
            (f"{of}, first turn of each", 0.0, len(keys)),
            ("", RATE, some),
            (of, RATE, some),
        ):
            tell(f"stores, {name or of}: {requests} requests")
            connections = 1 if rate else CONNECTIONS
            await bench.put(bench.billed, keys, rate=rate, requests=requests, connections=connections)
            before, asked = asked, await bench.asked()
            seconds, *counts = asked.since(before)
            if name and (rate or len(keys) > 1):
                rows += _asked_rows(name, [
                    (count - quiet / idle_s * seconds) / requests * PER
                    for count, quiet in zip(counts, idle, strict=True)
                ])  # fmt: skip
    return rows


def _named(count: int) -> str:
    return f"{count:,} account{'s' if count > 1 else ''}"


def _asked_rows(of: str, counts: Sequence[float]) -> list[Row]:
    names = ("PostgreSQL transactions", "Valkey commands, inside scripts too", "Valkey scripts")
    return [
        _row(f"{name} per 1,000 requests: {of}", "", [count])
        for name, count in zip(names, counts, strict=True)
    ]


def _row(name: str, unit: str, values: Sequence[float]) -> Row:
    return Row(name, unit, statistics.median(values), min(values), max(values))


def tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.money", description=__doc__)
    parser.add_argument("--rounds", type=int, default=16, help="how often CPU is measured (default: 16)")
    parser.add_argument("--only", choices=("cpu", "stores"), help="one half of it; then nothing is written")
    parser.add_argument("--accounts", type=int, nargs="+", default=[1, 100, 10_000], help="active accounts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="whose part to replace (default: bench/RESULTS.md)"
    )
    args = parser.parse_args()
    raise_descriptor_limit()
    about = machine()
    rows = uvloop.run(measure(args.rounds, args.accounts, args.only or ""))
    if args.json:
        print(json.dumps({"about": about, "rows": [row.to_json() for row in rows]}, indent=2))
    else:
        print(as_text(rows))
    if not args.only:
        write_section(args.out, TITLE, rows_as_markdown("bench/money.py", about, rows, rounds=args.rounds))
    return 0


async def measure(rounds: int, sizes: Sequence[int], only: str) -> list[Row]:
    """Everything, or the half that `only` names."""
    folder = Path(tempfile.mkdtemp(prefix="poolgate-money-"))
    try:
        with EmbeddedStores.start(folder / "stores") as stores:
            async with running(stores, folder) as bench:
                # First the stores, while no lease of the other half is on its way back.
                asked = [] if only == "cpu" else await measure_asked(bench, sizes)
                cpu = [] if only == "stores" else await measure_cpu(bench, rounds)
                return cpu + asked
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def running(stores: EmbeddedStores, folder: Path) -> AsyncIterator[Bench]:
    """Both workers, with settings as shipped and NODES nodes, all of them one stand-in engine."""
    async with AsyncExitStack() as stack:
        stats = await asyncpg.connect(stores.database_url)
        stack.push_async_callback(stats.close)
        await stats.execute("create database money")
        url = stores.database_url.replace("/postgres?", "/money?")
        await migrate(url)
        settings = load_settings(
            environ={}, database_url=url, redis_url=stores.redis_url, data_dir=str(folder / "data"),
            key_pepper="pepper-of-the-bench", heartbeat_interval_s=600.0, heartbeat_grace_s=3600.0,
        )  # fmt: skip
        pool = await stack.enter_async_context(await open_pool(url, max_size=2, timeout_s=60.0))
        engine = await stack.enter_async_context(FakeEngine("--no-record", "--max-num-seqs", "1024"))
        await _register(pool, engine.url)
        billed = await stack.enter_async_context(_worker("gateway.worker", settings, folder))
        free = await stack.enter_async_context(_worker("bench.unbilled", settings, folder))
        load = await stack.enter_async_context(LoadProcess())
        valkey = await stack.enter_async_context(Redis.from_url(stores.redis_url))
        yield Bench(billed, free, load, pool, stats, valkey, load_pepper(settings))


async def _register(pool: asyncpg.Pool, url: str) -> None:
    provider = await AccountStore(pool).create("provider", is_provider=True)
    model = ModelInfo(id=MODEL, context_length=2048)
    engine = EngineReport(engine_id="e0", url=url, state="ready", models=(model,))
    for number in range(NODES):
        node_id = f"00000000-0000-4000-8000-{number:012}"
        beat = Heartbeat(api_key="-", node_id=node_id, engines=(engine,))
        await NodeStore(pool).record(provider.id, beat, beat.engines)


@asynccontextmanager
async def _worker(module: str, settings: Settings, folder: Path) -> AsyncIterator[Worker]:
    settings = replace(settings, port=free_port())
    metrics, log = folder / f"{module}-metrics", folder / f"{module}.log"
    metrics.mkdir()
    (sock,) = listening_sockets(settings)
    with sock, log.open("wb") as output:
        process = spawn_python(
            module, pass_fds=(sock.fileno(),), stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=ROOT,
            env=environment(Settings()) | {FOLDER_VARIABLE: str(metrics)},
        )  # fmt: skip
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(orders(settings, sock.fileno()))
    url = f"http://127.0.0.1:{settings.port}"
    try:
        await asyncio.to_thread(await_ready, process, url, log)
        yield Worker(process, url)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 60)


if __name__ == "__main__":
    sys.exit(main())
