"""What the money costs, in CPU of a worker a request, and in what PostgreSQL and Valkey are asked.

One worker with everything on stands beside one whose money is switched off (bench/unbilled.py); rounds alternate between
them, and differences are taken within a round.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import asyncpg
from redis.asyncio import Redis

from bench.accounts import BUDGETS, HIGH, LARGE_NANO, make_accounts
from bench.arms import CONTEXT_LENGTH, OURS, Worker, worker
from bench.bodies import MODEL, chat_body
from bench.ground import Ground, on_ground
from bench.load import Job
from bench.processes import LoadProcess
from bench.question import Asked, Question, run
from bench.rounds import rounds_of, tell
from bench.samples import Sample, paired_differences
from gateway.identity.accounts import AccountStore
from gateway.identity.secrets import load_pepper
from nodes.heartbeats import NodeStore
from nodes.protocol import EngineReport, Heartbeat, ModelInfo

CPU = "CPU of a worker, money only"
MORE = "more than money off"
CASE_CPU, CASE_STORES = "a request", "stores"
CONNECTIONS = 16
REQUESTS = 4000
DRAIN_S = 1.5
"""After the last answer: shipping and the report of leases, which are inside the CPU of both workers' windows."""

SETTLED_S = 60.0
RATE, RATE_S = 500.0, 12
FLUSH_S = 12.0
"""A connection of PostgreSQL that became idle tells what it committed within 10 s."""

PER = 1000
SIZES = (1, 100, 10_000)
EXACT = HIGH | {"key_limits": HIGH["key_limits"] | {"requests_minute": 600}}
EXACT_ACCOUNTS = 100
"""Each of them stays below its 600 a minute."""

OFF = "money off"
PLAIN = "hold, settlement, journal, shipping"
LIMITED = "and two budgets, high limits"
STRICT = f"and two budgets, a low limit ({EXACT_ACCOUNTS} accounts)"
METHOD = f"""\
**Money off** is a worker that bench/unbilled.py puts together without journal, shipper and recovery, at prices of
zero, for which nothing is leased, and asked with a key that has no limits. What is left in it is everything else:
keys, routing, relay, metrics, the record of a turn and its log line, and the arithmetic of bounds and prices (1 µs).
CPU is that of one worker process, without a supervisor, from before the first of {REQUESTS:,} requests until
{DRAIN_S:g} s after the last answer, when its turns are shipped (which is checked). Where the spread of *more than
money off* is wider than its median, the difference is not known.

**High limits**: key, account and tier have limits a minute and a day and a concurrency that are kept by blocks, and
the key and the account have a budget each. **A low limit** is 600 requests a minute for each of {EXACT_ACCOUNTS}
keys, kept exactly: each request waits for Valkey, in one script for all its limits.

**Transactions** are what PostgreSQL says that it committed in the gateway's database, **commands** what Valkey says
that it processed, those inside scripts too, at {RATE:g} requests a second, until all turns are shipped and leases
reported; less what both are asked in the same time without a request, and measured once. At another pace a batch
holds more turns or fewer. The first turn of each account reads its key and takes its lease."""


@dataclass(frozen=True, slots=True)
class Told:
    """What the stores say that they were asked since they began."""

    at_s: float
    transactions: int
    commands: int
    scripts: int

    def since(self, before: "Told") -> tuple[float, ...]:
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
    database: str
    pepper: bytes
    turns: int = 0

    async def accounts(self, name: str, count: int, **options: Any) -> list[str]:
        return await make_accounts(self.pool, self.pepper, name, count, balance_nano=LARGE_NANO, **options)

    async def put(self, worker: Worker, keys: Sequence[str], **changes: Any) -> None:
        """A load of whole answers, all of which must come; returns when their usage is in PostgreSQL, if it will be."""
        body = chat_body(200, tokens=16)
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
        before_s = worker.clock.read_s()
        await self.put(worker, keys)
        await asyncio.sleep(DRAIN_S)
        seconds = worker.clock.read_s() - before_s
        await self.settled()
        return seconds / REQUESTS * 1e6

    async def asked(self) -> Told:
        """Now, when every connection has told what it did."""
        await asyncio.sleep(FLUSH_S)
        await self.stats.execute("select pg_stat_clear_snapshot()")
        transactions = await self.stats.fetchval(
            "select xact_commit from pg_stat_database where datname = $1", self.database
        )
        commands = (await self.valkey.info("stats"))["total_commands_processed"]
        scripts = (await self.valkey.info("commandstats")).get("cmdstat_evalsha", {"calls": 0})["calls"]
        return Told(time.monotonic(), transactions, commands, scripts)


