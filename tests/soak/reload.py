"""SIGHUP under load, beside kill -9 of workers, and SIGTERM under load: who sees an error, has every turn its record.

A request that was sent and not answered whole has failed; only on the connections of a worker that was killed it may. What a
reload changes stands in a settings file. The probe port says how many workers serve.
"""

import asyncio
import json
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from bench.load import Client, Job, request_bytes
from bench.processes import MODEL, fetch, free_port
from billing.money import NANO
from config.defaults import Settings
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from nodes.heartbeats import NodeStore
from nodes.protocol import EngineReport, Heartbeat, ModelInfo
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway_process import GatewayProcess
from tests.soak.crowd import GIVE_UP_S, TOKENS, Crowd, crowd
from tests.waiting import eventually, wait_until

KNOBS = {"ttft_ms": 20.0, "pace_ms": 15.0, "jitter": 0.3}
WORKERS, WORKERS_MORE = 2, 3
QUEUED = 24
"""Connections made, and requests sent, while no worker can accept: they wait in the kernel when SIGTERM comes."""


@dataclass(frozen=True, slots=True)
class Reloads:
    """How many clients, how often all is reloaded, how often a worker is killed in that, how many turns lie between."""

    clients: int
    reloads: int
    kills: int
    turns: int


@dataclass(frozen=True, slots=True)
class Stops:
    """How many clients, how often the gateway is stopped and started again, how many turns lie between."""

    clients: int
    stops: int
    turns: int


RELOADS_SHORT = Reloads(clients=48, reloads=2, kills=1, turns=96)
RELOADS_LONG = Reloads(clients=64, reloads=12, kills=4, turns=400)
STOPS_SHORT = Stops(clients=48, stops=1, turns=96)
STOPS_LONG = Stops(clients=64, stops=10, turns=300)


@dataclass
class Running:
    """A gateway over one engine, and what its clients may use."""

    gateway: GatewayProcess
    config: Path
    probe_url: str
    key: str
    pool: asyncpg.Pool
    broken: set[int] = field(
        default_factory=set
    )  # clients' ports of connections that died with a killed worker

    def write(self, workers: int, **settings: Any) -> None:
        """The settings file, as the next start or reload finds it."""
        lines = [f"{name} = {json.dumps(value)}" for name, value in {"workers": workers, **settings}.items()]
        self.config.write_text("\n".join(lines) + "\n")

    async def until_serving(self, workers: int) -> None:
        """So many serve, and no other is left."""

        async def is_so() -> bool:
            told = await asyncio.to_thread(fetch, self.probe_url + "/ready")
            return told["workers_ready"] == workers == len(self.gateway.workers())

        await eventually(is_so)

    def kill_the_busiest(self) -> int:
        """kill -9 of the worker with most clients; how many it had."""
        ports: dict[psutil.Process, set[int]] = {}
        for worker in self.gateway.workers():
            worker.suspend()  # what it has not accepted by now, another will
            wait_until(lambda: worker.status() == psutil.STATUS_STOPPED)  # noqa: B023 - called here
            ports[worker] = self.gateway.client_ports(worker)
        victim = max(ports, key=lambda worker: len(ports[worker]))
        self.broken |= ports[victim]
        victim.kill()
        for worker in ports:
            if worker != victim:
                worker.resume()
        return len(ports[victim])

    async def records(self) -> dict[str, tuple[int, int]]:
        """Usage rows and their tokens, by how turns ended."""
        rows = await self.pool.fetch(
            "select outcome, count(*), sum(completion_tokens)::bigint as tokens from usage group by 1"
        )
        return {row["outcome"]: (row["count"], row["tokens"]) for row in rows}


