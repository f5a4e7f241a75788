"""A thousand slow streams through one worker: none is lost, all are whole, and each costs little memory.

The client and the engine are processes of their own, so what the worker's memory says is the gateway's.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg

from bench.load import Job
from bench.processes import MODEL, LoadProcess, memory_bytes, served
from config.defaults import Settings
from tests.fakes.engine import FakeEngine

PROMPT = "The quick brown fox. " * 195  # 4 KB
STREAM_KB_MAX = 60
"""A stream has an aiohttp connection with its parser and request, a task, a turn and an engine's connection."""

SAMPLE_S = 0.25


@dataclass(frozen=True, slots=True)
class Size:
    """How many streams of how many chunks; each comes `pace_ms` after the one before."""

    streams: int
    chunks: int
    pace_ms: float


SHORT = Size(streams=200, chunks=8, pace_ms=250)
LONG = Size(streams=1000, chunks=120, pace_ms=500)


async def many_slow_streams(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Size, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """KB of memory a stream, and what became of the streams."""
    settings = replace(settings, workers=1, heartbeat_grace_s=3600.0, heartbeat_interval_s=30.0)
    flags = ("--max-num-seqs", str(2 * size.streams), "--no-record")
    async with (
        served(settings, pool, folder) as gateway,
        FakeEngine(*flags, pace_ms=size.pace_ms, jitter=0.2) as engine,
        LoadProcess() as load,
    ):
        await gateway.register(engine.url)
        await engine.knobs(pace_ms=5.0)
        warm = _job(gateway.url, gateway.key, streams=max(20, size.streams // 5), chunks=10)
        assert (await load.run(warm)).verdicts == {"whole": warm.requests}
        await engine.knobs(pace_ms=size.pace_ms)
        (worker,) = gateway.workers()
        own_before, resident_before = memory_bytes(worker)
        job = _job(gateway.url, gateway.key, streams=size.streams, chunks=size.chunks)
        running = asyncio.create_task(load.run(job))
        await engine.until(lambda record: record["running"] == size.streams or running.done())
        tell(f"{size.streams} streams flow")
        own, resident = own_before, resident_before
        while not running.done():
            own_now, resident_now = memory_bytes(worker)
            own, resident = max(own, own_now), max(resident, resident_now)
            await asyncio.wait({running}, timeout=SAMPLE_S)
        outcome = await running
        (still,) = gateway.workers()
        assert still.pid == worker.pid, "the worker was replaced"
        settled = await gateway.until_settled(warm.requests + size.streams)
        most = (await engine.record())["max_running"]
    numbers = {
        "streams": size.streams,
        "streams at once in the engine": most,
        "whole": outcome.verdicts.get("whole", 0),
        "chunks": outcome.events,
        "streams of another length than asked for": outcome.wrong_length,
        "seconds": round(outcome.seconds, 1),
        "KB a stream (worker's own memory, most)": round((own - own_before) / size.streams / 1024, 1),
        "KB a stream (resident, most)": round((resident - resident_before) / size.streams / 1024, 1),
        "MB of the worker before (own)": round(own_before / 2**20, 1),
    }
    assert outcome.verdicts == {"whole": size.streams}, outcome
    assert outcome.wrong_length == 0, outcome
    assert settled == {"finished": warm.requests + size.streams}, settled
    assert most == size.streams, most
    assert own - own_before <= size.streams * STREAM_KB_MAX * 1024, numbers
    tell(str(numbers))
    return numbers


def _job(url: str, key: str, *, streams: int, chunks: int) -> Job:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "stream": True,
        "max_tokens": chunks,
        "ignore_eos": True,
    }
    # One more event than tokens: the first one says that the assistant speaks.
    return Job(
        url, key=key, body=body, connections=streams, requests=streams, events=chunks + 1, give_up_s=300.0
    )
