"""A pool in small: stand-in engines that are witnesses, accounts, and one or more real gateways over real stores.

What happens in it is its user's; at the end `reckon` brings everything to rest and holds the book against the oracle and
against `poolgate audit`.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import asyncpg

from billing import audit
from billing.journal import journal_root
from billing.recovery import journal_folders
from config.defaults import Settings
from config.postgres import AWAY
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from nodes.heartbeats import NodeStore
from nodes.protocol import EngineReport, Heartbeat, ModelInfo
from tests.fakes.clients import Ask, Clients, Sighting
from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.witness import WitnessEngine, numbered
from tests.simulation.oracle import Findings, Oracle, Prices, write_price_book
from tests.waiting import eventually

MODEL = "smollm2-135m"
CONTEXT = 2048
AT_REST_S = 60.0
"""Within so long after everything came back, what dead processes left is in the book."""


@dataclass(frozen=True, slots=True)
class Customer:
    """An account with its key."""

    id: int
    key_id: int
    key: str


@dataclass
class World:
    """`async with World(settings, pool, folder, prices) as world:`; its gateways and engines end with it."""

    settings: Settings
    pool: asyncpg.Pool
    folder: Path
    prices: Mapping[str, Prices]
    engines: list[WitnessEngine] = field(default_factory=list)
    gateways: list[GatewayProcess] = field(default_factory=list)
    credited: Counter[int] = field(default_factory=Counter)
    budgets: dict[int, int] = field(default_factory=dict)
    sightings: list[Sighting] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    _numbers: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        book = write_price_book(self.folder / "prices.toml", self.prices)
        self.settings = replace(
            self.settings, price_book=str(book), heartbeat_grace_s=3600.0, heartbeat_interval_s=30.0,
        )  # fmt: skip

    async def __aenter__(self) -> "World":
        self._stack = AsyncExitStack()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    async def engine(self, *flags: str, **knobs: Any) -> WitnessEngine:
        """One more engine, on a node of a provider of its own."""
        name = f"e{len(self.engines)}"
        engine = WitnessEngine(
            self.folder, name, "--served-model-name", *self.prices, "--max-num-seqs", "4096", *flags, **knobs
        )
        await self._stack.enter_async_context(engine)
        self.engines.append(engine)
        owner = await AccountStore(self.pool).create(f"provider of {name}", is_provider=True)
        models = tuple(ModelInfo(id=model, context_length=CONTEXT) for model in self.prices)
        report = EngineReport(engine_id="e0", url=engine.url, state="ready", models=models)
        beat = Heartbeat(api_key="-", node_id=engine.node_id, engines=(report,))
        await NodeStore(self.pool).record(owner.id, beat, beat.engines)
        return engine

    async def customer(
        self,
        name: str,
        balance_nano: int,
        limits: Mapping[str, int] | None = None,
        budget_nano: int | None = None,
    ) -> Customer:
        """An account of so much, whose key has these limits, and which may spend so much of it in all."""
        made = await AccountStore(self.pool).create(name, balance_nano=balance_nano)
        row, key = await KeyStore(self.pool, load_pepper(self.settings)).create(made.id, prefix="sk-pg-")
        self.credited[made.id] += balance_nano
        if limits:
            await self.pool.execute(
                "update api_keys set limits = $2 where id = $1", row.id, json.dumps(limits)
            )
        if budget_nano is not None:
            self.budgets[made.id] = budget_nano
            await self.pool.execute(
                "insert into budgets (account_id, period, limit_nano) values ($1, 'total', $2)",
                made.id,
                budget_nano,
            )
        return Customer(made.id, row.id, key)

    async def gateway(self, *, workers: int) -> GatewayProcess:
        """One that is ready and knows every engine."""
        gateway = GatewayProcess(replace(self.settings, workers=workers), self.folder)
        await self._stack.enter_async_context(gateway)
        self.gateways.append(gateway)
        await gateway.until_engines(len(self.engines))
        return gateway

    def ask(
        self, customer: Customer, words: str = "Count.", *, model: str = MODEL, leaves_after: int | None = None,
        leaves_s: float | None = None, idempotency_key: str | None = None, **body: Any,
    ) -> Ask:  # fmt: skip
        """A question with a number of its own."""
        self._numbers += 1
        message = {"role": "user", "content": numbered(words, self._numbers)}
        return Ask(
            self._numbers, customer.id, customer.key, {"model": model, "messages": [message], **body},
            idempotency_key=idempotency_key, leaves_after=leaves_after, leaves_s=leaves_s,
        )  # fmt: skip

    def clients(self, gateway: GatewayProcess) -> Clients:
        """Whose sightings count."""
        made = Clients(gateway.port)
        made.sightings = self.sightings
        return made

    def kill(self, gateway: GatewayProcess) -> None:
        """SIGKILL to all of it."""
        self.kills.append(time.time())
        gateway.kill()
        self.kills.append(time.time())

    def kill_worker(self, gateway: GatewayProcess, number: int) -> None:
        """SIGKILL to one worker; nothing where there is none just now."""
        workers = gateway.workers()
        if workers:
            self.kills.append(time.time())
            workers[number % len(workers)].kill()

    async def rest(self) -> None:
        """What dead processes left is in the book, then the gateways stop, and nothing is left anywhere."""
        await asyncio.wait_for(eventually(self._is_adopted), AT_REST_S)
        for gateway in self.gateways:
            if gateway.is_alive:
                assert await gateway.stop() == 0, gateway.log.read_text()[-4000:]
        left = journal_folders(journal_root(self.settings))
        assert not left, f"journals were left: {left}"

    async def reckon(self) -> Findings:
        """Bring everything to rest and judge. Raises AssertionError with all that is wrong."""
        await self.rest()
        work = [each for engine in self.engines for each in engine.work()]
        oracle = Oracle(self.prices, work, self.sightings, self.credited, self.kills, self.budgets)
        findings = await oracle.judge(self.pool)
        for found in await audit.run(self.pool, self.settings):
            findings.check(found.state == "ok", f"audit: {found.check.name}, {found.count}: {found.rows[:3]}")
        for gateway in self.gateways:
            log = gateway.log.read_text()
            findings.check(
                "Traceback" not in log, f"a traceback in {gateway.log}: {log[log.find('Traceback') :][:2000]}"
            )
        assert not findings.wrong, findings.told()
        return findings

    async def _is_adopted(self) -> bool:
        """Only the living have journals, and there are as many as workers."""
        living = sum(len(gateway.workers()) for gateway in self.gateways)
        if len(journal_folders(journal_root(self.settings))) != living:
            return False
        try:
            live = await self.pool.fetchval("select count(*) from incarnations where state = 'live'")
        except AWAY:
            return False
        return bool(live == living)