async def reloaded(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Reloads, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """SIGHUP again and again, with one worker more and one less in turn; in some of them a worker is killed."""
    async with running(settings, pool, folder) as run:
        async with crowd(run.gateway.url, run.key, size.clients) as seen:
            for number in range(size.reloads):
                await _more(seen, size.turns)
                workers = WORKERS if number % 2 else WORKERS_MORE
                run.write(workers, chunk_timeout_s=61.0 + number)
                run.gateway.reload()
                if number < size.kills:
                    await run.gateway.until_logged("reloading", number + 1)
                    tell(f"killed a worker with {run.kill_the_busiest()} connections in reload {number + 1}")
                await run.gateway.until_logged("reloaded, with", number + 1)
                await run.until_serving(workers)
                tell(f"reload {number + 1}: {workers} new workers serve, {dict(seen.verdicts)}")
            await _more(seen, size.turns)
        code = await run.gateway.stop()
        records = await run.records()
    failed = [answer for _, answer in seen.failures if answer.local_port not in run.broken]
    numbers = {
        "reloads": size.reloads,
        "workers killed": size.kills,
        "turns": seen.turns,
        "whole": seen.verdicts["whole"],
        "broken on the killed workers' connections": len(seen.failures) - len(failed),
        "broken elsewhere": len(failed),
        "usage records": sum(count for count, _ in records.values()),
    }
    tell(str(numbers))
    assert not failed, seen.told()
    assert code == 0
    _whole_turns_are_recorded(seen.verdicts["whole"], records, may_be_more=len(seen.failures))
    return numbers


async def stopped(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Stops, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """SIGTERM while clients ask and connections wait to be accepted; then it starts again, on the same port."""
    turns = whole = refused = 0
    failed: list[str] = []
    async with running(settings, pool, folder) as run:
        for number in range(size.stops):
            if number:
                await run.gateway.start()
                await run.gateway.until_engines(1)
            await run.until_serving(WORKERS)
            async with crowd(run.gateway.url, run.key, size.clients, may_refuse=True) as seen:
                await _more(seen, size.turns)
                queued = await _stop_with_queued(run)
                # A client ends when it is refused, or at the end of this block; so the last ones were answered.
                await eventually(lambda: seen.refused_connections == size.clients)
                answers = await asyncio.gather(*queued)
            assert await asyncio.to_thread(run.gateway.wait) == 0
            for answer in answers:
                seen.note(False, answer)
            turns, whole = turns + seen.turns, whole + seen.verdicts["whole"]
            refused += seen.refused_connections
            failed += [seen.told()] if seen.failures else []
            tell(f"stop {number + 1}: {dict(seen.verdicts)}")
        records = await run.records()
    numbers = {
        "stops": size.stops,
        "connections in the kernel's queues at SIGTERM": QUEUED * size.stops,
        "turns": turns,
        "whole": whole,
        "sent and not answered whole": turns - whole,
        "refused connections after that": refused,
        "usage records": sum(count for count, _ in records.values()),
    }
    tell(str(numbers))
    assert turns == whole, "\n".join(failed)
    _whole_turns_are_recorded(whole, records)
    return numbers


@asynccontextmanager
async def running(settings: Settings, pool: asyncpg.Pool, folder: Path) -> AsyncIterator[Running]:
    """A gateway of two workers that knows one engine; stopped at the end if it is not yet."""
    account = await AccountStore(pool).create("soak", balance_nano=1_000_000 * NANO, is_provider=True)
    _, key = await KeyStore(pool, load_pepper(settings)).create(account.id, prefix="sk-pg-")
    probe_port = free_port()
    # Not in the environment, which would win over the file: the number of workers. A client between two turns has the time
    # that it has in production: with less, a busy machine's would send a request into the end of its connection.
    settings = replace(
        settings, workers=1, probe_port=probe_port, heartbeat_grace_s=3600.0, heartbeat_interval_s=30.0,
        shutdown_grace_s=30.0, drain_idle_s=Settings().drain_idle_s,
    )  # fmt: skip
    async with FakeEngine("--no-record", **KNOBS) as engine:
        report = EngineReport(
            engine_id="e0",
            url=engine.url,
            state="ready",
            models=(ModelInfo(id=MODEL, context_length=2048),),
        )
        beat = Heartbeat(api_key="-", node_id=str(uuid.uuid4()), engines=(report,))
        await NodeStore(pool).record(account.id, beat, beat.engines)
        gateway = GatewayProcess(settings, folder, config=folder / "poolgate.toml")
        run = Running(gateway, folder / "poolgate.toml", f"http://127.0.0.1:{probe_port}", key, pool)
        run.write(WORKERS)
        async with gateway:
            await gateway.until_engines(1)
            await run.until_serving(WORKERS)
            yield run


async def _stop_with_queued(run: Running) -> list["asyncio.Task[Any]"]:
    """SIGTERM while QUEUED connections wait that no worker could accept; the requests that were sent on them."""
    request = request_bytes(Job(run.gateway.url, key=run.key, body={
        "model": MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": TOKENS, "ignore_eos": True,
    }))  # fmt: skip
    workers = run.gateway.workers()
    for worker in workers:
        worker.suspend()
    clients = [Client("127.0.0.1", run.gateway.port) for _ in range(QUEUED)]
    queued = [asyncio.create_task(client.ask(request, GIVE_UP_S)) for client in clients]
    await eventually(lambda: all(client.local_port for client in clients))
    run.gateway.send_signal(signal.SIGTERM)
    await eventually(lambda: not fetch_ready(run.probe_url))
    for worker in workers:
        worker.resume()
    return queued


def fetch_ready(probe_url: str) -> bool:
    """What the probe port says."""
    try:
        return bool(fetch(probe_url + "/ready")["ready"])
    except OSError:
        return False


async def _more(seen: Crowd, turns: int) -> None:
    """Until the clients have had so many more answers."""
    enough = seen.turns + turns
    await eventually(lambda: seen.turns >= enough)


def _whole_turns_are_recorded(
    whole: int, records: dict[str, tuple[int, int]], *, may_be_more: int = 0
) -> None:
    """`may_be_more`: turns whose record was written before a killed worker could send their last bytes, at most."""
    finished, tokens = records.get("finished", (0, 0))
    assert whole <= finished <= whole + may_be_more, (whole, records)
    assert tokens == finished * TOKENS, records
