"""Clients that ask for a stream and read nothing: the worker does not grow, and in the end their turns give the engine back.

The engine produces far more than all buffers between it and such a client hold: whatever the gateway would keep, shows.
"""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg
import psutil

from bench.load import Job, request_bytes
from bench.processes import MODEL, LoadProcess, memory_bytes, served
from config.defaults import Settings
from tests.fakes.engine import FakeEngine

TOKENS = 150_000
"""About 30 MB of events for each client: loopback sockets alone hold up to 10."""

CONTEXT = 2 * TOKENS

SOCKET_READ_BYTES = 256 * 1024
"""What one read of an engine's socket brings at most (uvloop), on top of a buffer that is nearly full."""

SLACK_BYTES = 4 * 2**20
GROWTH_BYTES_MAX = 2**20
"""In the second half of the watch: in the first one a young worker does some things for the first time."""

READ_MB_MAX = 4.0
"""A minute of the stores' answers and of heartbeats; the engine would send that in milliseconds."""

STILL_BYTES = 100_000
QUIET_SAMPLES = 3
SAMPLE_S = 0.25


@dataclass(frozen=True, slots=True)
class Size:
    """How many clients read nothing, for how long they are watched, and after how long the gateway takes them as gone."""

    clients: int
    watched_s: float
    client_stall_s: float


SHORT = Size(clients=20, watched_s=1.0, client_stall_s=8.0)
LONG = Size(clients=50, watched_s=60.0, client_stall_s=75.0)


async def clients_that_read_nothing(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Size, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """How much the worker holds for them, and how much it grows while they go on reading nothing."""
    settings = replace(
        settings, workers=1, client_stall_s=size.client_stall_s, heartbeat_grace_s=3600.0, heartbeat_interval_s=30.0
    )  # fmt: skip
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Say a lot."}],
        "stream": True,
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }
    async with (
        served(settings, pool, folder) as gateway,
        FakeEngine("--max-model-len", str(CONTEXT)) as engine,
        LoadProcess() as load,
    ):
        await gateway.register(engine.url, context_length=CONTEXT)
        warm = Job(
            gateway.url, key=gateway.key, body=body | {"max_tokens": 500}, connections=20, requests=200
        )
        assert (await load.run(warm)).verdicts == {"whole": warm.requests}
        (worker,) = gateway.workers()
        before, _ = memory_bytes(worker)
        port = int(gateway.url.rsplit(":", 1)[1])
        request = request_bytes(Job(gateway.url, key=gateway.key, body=body))
        clients = [_ask_and_read_nothing(port, request) for _ in range(size.clients)]
        await engine.until(lambda record: record["running"] == size.clients)
        await _until_still(worker)
        tell(f"{size.clients} clients read nothing; the engine stands still")
        held, _ = memory_bytes(worker)
        read_before = _read(worker)
        samples = [held]
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + size.watched_s
        while loop.time() < ends_s:
            samples.append(memory_bytes(worker)[0])
            await asyncio.sleep(SAMPLE_S)
        half, most = samples[len(samples) // 2], max(samples)
        read_mb = _mb(_read(worker) - read_before)
        assert (await engine.record())["running"] == size.clients, "a turn ended before client_stall_s"
        await engine.until(lambda record: record["running"] == 0)
        tell("every turn of theirs has ended")
        outcomes = await gateway.until_settled(warm.requests + size.clients)
        for client in clients:
            client.close()
        after, _ = memory_bytes(worker)
    allowed = size.clients * (settings.stream_buffer_bytes + SOCKET_READ_BYTES) + SLACK_BYTES
    numbers = {
        "clients": size.clients,
        "watched, seconds": size.watched_s,
        "MB held for all of them": _mb(held - before),
        "MB allowed by the settings": _mb(allowed),
        "MB grown while watched": _mb(samples[-1] - held),
        "MB grown in the second half of that": _mb(samples[-1] - half),
        "MB read by the worker while watched": read_mb,
        "MB after their end, against before": _mb(after - before),
        "turns ended by client_stall_s": outcomes.get("client_gone", 0),
    }
    assert most - before <= allowed, numbers
    assert read_mb <= READ_MB_MAX, numbers
    assert samples[-1] - half <= GROWTH_BYTES_MAX, numbers
    assert outcomes == {"finished": warm.requests, "client_gone": size.clients}, outcomes
    tell(str(numbers))
    return numbers


def _ask_and_read_nothing(port: int, request: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(request)
    return client


def _read(worker: psutil.Process) -> int:
    """Bytes that the process read from sockets and files."""
    return int(worker.io_counters().read_chars)


async def _until_still(worker: psutil.Process) -> None:
    """Return when the worker reads no more than it does when idle: every buffer on the way is full."""
    quiet, before = 0, _read(worker)
    while quiet < QUIET_SAMPLES:
        await asyncio.sleep(SAMPLE_S)
        now = _read(worker)
        quiet = quiet + 1 if now - before < STILL_BYTES else 0
        before = now


def _mb(size: float) -> float:
    return round(size / 2**20, 2)
