"""What all arms of a measurement stand on: PostgreSQL, Valkey, one stand-in engine with ten addresses, the load generator.

Arms are started here by name, each of ours in a database of its own.
"""

import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TypeVar

import asyncpg
import uvloop

from bench.arms import CONTEXT_LENGTH, DIRECT, OURS, UNBILLED, Arm, everything_on, peer, worker
from bench.clocks import CpuClock
from bench.load import Job, Outcome
from bench.peers import PEERS, NotInstalled
from bench.processes import LoadProcess, Served
from bench.rounds import tell
from config.defaults import Settings
from config.embedded import EmbeddedStores
from config.postgres import migrate, open_pool
from config.settings import load_settings
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from gateway.supervisor import raise_descriptor_limit
from tests.fakes.engine import FakeEngine

T = TypeVar("T")

NODES = 10
STREAMS_MAX = 20_000
ALL = (OURS, UNBILLED, *(each.name for each in PEERS))
"""Every gateway, in the order of tables."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What one load took: CPU seconds of the gateway and of the stores, and what came back."""

    gateway_s: float
    postgres_s: float
    valkey_s: float
    outcome: Outcome


@dataclass
class Ground:
    """Everything but the arms. `engines` are ten URLs of one process."""

    stores: EmbeddedStores
    engine: FakeEngine
    load: LoadProcess
    folder: Path
    _numbers: Iterator[int] = field(default_factory=count)

    @property
    def engines(self) -> list[str]:
        return [f"http://127.0.0.{last}:{self.engine.port}" for last in range(1, NODES + 1)]

    async def spend(self, arm: Arm, job: Job) -> Spent:
        """Put the load on, wait until everything that it caused is done, and read the clocks. Every answer must be whole."""
        clocks = (
            arm.clock,
            *(CpuClock(pid) for pid in map(self.stores.pids.__getitem__, ("postgres", "valkey"))),
        )
        before = [clock.read_s() for clock in clocks]
        outcome = await self.load.run(job)
        assert outcome.verdicts == {"whole": job.requests}, (arm.name, outcome)
        await arm.settle(job.requests)
        gateway_s, postgres_s, valkey_s = (
            clock.read_s() - then for clock, then in zip(clocks, before, strict=True)
        )
        return Spent(gateway_s, postgres_s, valkey_s, outcome)

    @asynccontextmanager
    async def start(self, name: str) -> AsyncIterator[Arm]:
        """One arm, for as long as it is needed. Raises NotInstalled."""
        folder = self.folder / f"{next(self._numbers)}-{name.partition(',')[0]}"
        folder.mkdir()
        if name == DIRECT:
            yield Arm(DIRECT, self.engine.url, "", CpuClock())
        elif name in (OURS, UNBILLED):
            async with self.database(folder) as (settings, pool):
                start = everything_on if name == OURS else _unbilled
                async with start(settings, pool, self.engines, folder) as arm:
                    yield arm
        else:
            (other,) = (each for each in PEERS if each.name == name)
            async with peer(other, self.engines, folder) as arm:
                yield arm

    @asynccontextmanager
    async def together(self, names: Sequence[str]) -> AsyncIterator[list[Arm]]:
        """All of these side by side; a peer that is not installed is told and left out."""
        async with AsyncExitStack() as stack:
            arms = []
            for name in names:
                tell(f"starting {name}")
                try:
                    arms.append(await stack.enter_async_context(self.start(name)))
                except NotInstalled as missing:
                    tell(f"left out: {missing}")
            yield arms

    @asynccontextmanager
    async def database(self, folder: Path) -> AsyncIterator[tuple[Settings, asyncpg.Pool]]:
        """A fresh one, as settings, with a pool of our own in it."""
        url = await fresh_database(self.stores.database_url, f"bench_{next(self._numbers)}")
        settings = load_settings(
            environ={}, database_url=url, redis_url=self.stores.redis_url, data_dir=str(folder / "data"),
            key_pepper="pepper-of-the-bench", heartbeat_interval_s=600.0, heartbeat_grace_s=3600.0,
            node_networks="127.0.0.0/8",
        )  # fmt: skip
        async with await open_pool(url, max_size=2, timeout_s=30.0) as pool:
            yield settings, pool


def on_ground(measure: Callable[[Ground], Awaitable[T]]) -> T:
    """Run a measurement on a ground of its own, in a folder that goes away with it. Main thread only."""
    raise_descriptor_limit()
    folder = Path(tempfile.mkdtemp(prefix="poolgate-bench-"))
    try:
        with EmbeddedStores.start(folder / "stores") as stores:
            return uvloop.run(_on(stores, folder, measure))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def _unbilled(
    settings: Settings, pool: asyncpg.Pool, engines: Sequence[str], folder: Path
) -> AsyncIterator[Arm]:
    account = await AccountStore(pool).create("bench", is_provider=True)
    _, key = await KeyStore(pool, load_pepper(settings)).create(account.id, prefix="sk-pg-")
    async with worker("bench.unbilled", settings, folder) as unbilled:
        seen = Served(unbilled.process, unbilled.url, pool, account.id, key, "", folder)
        for engine in engines:
            await seen.register(engine, context_length=CONTEXT_LENGTH)
        await seen.until_engines(len(engines))
        yield Arm(UNBILLED, unbilled.url, key, unbilled.clock)


async def _on(stores: EmbeddedStores, folder: Path, measure: Callable[[Ground], Awaitable[T]]) -> T:
    flags = (
        "--no-record", "--max-num-seqs", str(STREAMS_MAX), "--max-model-len", str(CONTEXT_LENGTH), "--also",
        *(f"127.0.0.{last}" for last in range(2, NODES + 1)),
    )  # fmt: skip
    async with FakeEngine(*flags) as engine, LoadProcess() as load:
        return await measure(Ground(stores, engine, load, folder))


async def fresh_database(server_url: str, name: str) -> str:
    """The address of a new database `name` with our tables, on the server of the stores."""
    connection = await asyncpg.connect(server_url)
    try:
        await connection.execute(f"create database {name}")
    finally:
        await connection.close()
    url = server_url.replace("/postgres?", f"/{name}?")
    assert url != server_url, "the stores' address has another shape"
    await migrate(url)
    return url
