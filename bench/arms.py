"""Whatever stands between the load and the engine in a measurement: poolgate, poolgate without its money, a peer, nothing.

An arm is a URL, a key, and the clock of all its processes. How rounds alternate between arms is `rounds`'; what they all
stand on is `ground`'s.
"""

import asyncio
import json
import signal
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg

from bench.accounts import BUDGETS, HIGH, LARGE_NANO, make_accounts
from bench.bodies import chat_body
from bench.clocks import CpuClock
from bench.peers import Peer
from bench.processes import ROOT, START_S, Served, await_ready, ended, environment, free_port, served
from config.defaults import Settings
from config.metrics import FOLDER_VARIABLE
from config.procs import Child, spawn, spawn_python
from gateway.identity.secrets import load_pepper
from gateway.supervisor import listening_sockets
from gateway.worker import orders

OURS = "poolgate"
UNBILLED = "poolgate, billing off"
DIRECT = "direct"
CONTEXT_LENGTH = 131_072
"""Room for a prompt of 64 KB."""

SETTLED_S = 120.0


async def nothing_left(requests: int) -> None:
    """What a gateway does that has nothing to do after an answer."""


@dataclass(frozen=True)
class Arm:
    """`settle` waits until the work that so many requests leave behind is done. `few` and `streams_max` are as a peer's."""

    name: str
    url: str
    key: str
    clock: CpuClock
    settle: Callable[[int], Awaitable[None]] = nothing_left
    few: float = 1.0
    streams_max: int = 10**9


class Shipping:
    """Waits for the usage of every turn so far to be in PostgreSQL."""

    def __init__(self, gateway: Served) -> None:
        self._gateway = gateway
        self._turns = 0

    async def __call__(self, requests: int) -> None:
        self._turns += requests
        async with asyncio.timeout(SETTLED_S):
            await self._gateway.until_settled(self._turns)


@asynccontextmanager
async def everything_on(
    settings: Settings, pool: asyncpg.Pool, engines: Sequence[str], folder: Path
) -> AsyncIterator[Arm]:
    """`poolgate serve` with one worker, all as shipped; the key has limits and budgets, of its own and of its account."""
    async with served(settings, pool, folder) as gateway:
        pepper = load_pepper(settings)
        (key,) = await make_accounts(pool, pepper, "limited", 1, balance_nano=LARGE_NANO, **HIGH, **BUDGETS)
        for engine in engines:
            await gateway.register(engine, context_length=CONTEXT_LENGTH)
        await gateway.until_engines(len(engines))
        yield Arm(OURS, gateway.url, key, CpuClock(gateway.process.pid), Shipping(gateway))


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker process; it has no supervisor here, whose CPU is that of a timer."""

    process: Child
    url: str

    @property
    def clock(self) -> CpuClock:
        return CpuClock(self.process.pid)


@asynccontextmanager
async def worker(module: str, settings: Settings, folder: Path) -> AsyncIterator[Worker]:
    """A worker as the supervisor would start it, of `gateway.worker` or of `bench.unbilled`."""
    settings = replace(settings, port=free_port())
    metrics, log = folder / f"{module}-metrics", folder / f"{module}.log"
    metrics.mkdir()
    (sock,) = listening_sockets(settings)
    with sock, log.open("wb") as output:
        process = spawn_python(
            module, pass_fds=(sock.fileno(),), stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=ROOT,
            env={"MALLOC_ARENA_MAX": "1", **environment(Settings()), FOLDER_VARIABLE: str(metrics)},
        )  # fmt: skip
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(orders(settings, sock.fileno()))
    url = f"http://127.0.0.1:{settings.port}"
    try:
        await asyncio.to_thread(await_ready, process, url, log)
        yield Worker(process, url)
    finally:
        await ended(process)


@asynccontextmanager
async def peer(other: Peer, engines: Sequence[str], folder: Path) -> AsyncIterator[Arm]:
    """Another gateway in front of the same engines. Raises NotInstalled."""
    other.check()
    port = free_port()
    log = folder / "log"
    with log.open("wb") as output:
        process = spawn(
            other.command(port, engines, folder), stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder,
            env={**environment(Settings()), **other.environment}, death_signal=signal.SIGTERM,
        )  # fmt: skip
    arm = Arm(
        other.name, f"http://127.0.0.1:{port}", other.key, CpuClock(process.pid), few=other.few,
        streams_max=other.streams_max,
    )  # fmt: skip
    try:
        await asyncio.to_thread(_await_answer, arm, process, log)
        yield arm
    finally:
        await ended(process)


def _await_answer(arm: Arm, process: Child, log: Path) -> None:
    """Wait until it answers a chat request: some listen long before they know their engines."""
    body = json.dumps(chat_body(0, tokens=1)).encode()
    head = {"content-type": "application/json", "authorization": f"Bearer {arm.key}"}
    deadline_s = time.monotonic() + START_S
    while True:
        assert process.poll() is None, f"{arm.name} ended:\n{log.read_text()[-4000:]}"
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{arm.url}/v1/chat/completions", body, head), timeout=10
            ) as reply:
                reply.read()
                return
        except OSError as error:
            refused = error
        assert time.monotonic() < deadline_s, f"{arm.name}: {refused}\n{log.read_text()[-4000:]}"
        time.sleep(0.1)
