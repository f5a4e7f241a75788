"""A node behind its agent, as processes: a gateway of two workers, the agent, its engine; and what becomes when one dies."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import asyncpg
import openai
import psutil
import pytest

from bench.load import Client
from billing.money import NANO
from config.defaults import Settings
from config.procs import Child
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from tests.fakes.agent import agent_process, engine_of
from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.nodes import provider_key
from tests.waiting import eventually

MODEL = "smollm2-135m"
CHAT = "/v1/chat/completions"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
STREAM = ASK | {"stream": True, "ignore_eos": True}
PACE_MS = 10

pytestmark = pytest.mark.timeout(240)


@dataclass
class System:
    """All of it; `agent` is replaced when it is started again."""

    settings: Settings
    gateway: GatewayProcess
    pool: asyncpg.Pool
    key: str
    node_key: str
    folder: Path
    agent: Child

    def request(self, body: dict[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    async def on_each_worker(self) -> dict[int, Client]:
        """A connection to each, by process."""
        found: dict[int, Client] = {}
        while len(found) < 2:
            client = Client("127.0.0.1", self.gateway.port)
            await client.ask(b"GET /api/health HTTP/1.1\r\nhost: x\r\n\r\n")
            for worker in self.gateway.workers():
                if client.local_port in self.gateway.client_ports(worker):
                    found.setdefault(worker.pid, client)
        return found

    async def until_served(self) -> None:
        """Both workers send turns there."""

        async def is_served() -> bool:
            clients = await self.on_each_worker()
            answers = [await client.ask(self.request(ASK)) for client in clients.values()]
            for client in clients.values():
                client.close()
            return [answer.status for answer in answers] == [200, 200]

        await eventually(is_served)

    async def tunnel_worker(self) -> int:
        """The worker that has the agent's tunnel, by the address at which it takes hops."""
        address = await self.pool.fetchval("select worker from tunnels")
        port = int(address.rpartition(":")[2])
        (found,) = [
            worker.pid
            for worker in self.gateway.workers()
            if any(end.laddr.port == port and not end.raddr for end in worker.net_connections("tcp"))
        ]
        return found


@contextmanager
def agent_of(system_settings: Settings, gateway: str, key: str, folder: Path, **options: Any) -> Any:
    with agent_process(
        gateway,
        key,
        folder / "agent",
        system_settings,
        model=MODEL,
        knobs={"pace_ms": PACE_MS},
        reach="agent",
        **options,
    ) as process:
        yield process


@pytest.fixture
async def system(settings: Settings, pool: asyncpg.Pool, tmp_path: Path) -> AsyncIterator[System]:
    # No network is listed: nothing may be called straight.
    settings = replace(settings, workers=2, node_networks="", heartbeat_interval_s=1.0, heartbeat_grace_s=5.0)
    account = await AccountStore(pool).create("renter", balance_nano=1000 * NANO)
    _, key = await KeyStore(pool, load_pepper(settings)).create(account.id, prefix="sk-pg-")
    _, node_key = await provider_key(pool, settings)
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(GatewayProcess(settings, tmp_path))
        agent = stack.enter_context(agent_of(settings, gateway.url, node_key, tmp_path))
        made = System(settings, gateway, pool, key, node_key, tmp_path, agent)
        await made.until_served()
        yield made


async def outcomes(system: System, count: int) -> list[asyncpg.Record]:
    """The last so many usage records of streams."""

    async def are_there() -> bool:
        return bool(await system.pool.fetchval("select count(*) >= $1 from usage where stream", count))

    await eventually(are_there)
    return list(await system.pool.fetch("select * from usage where stream order by started_at"))


async def test_the_sdk_streams_over_both_workers_and_one_hop(system: System) -> None:
    for _ in range(12):  # each on a connection of its own, which reaches one of the two
        async with openai.AsyncOpenAI(base_url=f"{system.gateway.url}/v1", api_key=system.key) as sdk:
            stream = await sdk.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=10, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason == "length"
    assert {row["outcome"] for row in await outcomes(system, 12)} == {"finished"}


async def test_a_worker_that_is_killed_costs_its_streams_and_the_node_is_back_at_once(system: System) -> None:
    holder = await system.tunnel_worker()
    clients = await system.on_each_worker()
    (other,) = clients.keys() - {holder}
    hopping = asyncio.create_task(clients[other].ask(system.request(STREAM | {"max_tokens": 1500})))
    engine = engine_of(system.agent)
    assert engine is not None
    await eventually(lambda: len(clients[other]._parts) > 20)
    psutil.Process(holder).kill()
    answer = await hopping
    assert answer.verdict == "error_event"
    assert b"server_error" in answer.body
    assert engine.is_running()
    await system.until_served()
    (row, *_) = await outcomes(system, 1)
    assert (row["outcome"], 0 < row["completion_tokens"] < 1500, row["amount_nano"] > 0) == (
        "engine_failed",
        True,
        True,
    )


async def test_a_reload_breaks_no_stream_of_a_tunnel(system: System) -> None:
    clients = await system.on_each_worker()
    streaming = [
        asyncio.create_task(client.ask(system.request(STREAM | {"max_tokens": 400})))
        for client in clients.values()
    ]
    await eventually(lambda: all(len(client._parts) > 20 for client in clients.values()))
    before = {worker.pid for worker in system.gateway.workers()}
    system.gateway.reload()
    await system.gateway.until_logged("reloaded, with 2 worker(s)")
    assert [answer.verdict for answer in await asyncio.gather(*streaming)] == ["whole", "whole"]
    await eventually(lambda: not before & {worker.pid for worker in system.gateway.workers()})
    await system.until_served()
    assert {row["outcome"] for row in await outcomes(system, 2)} == {"finished"}


async def test_a_killed_agent_ends_its_streams_with_an_error_and_comes_back(system: System) -> None:
    clients = await system.on_each_worker()
    streaming = [
        asyncio.create_task(client.ask(system.request(STREAM | {"max_tokens": 1500})))
        for client in clients.values()
    ]
    await eventually(lambda: all(len(client._parts) > 20 for client in clients.values()))
    system.agent.kill()
    assert [answer.verdict for answer in await asyncio.gather(*streaming)] == ["error_event", "error_event"]
    rows = await outcomes(system, 2)
    assert all(row["outcome"] == "engine_failed" and row["amount_nano"] > 0 for row in rows)
    with agent_of(system.settings, system.gateway.url, system.node_key, system.folder):
        await system.until_served()


async def test_a_gateway_that_was_killed_and_started_again_has_its_nodes_back(system: System) -> None:
    system.gateway.kill()
    await system.gateway.start()
    await system.until_served()
    assert engine_of(system.agent) is not None


async def test_an_agent_that_can_be_reached_is_and_needs_no_tunnel(
    system: System, unused_tcp_port: int, tmp_path: Path
) -> None:
    system.agent.send_signal(signal.SIGTERM)
    await asyncio.to_thread(system.agent.wait, 30)
    await system.gateway.stop()
    settings = replace(system.settings, node_networks="127.0.0.0/8")
    async with GatewayProcess(settings, tmp_path, port=system.gateway.port) as gateway:
        system.gateway = gateway
        with agent_of(
            settings, gateway.url, system.node_key, tmp_path, advertise=f"127.0.0.1:{unused_tcp_port}"
        ):

            async def is_by_listener() -> bool:
                return bool(
                    await system.pool.fetchval(
                        "select listener_port = $1 and not exists (select from tunnels) from nodes",
                        unused_tcp_port,
                    )
                )

            await eventually(is_by_listener)
            await system.until_served()
