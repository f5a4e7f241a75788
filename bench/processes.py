"""The processes of a benchmark or soak: a gateway as `poolgate serve` runs it, a load generator, what they cost.

Stores are the caller's. Engines are `tests.fakes.engine`'s; the numbers are read from /proc by psutil.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from socket import create_server
from typing import Any

import asyncpg
import psutil

from bench.bodies import MODEL
from bench.load import Job, Outcome
from billing.money import NANO
from config.compiled import SWITCH
from config.defaults import Settings
from config.procs import Child, spawn_python
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from nodes.heartbeats import NodeStore
from nodes.protocol import EngineReport, Heartbeat, ModelInfo

ROOT = Path(__file__).resolve().parents[1]
START_S = 60.0
STOP_S = 60.0
POLL_S = 0.02


@dataclass
class Served:
    """A running `poolgate serve` and an account, with 1,000,000.00, that may use it and own nodes."""

    process: Child
    url: str
    pool: asyncpg.Pool
    account_id: int
    key: str
    provider_key: str
    log: Path

    def workers(self) -> list[psutil.Process]:
        """The worker processes now."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                if "gateway.worker" in child.cmdline():
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    async def register(
        self, url: str, *, nodes: int = 1, context_length: int = 2048, kv_tokens: int = 0, block_size: int = 0
    ) -> None:
        """Make the engine at `url` known on `nodes` nodes of its own, as agents would; returns when turns go there."""
        info = ModelInfo(id=MODEL, context_length=context_length)
        engine = EngineReport(
            engine_id="e0", url=url, state="ready", models=(info,), kv_tokens=kv_tokens, block_size=block_size
        )
        store = NodeStore(self.pool)
        for _ in range(nodes):
            beat = Heartbeat(api_key="-", node_id=str(uuid.uuid4()), engines=(engine,))
            await store.record(self.account_id, beat, beat.engines)
        await self.until_engines(nodes)

    async def until_engines(self, count: int) -> None:
        """Wait until every worker that answers has so many engines for turns."""
        while not await asyncio.to_thread(self._has_engines, count):  # noqa: ASYNC110 - in other processes
            await asyncio.sleep(POLL_S)

    def _has_engines(self, count: int) -> bool:
        return all(self.engines() >= count for _ in range(4 * max(1, len(self.workers()))))

    def engines(self) -> int:
        """Engines that one worker sends turns to: each connection may reach another worker."""
        components = {part["name"]: part for part in fetch(f"{self.url}/health")["components"]}
        details = components["nodes"]["details"]
        return int(details["engines_ready"]) - int(details["breakers_open"])

    async def outcomes(self) -> dict[str, int]:
        """Usage records by how the turn ended."""
        rows = await self.pool.fetch("select outcome, count(*) from usage group by 1")
        return {row["outcome"]: row["count"] for row in rows}

    async def until_settled(self, turns: int) -> dict[str, int]:
        """The same, once there are so many."""
        while sum((found := await self.outcomes()).values()) < turns:  # noqa: ASYNC110 - in a database
            await asyncio.sleep(POLL_S)
        return found


def fetch(url: str) -> Any:
    """A small JSON answer, whatever its status."""
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        return json.load(error)


@asynccontextmanager
async def served(settings: Settings, pool: asyncpg.Pool, folder: Path) -> AsyncIterator[Served]:
    """`poolgate serve` on a free port of loopback with these settings; stopped at the end, killed if it does not."""
    pepper = load_pepper(settings)
    account = await AccountStore(pool).create("bench", balance_nano=1_000_000 * NANO, is_provider=True)
    keys = KeyStore(pool, pepper)
    _, key = await keys.create(account.id, prefix="sk-pg-")
    _, provider_key = await keys.create(account.id, prefix="dc1-provider-", scopes=("node",))
    port = free_port()
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = spawn_python(
            "gateway", "serve", "--port", str(port), env=environment(settings), cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        await asyncio.to_thread(await_ready, process, url, log)
        yield Served(process, url, pool, account.id, key, provider_key, log)
    finally:
        await ended(process)


async def ended(*processes: Child) -> None:
    """They are asked to end, all at once, and those that don't within STOP_S are made to."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            await asyncio.to_thread(process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)


def environment(settings: Settings) -> dict[str, str]:
    """The environment in which a process of ours has these settings and no others, and runs compiled if this one does."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("POOLGATE_") or name == SWITCH
    }
    usual = Settings()
    changed = {
        f"POOLGATE_{knob.name.upper()}": str(value)
        for knob in fields(settings)
        if (value := getattr(settings, knob.name)) != getattr(usual, knob.name)
    }
    return {**kept, **changed, "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def await_ready(process: Child, url: str, log: Path) -> None:
    """Wait until it serves; what it logged is told if it does not."""
    deadline_s = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline_s, f"not ready after {START_S:g} s:\n{log.read_text()}"
            time.sleep(POLL_S)


class LoadProcess:
    """The load generator as a process of its own: `async with LoadProcess() as load: await load.run(Job(...))`."""

    async def __aenter__(self) -> "LoadProcess":
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.load", cwd=ROOT,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def run(self, job: Job) -> Outcome:
        """Put one load on, and wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        line = await self._process.stdout.readline()
        assert line, "the load generator ended"
        return Outcome(**json.loads(line))


def memory_bytes(process: psutil.Process) -> tuple[int, int]:
    """(what is the process's own, what is resident at all)."""
    memory = process.memory_full_info()
    return memory.uss, memory.rss
