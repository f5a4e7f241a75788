"""A whole gateway worker inside a test, over the test's stores, and engines registered with it as an agent would."""

import socket
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import asyncpg

from billing.money import NANO
from billing.usage import UsageRecord
from config.defaults import Settings
from gateway.app import Gateway
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import ApiKey, KeyStore
from gateway.identity.secrets import load_pepper
from nodes.heartbeats import NodeStore
from nodes.protocol import EngineReport, Heartbeat, ModelInfo
from tests.waiting import eventually

MODEL = "smollm2-135m"


@dataclass
class TestGateway:
    """A running gateway, a key that may use it, and what settled."""

    __test__ = False

    gateway: Gateway
    url: str
    pool: asyncpg.Pool
    http: aiohttp.ClientSession
    account_id: int
    key: str
    key_row: ApiKey
    records: list[UsageRecord] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    async def register(
        self,
        *urls: str,
        model: str = MODEL,
        kind: str = "generate",
        context_length: int = 131_072,
        account_id: int | None = None,
    ) -> list[str]:
        """Make each URL an engine on a node of its own; returns when turns can go there. The engines' keys."""
        store = NodeStore(self.pool)
        keys = []
        for url in urls:
            node_id = str(uuid.uuid4())
            info = ModelInfo(id=model, context_length=context_length, kind=kind)
            engine = EngineReport(engine_id="e0", url=url, state="ready", models=(info,))
            beat = Heartbeat(api_key="-", node_id=node_id, engines=(engine,))
            await store.record(account_id or self.account_id, beat, beat.engines)
            keys.append(f"{node_id}/e0")
        await eventually(lambda: all(self.gateway.registry.engine(key) is not None for key in keys))
        return keys

    async def post(self, path: str, body: Any, **options: Any) -> aiohttp.ClientResponse:
        return await self.http.post(self.url + path, json=body, headers=self.headers, **options)

    async def settled(self, turns: int) -> list[UsageRecord]:
        """The records once there are `turns` of them."""
        await eventually(lambda: len(self.records) >= turns)
        return self.records


def listening() -> socket.socket:
    """A socket on a free port of the loopback address."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(1024)
    sock.setblocking(False)
    return sock


@asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    """As many connections as are asked for. Answers that a test did not read to their end are closed with it: a collector
    of garbage that finds one warns, in some other test.
    """
    answers: list[aiohttp.ClientResponse] = []

    async def note(_session: object, _context: object, told: aiohttp.TraceRequestEndParams) -> None:
        answers.append(told.response)

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(note)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, trace_configs=[trace]) as http:
        try:
            yield http
        finally:
            for answer in answers:
                answer.close()


@asynccontextmanager
async def running_gateway(
    settings: Settings,
    pool: asyncpg.Pool,
    *,
    scopes: Sequence[str] = ("inference",),
    models: Sequence[str] | None = None,
) -> AsyncIterator[TestGateway]:
    """A gateway on a free port, with an account of 100.00 and a key."""
    account = await AccountStore(pool).create("tester", balance_nano=100 * NANO, is_provider=True)
    store = KeyStore(pool, load_pepper(settings))
    row, key = await store.create(account.id, prefix="sk-pg-", scopes=scopes, models=models)
    gateway = Gateway(settings)
    sock = listening()
    await gateway.start(sock)
    records: list[UsageRecord] = []
    add = gateway.lifecycle._record

    def noted(record: UsageRecord) -> None:
        records.append(record)
        add(record)

    gateway.lifecycle._record = noted
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        async with _session() as http:
            yield TestGateway(gateway, url, pool, http, account.id, key, row, records)
    finally:
        if not gateway.health.is_draining:
            await gateway.stop()
        sock.close()
