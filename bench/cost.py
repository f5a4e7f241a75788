"""`make bench`: what one gateway worker with everything on costs in CPU and adds in time, beside the engine asked directly.

CPU is that of all gateway processes, read when the usage of every turn is written; rounds of each question alternate, and
medians are told with their spread. What is compared with what, and what is not, is said in bench/README.md.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop

from bench.load import Job
from bench.machine import machine
from bench.processes import MODEL, ROOT, LoadProcess, Served, cpu_s, served
from bench.tables import Row, as_text, rows_as_markdown, write_section
from config.embedded import EmbeddedStores
from config.postgres import migrate, open_pool
from config.settings import load_settings
from gateway.supervisor import raise_descriptor_limit
from tests.fakes.engine import FakeEngine

RESULTS = ROOT / "bench" / "RESULTS.md"
TITLE = "What a request costs"
NODES = 10
WHOLE_REQUESTS = 3000
CONNECTIONS = 16
BURST_REQUESTS, BURST_CHUNKS = 100, 100
PACED_STREAMS, PACED_CHUNKS, PACE_MS = 64, 150, 20.0
RATE, RATE_S = 200.0, 8
IDLE_S = 4.0


@dataclass
class Bench:
    """The processes under test and the load; `turns` counts what usage must show."""

    gateway: Served
    engine: FakeEngine
    load: LoadProcess
    turns: int = 0

    def processes(self) -> list[psutil.Process]:
        """Everything of the gateway: supervisor and worker."""
        return [psutil.Process(self.gateway.process.pid), *self.gateway.workers()]

    async def cost(self, job: Job) -> tuple[float, int]:
        """CPU seconds of the gateway for this load, and the chunks of its streams."""
        before_s = cpu_s(self.processes())
        outcome = await self.load.run(job)
        assert outcome.verdicts == {"whole": job.requests}, outcome
        self.turns += job.requests
        await self.gateway.until_settled(self.turns)
        return cpu_s(self.processes()) - before_s, outcome.events

    def job(self, *, prompt_bytes: int = 100, **changes: Any) -> Job:
        stream = {"stream": True} if changes.pop("stream", False) else {}
        body = {
            "model": MODEL, "messages": [{"role": "user", "content": ("a few words " * 400)[:prompt_bytes]}],
            "max_tokens": changes.pop("tokens", 16), "ignore_eos": True, **stream,
        }  # fmt: skip
        return Job(**({"url": self.gateway.url, "key": self.gateway.key, "body": body} | changes))


Measure = Callable[[Bench], Awaitable[dict[str, float]]]


def whole_answers(prompt_bytes: int, name: str) -> Measure:
    """CPU a chat request whose answer is not a stream."""

    async def measure(bench: Bench) -> dict[str, float]:
        await bench.engine.knobs(pace_ms=0.0)
        job = bench.job(prompt_bytes=prompt_bytes, connections=CONNECTIONS, requests=WHOLE_REQUESTS)
        seconds, _ = await bench.cost(job)
        return {name: seconds / WHOLE_REQUESTS * 1e6}

    return measure


async def burst_chunks(bench: Bench) -> dict[str, float]:
    """CPU a chunk when an engine sends a hundred at once."""
    await bench.engine.knobs(pace_ms=0.0)
    job = bench.job(stream=True, tokens=BURST_CHUNKS, connections=CONNECTIONS, requests=BURST_REQUESTS * 5)
    seconds, chunks = await bench.cost(job)
    return {
        "CPU a chunk, burst of 100": seconds / chunks * 1e6,
        "CPU a stream of 100 chunks": seconds / job.requests * 1e6,
    }


async def paced_chunks(bench: Bench) -> dict[str, float]:
    """CPU a chunk when 64 streams get one every 20 ms, each at its own moment."""
    await bench.engine.knobs(pace_ms=PACE_MS, jitter=0.3)
    job = bench.job(stream=True, tokens=PACED_CHUNKS, connections=PACED_STREAMS, requests=PACED_STREAMS)
    seconds, chunks = await bench.cost(job)
    await bench.engine.knobs(pace_ms=0.0, jitter=0.0)
    return {"CPU a chunk, paced 20 ms x 64": seconds / chunks * 1e6}


async def latency(bench: Bench) -> dict[str, float]:
    """Latency of whole answers at a fixed rate, through the gateway and straight from the engine."""
    await bench.engine.knobs(pace_ms=0.0)
    rated = {"connections": 4, "requests": int(RATE * RATE_S), "rate": RATE}
    through = await bench.load.run(bench.job(**rated))
    bench.turns += through.verdicts["whole"]
    direct = await bench.load.run(bench.job(url=bench.engine.url, key="", **rated))
    assert through.verdicts == direct.verdicts, (through, direct)
    return {
        "latency p50 at 200/s, direct": direct.p50_ms,
        "latency p50 at 200/s, through": through.p50_ms,
        "latency p50 at 200/s, added": through.p50_ms - direct.p50_ms,
        "latency p99 at 200/s, direct": direct.p99_ms,
        "latency p99 at 200/s, through": through.p99_ms,
        "latency p99 at 200/s, added": through.p99_ms - direct.p99_ms,
    }


async def idle(bench: Bench) -> dict[str, float]:
    """CPU a second without a request: polls, health checks, load sharing. It is inside the other numbers."""
    before_s = cpu_s(bench.processes())
    await asyncio.sleep(IDLE_S)
    return {"CPU a second, idle": (cpu_s(bench.processes()) - before_s) / IDLE_S * 1e6}


MEASURES: tuple[Measure, ...] = (
    whole_answers(100, "CPU a request, body 200 B"),
    whole_answers(3900, "CPU a request, body 4 KB"),
    burst_chunks,
    paced_chunks,
    latency,
    idle,
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--only", help="measure only what has this in its name, such as 'whole' or 'paced'")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="where to write (default: bench/RESULTS.md)"
    )
    args = parser.parse_args()
    raise_descriptor_limit()
    about = machine()
    rows = uvloop.run(measure_all(args.rounds, args.only or ""))
    if args.json:
        print(json.dumps({"about": about, "rows": [row.to_json() for row in rows]}, indent=2))
    else:
        print(as_text(rows))
    if not args.only:
        write_section(args.out, TITLE, rows_as_markdown("bench/cost.py", about, rows, rounds=args.rounds))
    return 0


async def measure_all(rounds: int, only: str) -> list[Row]:
    """Every question `rounds` times, in turn; one more round before them warms up."""
    measures = [measure for measure in MEASURES if only in measure.__qualname__]
    found: dict[str, list[float]] = defaultdict(list)
    folder = Path(tempfile.mkdtemp(prefix="poolgate-bench-"))
    try:
        with EmbeddedStores.start(folder / "stores") as stores:
            async with running(stores, folder) as bench:
                for number in range(rounds + 1):
                    print(
                        f"round {number} of {rounds}" if number else "warming up", file=sys.stderr, flush=True
                    )
                    for measure in measures:
                        for name, value in (await measure(bench)).items():
                            if number:
                                found[name].append(value)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [_row(name, values) for name, values in found.items()]


def _row(name: str, values: Sequence[float]) -> Row:
    unit = "µs" if name.startswith("CPU") else "ms"
    return Row(name, unit, statistics.median(values), min(values), max(values))


@asynccontextmanager
async def running(stores: EmbeddedStores, folder: Path) -> AsyncIterator[Bench]:
    """A gateway with one worker and settings as shipped; NODES nodes behind it, all of them one stand-in engine."""
    await migrate(stores.database_url)
    settings = load_settings(
        environ={}, database_url=stores.database_url, redis_url=stores.redis_url, data_dir=str(folder / "data"),
        key_pepper="pepper-of-the-bench", heartbeat_interval_s=600.0, heartbeat_grace_s=3600.0,
    )  # fmt: skip
    async with (
        await open_pool(stores.database_url, max_size=2, timeout_s=30.0) as pool,
        served(settings, pool, folder) as gateway,
        FakeEngine("--no-record", "--max-num-seqs", "1024") as engine,
        LoadProcess() as load,
    ):
        await gateway.register(engine.url, nodes=NODES)
        yield Bench(gateway, engine, load)


if __name__ == "__main__":
    sys.exit(main())
