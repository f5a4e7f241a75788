"""The agent's end of the control websocket, before a gateway that says what a test wants it to say."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from config.defaults import Settings
from nodes.agent.control import Control
from nodes.agent.lease import Lease
from nodes.control_messages import CONTROL_PATH, FENCED, INSTANCE_HEADER, NODE_HEADER, Command, Progress
from nodes.protocol import EngineLoad
from tests.waiting import eventually


class Gateway:
    """Keeps what the agent sends, and every connection."""

    def __init__(self) -> None:
        self.sockets: list[web.WebSocketResponse] = []
        self.headers: dict[str, str] = {}
        self.heard: list[dict[str, Any]] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        self.headers = dict(request.headers)
        await socket.prepare(request)
        self.sockets.append(socket)
        async for message in socket:
            self.heard.append(message.json())
        return socket

    async def says(self, message: dict[str, Any]) -> None:
        await self.sockets[-1].send_json(message)


class Agent:
    """What its control connection brings it."""

    def __init__(self) -> None:
        self.taken: list[Command] = []
        self.wanted: list[str] = []
        self.sent: list[Progress] = []
        self.is_fenced = False
        self.load = EngineLoad(running=2)
        self.now_s = 0.0
        self.lease = Lease(10, lambda: self.now_s)
        self.control: Control

    def fenced(self) -> None:
        self.is_fenced = True


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    app = web.Application()
    app.router.add_get(CONTROL_PATH, gateway.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    gateway.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield gateway
    await runner.cleanup()


@asynccontextmanager
async def connected(gateway: Gateway) -> AsyncIterator[Agent]:
    agent, is_ready = Agent(), asyncio.Event()
    is_ready.set()
    async with aiohttp.ClientSession() as session:
        agent.control = Control(
            session, gateway=gateway.url, key="k", node_id="n", instance="i", settings=Settings(engine_poll_s=0.05),
            lease=agent.lease, loads=lambda: {"toy": agent.load}, take=agent.taken.append, want=agent.wanted.append,
            sent=agent.sent.extend, fenced=agent.fenced, is_ready=is_ready,
        )  # fmt: skip
        running = asyncio.create_task(agent.control.run())
        try:
            await eventually(lambda: gateway.heard)
            yield agent
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_load_goes_up_again_and_again(gateway):
    async with connected(gateway) as agent:
        assert (gateway.headers[NODE_HEADER], gateway.headers[INSTANCE_HEADER]) == ("n", "i")
        assert gateway.headers["x-provider-key"] == "k"
        agent.load = EngineLoad(running=7)
        await eventually(lambda: gateway.heard[-1]["engines"]["toy"]["running"] == 7)
        seen = len(gateway.heard)
        await eventually(lambda: len(gateway.heard) > seen + 2)


async def test_commands_and_what_is_wanted_come_down_and_nonsense_harms_nothing(gateway):
    async with connected(gateway) as agent:
        stop = Command(3, "stop_engine", {"engine_id": "toy"})
        await gateway.says({"type": "from the future", "x": 1})
        await gateway.says({"type": "command", "id": 1, "name": "format_disk"})
        await gateway.sockets[-1].send_str("{")
        await gateway.says({"type": "wanted", "wanted": "drain"})
        await gateway.says(stop.to_json())
        await eventually(lambda: agent.taken)
        assert (agent.taken, agent.wanted) == ([stop], ["drain"])


async def test_progress_goes_up_and_is_known_to_have_gone(gateway):
    async with connected(gateway) as agent:
        agent.control.tell(Progress(3, "loading"))
        agent.control.tell(Progress(3, "done", 100))
        await eventually(lambda: agent.sent == [Progress(3, "done", 100)])
        told = [message for message in gateway.heard if message["type"] == "progress"]
        assert [message["status"] for message in told] == ["done"], "the last word of a command is enough"


async def test_a_gateway_that_hears_the_agent_renews_its_lease(gateway):
    async with connected(gateway) as agent:
        loop = asyncio.get_running_loop()
        agent.now_s = loop.time()
        agent.lease.renew(agent.now_s - 9.5)
        agent.now_s += 1
        assert not agent.lease.is_held
        await gateway.says({"type": "lease"})
        await eventually(lambda: agent.lease.is_held)
        agent.now_s = loop.time() + 10
        assert not agent.lease.is_held, "for as long as it is, and no longer"


async def test_a_connection_that_breaks_is_made_again(gateway):
    async with connected(gateway) as agent:
        await gateway.sockets[-1].close()
        await eventually(lambda: len(gateway.sockets) == 2)
        await eventually(lambda: agent.control.is_up)
        assert not agent.is_fenced


async def test_an_agent_whose_node_another_one_has_hears_it(gateway):
    async with connected(gateway) as agent:
        await gateway.sockets[-1].close(code=FENCED)
        await eventually(lambda: agent.is_fenced)