async def measure_cpu(bench: Bench, rounds: int) -> list[Sample]:
    """All of them in each round, in an order of its own."""
    plain = await bench.accounts("plain", 1)
    high = await bench.accounts("high", 1, **HIGH, **BUDGETS)
    exact = await bench.accounts("exact", EXACT_ACCOUNTS, **EXACT, **BUDGETS)
    loads = {
        OFF: (bench.free, plain), PLAIN: (bench.billed, plain), LIMITED: (bench.billed, high),
        STRICT: (bench.billed, exact),
    }  # fmt: skip
    samples: list[Sample] = []
    for number, order in rounds_of(list(loads), rounds):
        samples += [
            Sample(CPU, CASE_CPU, name, "µs", number, await bench.cpu_us(*loads[name])) for name in order
        ]
    samples = [sample for sample in samples if sample.round]
    return samples + paired_differences(samples, CPU, MORE, OFF)


async def measure_asked(bench: Bench, sizes: Sequence[int]) -> list[Sample]:
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
        Sample(f"{name} a second", "no requests", OURS, "", 1, count / idle_s)
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


def _asked_rows(of: str, counts: Sequence[float]) -> list[Sample]:
    names = ("PostgreSQL transactions", "Valkey commands, inside scripts too", "Valkey scripts")
    return [
        Sample(f"{name} per 1,000 requests", of, OURS, "", 1, count)
        for name, count in zip(names, counts, strict=True)
    ]


def measure(asked: Asked) -> list[Sample]:
    return on_ground(lambda ground: _measure(ground, asked))


async def _measure(ground: Ground, asked: Asked) -> list[Sample]:
    async with _running(ground) as bench:
        # First the stores, while no lease of the other half is on its way back.
        told = await measure_asked(bench, SIZES) if CASE_STORES in asked.cases else []
        cpu = await measure_cpu(bench, asked.rounds) if CASE_CPU in asked.cases else []
        return cpu + told


@asynccontextmanager
async def _running(ground: Ground) -> AsyncIterator[Bench]:
    """Both workers over one database, with settings as shipped and ten nodes."""
    folder = ground.folder / "money"
    folder.mkdir()
    async with AsyncExitStack() as stack:
        stats = await asyncpg.connect(ground.stores.database_url)
        stack.push_async_callback(stats.close)
        settings, pool = await stack.enter_async_context(ground.database(folder))
        await _register(pool, ground.engines)
        billed = await stack.enter_async_context(worker("gateway.worker", settings, folder))
        free = await stack.enter_async_context(worker("bench.unbilled", settings, folder))
        valkey = await stack.enter_async_context(Redis.from_url(ground.stores.redis_url))
        database = await pool.fetchval("select current_database()")
        yield Bench(billed, free, ground.load, pool, stats, valkey, database, load_pepper(settings))


async def _register(pool: asyncpg.Pool, urls: Sequence[str]) -> None:
    provider = await AccountStore(pool).create("provider", is_provider=True)
    model = ModelInfo(id=MODEL, context_length=CONTEXT_LENGTH)
    for number, url in enumerate(urls):
        node_id = f"00000000-0000-4000-8000-{number:012}"
        engine = EngineReport(engine_id="e0", url=url, state="ready", models=(model,))
        beat = Heartbeat(api_key="-", node_id=node_id, engines=(engine,))
        await NodeStore(pool).record(provider.id, beat, beat.engines)


QUESTION = Question(
    "money", "What the money costs", METHOD, measure, rounds=16, cases=(CASE_CPU, CASE_STORES),
    arms=(OFF, PLAIN, LIMITED, STRICT, OURS), is_compared=False,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(QUESTION))
