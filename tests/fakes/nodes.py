"""An agent inside a test, with everything but engines of its own: it reports those it is given and opens ways to them."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import asyncpg

from bench.bodies import MODEL
from config.defaults import Settings
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from nodes.agent.lease import Lease
from nodes.agent.reach import AgentReach
from nodes.agent.reporter import Reporter
from nodes.protocol import EngineReport, Heartbeat, HeartbeatReply, ModelInfo


class AgentNode:
    """A node of its own behind a running agent. `replies` are what its heartbeats got."""

    def __init__(
        self,
        node_id: str,
        engines: dict[str, str],
        reach: AgentReach,
        account_id: int,
        key: str,
        context_length: int,
    ) -> None:
        self.context_length = context_length
        self.node_id = node_id
        self.engines = engines
        self.reach = reach
        self.account_id = account_id
        self.key = key
        self.replies: list[HeartbeatReply] = []

    @property
    def engine_key(self) -> str:
        return f"{self.node_id}/e0"

    @property
    def way(self) -> str:
        """How the gateway goes to it, as it said last."""
        return self.replies[-1].reach.way if self.replies else ""

    @property
    def problem(self) -> str:
        return self.replies[-1].reach.problem if self.replies else ""

    async def describe(self, epoch: int) -> Heartbeat:
        models = (ModelInfo(id=MODEL, context_length=self.context_length),)
        reports = tuple(
            EngineReport(engine_id=name, url=url, state="ready", models=models)
            for name, url in self.engines.items()
        )
        return Heartbeat(
            api_key=self.key, node_id=self.node_id, epoch=epoch, engines=reports, reach=self.reach.asked()
        )


async def provider_key(pool: asyncpg.Pool, settings: Settings) -> tuple[int, str]:
    """A provider of its own, approved."""
    account = await AccountStore(pool).create(f"provider-{uuid.uuid4()}", is_provider=True)
    _, key = await KeyStore(pool, load_pepper(settings)).create(
        account.id, prefix="dc1-provider-", scopes=("node",)
    )
    return account.id, key


@asynccontextmanager
async def agent_node(
    gateway: str,
    pool: asyncpg.Pool,
    settings: Settings,
    folder: Path,
    engines: Sequence[str],
    *,
    advertise: str = "",
    listen: str = "",
    context_length: int = 131_072,
) -> AsyncIterator[AgentNode]:
    """An agent that reports to `gateway` the engines at these URLs, as e0, e1, ..., until the block ends."""
    account_id, key = await provider_key(pool, settings)
    node_id = str(uuid.uuid4())
    urls = {f"e{number}": url for number, url in enumerate(engines)}
    options: Any = SimpleNamespace(
        gateway=gateway,
        key=key,
        data_dir=folder,
        reach="agent",
        advertise=advertise,
        listen=listen,
        settings=settings,
    )
    async with aiohttp.ClientSession() as session:
        reach = AgentReach(options, node_id, session, engine_at=urls.get)
        node = AgentNode(node_id, urls, reach, account_id, key, context_length)

        def accepted(_: Heartbeat, reply: HeartbeatReply) -> None:
            node.replies.append(reply)
            reach.heard(reply.reach, reporter.changed)

        reporter = Reporter(
            session, gateway=gateway, describe=node.describe, settings=settings, accepted=accepted,
            lease=Lease(settings.heartbeat_grace_s, asyncio.get_running_loop().time), fenced=lambda: None,
        )  # fmt: skip
        async with reach:
            reporting = asyncio.create_task(reporter.run())
            try:
                yield node
            finally:
                reporting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reporting
