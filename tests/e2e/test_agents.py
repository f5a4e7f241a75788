"""Three agents as three processes with stand-in engines, before a gateway of two workers: what befalls one of them, and what
users see of it."""

import asyncio
import json
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from billing.money import NANO
from config.defaults import Settings
from config.procs import Child
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from nodes.agent.launcher import CURRENT
from nodes.agent.package import build_zipapp
from nodes.protocol import AGENT_VERSION
from tests.fakes.agent import agent_process, engine_of
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.partition import Partition, partition
from tests.integration.test_agent_update import zipapp_of
from tests.waiting import eventually, is_gone

MODEL = "fake-model"
GRACE_S = 4.0


@dataclass
class Agent:
    """One agent: its process, its folder, and the network between it and the gateway."""

    folder: Path
    between: Partition
    process: Child
    engine: FakeEngine = field(default_factory=FakeEngine)  # how to steer the engine that the agent started

    @property
    def node_id(self) -> str:
        return (self.folder / "data" / "node_id").read_text().strip()

    @property
    def log(self) -> str:
        return (self.folder / "agent.log").read_text()

    @property
    def engine_pid(self) -> int:
        engine = engine_of(self.process)
        assert engine is not None
        return engine.pid

    def heat(self, temp_c: int) -> None:
        part = self.folder / "gpus.part"
        part.write_text(json.dumps([{"name": "Stand-in", "vram_mib": 24_000, "temp_c": temp_c}]))
        part.replace(self.folder / "gpus.json")

    async def served(self) -> int:
        return int((await self.engine.record())["served"])


class Pool:
    """The gateway, its database, and the agents."""

    def __init__(self, settings: Settings, pool: asyncpg.Pool, folder: Path) -> None:
        self.settings, self.pool, self.folder = settings, pool, folder
        self.agents: list[Agent] = []
        self._processes = ExitStack()
        self._open = AsyncExitStack()

    async def __aenter__(self) -> "Pool":
        self.gateway = await self._open.enter_async_context(GatewayProcess(self.settings, self.folder))
        self.http = await self._open.enter_async_context(aiohttp.ClientSession())
        accounts, keys = AccountStore(self.pool), KeyStore(self.pool, load_pepper(self.settings))
        user = await accounts.create("user", balance_nano=1000 * NANO)
        owner = await accounts.create("owner", is_provider=True)
        _, self.key = await keys.create(user.id, prefix="sk-pg-")
        _, self.provider_key = await keys.create(owner.id, prefix="dc1-provider-", scopes=("node",))
        return self

    async def __aexit__(self, *_: object) -> None:
        for agent in self.agents:
            agent.between.heal()
        await asyncio.to_thread(self._processes.close)
        await self._open.aclose()

    async def add(self, name: str, between: Partition | None = None) -> Agent:
        """Start an agent in the folder of that name, which may be there already; returns when it serves."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        between = between or await self._open.enter_async_context(partition(self.gateway.port))
        settings = replace(self.settings, telemetry_file=str(folder / "gpus.json"), temp_limit_c=85)
        agent = Agent(folder, between, None)  # type: ignore[arg-type]
        agent.heat(50)
        agent.process = self._processes.enter_context(
            agent_process(between.url, self.provider_key, folder, settings, model=MODEL, knobs={})
        )
        self.agents.append(agent)
        return agent

    async def node(self, agent: Agent) -> dict[str, Any]:
        """Its row, with its only engine's."""
        row = await self.pool.fetchrow(
            "select n.state, n.epoch, n.agent_version, e.url, e.state as engine, e.reason, e.restarts"
            " from nodes n left join engines e on e.node_id = n.id where n.id = $1::text::uuid",
            agent.node_id,
        )
        return dict(row) if row else {"state": "", "engine": ""}

    async def until(self, agent: Agent, state: str, engine: str = "ready") -> dict[str, Any]:
        async def is_so() -> bool:
            if not (agent.folder / "data" / "node_id").exists():
                return False
            node = await self.node(agent)
            return (node["state"], node["engine"]) == (state, engine)

        await eventually(is_so)
        node = await self.node(agent)
        agent.engine.port = int(node["url"].rpartition(":")[2])
        return node

    async def chats(self, count: int, *, at_once: int = 6) -> list[int]:
        """Statuses of so many small turns."""
        gate = asyncio.Semaphore(at_once)

        async def chat() -> int:
            body = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}
            headers = {"authorization": f"Bearer {self.key}"}
            async with (
                gate,
                self.http.post(
                    self.gateway.url + "/v1/chat/completions", json=body, headers=headers
                ) as answer,
            ):
                await answer.read()
                return answer.status

        return await asyncio.gather(*(chat() for _ in range(count)))


@pytest.fixture
async def three(settings: Settings, pool: asyncpg.Pool, tmp_path: Path) -> AsyncIterator[Pool]:
    """Three agents whose engines all serve turns, before two workers."""
    told = replace(
        settings, workers=2, heartbeat_interval_s=0.5, heartbeat_grace_s=GRACE_S, engine_drain_s=5.0
    )
    async with Pool(told, pool, tmp_path) as running:
        for name in ("a", "b", "c"):
            await running.add(name)
        for agent in running.agents:
            await running.until(agent, "online")
        await running.gateway.until_engines(3)
        yield running


async def test_kill_and_restart(three: Pool) -> None:
    """Turns go to the others; no engine of a dead agent runs on; started again, it is the same node under a higher epoch."""
    a, *_ = three.agents
    before, engine = await three.node(a), a.engine_pid
    a.process.kill()
    assert await three.chats(20) == [200] * 20
    await eventually(lambda: is_gone(engine))
    await three.until(a, "offline")
    again = await three.add("a", a.between)
    after = await three.until(again, "online")
    assert after["epoch"] > before["epoch"]
    await three.gateway.until_engines(3)
    await eventually(lambda: gets_turns(three, again))


async def test_partition(three: Pool) -> None:
    """The gateway takes the node as gone and sends it nothing; the agent takes nothing new once its lease is over; its
    engine stays up, and serves again after."""
    a, b, c = three.agents
    before, engine = await three.node(a), a.engine_pid
    a.between.cut()
    await three.until(a, "offline")
    await eventually(lambda: "lease ran out" in a.log)
    await three.gateway.until_just(2)
    served = await a.served()
    assert await three.chats(20) == [200] * 20
    assert await a.served() == served
    a.between.heal()
    after = await three.until(a, "online")
    assert after["epoch"] > before["epoch"]
    assert (a.engine_pid, after["restarts"]) == (engine, before["restarts"])
    await three.gateway.until_engines(3)
    await eventually(lambda: gets_turns(three, a))
    assert all([await b.served(), await c.served()])


async def test_a_slow_node_gets_fewer_turns_and_a_full_one_costs_nobody_his_turn(three: Pool) -> None:
    slow, b, c = three.agents
    await slow.engine.knobs(ttft_ms=1500)
    assert await three.chats(60, at_once=12) == [200] * 60
    counts = [await agent.served() for agent in (slow, b, c)]
    assert counts[0] < min(counts[1:]), counts
    for agent in three.agents:
        await agent.engine.knobs(ttft_ms=200)
    await slow.engine.knobs(max_num_queued_reqs=1)
    assert await three.chats(60, at_once=12) == [200] * 60
    assert (await slow.engine.record())["rejected"] > 0, "it was full, and was asked"


async def test_a_hot_node_sheds_its_load_and_says_why(three: Pool) -> None:
    a, *_ = three.agents
    engine = a.engine_pid
    a.heat(86)
    hot = await three.until(a, "online", engine="draining")
    assert "too hot, its limit is 85 °C: no new turns" in hot["reason"]
    await three.gateway.until_just(2)
    served = await a.served()
    assert await three.chats(12) == [200] * 12
    assert await a.served() == served
    a.heat(95)
    ended = await three.until(a, "online", engine="stopped")
    assert "engines end" in ended["reason"]
    await eventually(lambda: is_gone(engine))
    a.heat(60)
    await three.until(a, "online")
    await three.gateway.until_engines(3)


async def test_agents_outlive_a_gateway_that_is_killed_and_comes_back(three: Pool) -> None:
    engines = [agent.engine_pid for agent in three.agents]
    three.gateway.kill()
    await three.gateway.start()
    await three.gateway.until_engines(3)
    assert await three.chats(12) == [200] * 12
    assert [agent.engine_pid for agent in three.agents] == engines
    await eventually(lambda: all(agent.log.count("control connection is up") >= 2 for agent in three.agents))


async def test_two_agents_never_own_one_engine_slot(three: Pool) -> None:
    """A copy of a node's data folder takes the node; the agent that had it ends, its engine too, and never takes it back."""
    a, *_ = three.agents
    before, engine = await three.node(a), a.engine_pid
    (three.folder / "copy" / "data").mkdir(parents=True)
    for name in ("node_id", "machine"):
        shutil.copy(a.folder / "data" / name, three.folder / "copy" / "data" / name)
    copy = await three.add("copy")
    owners: list[str] = []

    async def is_taken() -> bool:
        node = await three.node(a)
        if node["url"] and node["url"] not in owners[-1:]:
            owners.append(node["url"])
        return a.process.poll() is not None and node["engine"] == "ready" and node["url"] != before["url"]

    await eventually(is_taken)
    assert a.process.poll() == 78
    assert is_gone(engine)
    assert owners.count(before["url"]) <= 1, f"the slot went back: {owners}"
    after = await three.until(copy, "online")
    assert after["epoch"] == before["epoch"] + 1
    assert await three.pool.fetchval("select count(*) from engines") == 3
    await three.gateway.until_engines(3)
    assert await three.chats(12) == [200] * 12


async def test_an_agent_whose_version_is_too_old_updates_itself_from_the_gateway(
    three: Pool, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / CURRENT).write_bytes(zipapp_of(tmp_path / "sources", "0.0.9"))
    (folder / "launcher.py").write_bytes((Path(__file__).parents[2] / "nodes/agent/launcher.py").read_bytes())
    async with FakeEngine("--model", MODEL) as engine:
        with (folder / "agent.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, folder / "launcher.py", "--gateway", three.gateway.url, "--data-dir", folder / "data",
                "--engine-url", engine.url, cwd=folder, env={"POOLGATE_AGENT_KEY": three.provider_key}, stdout=log,
                stderr=log,
            )  # fmt: skip
        try:
            old = Agent(folder, three.agents[0].between, None)  # type: ignore[arg-type]
            await eventually(lambda: f"{AGENT_VERSION} takes the place of 0.0.9" in old.log)
            node = await three.until(old, "online")
            await eventually(lambda: is_version(three, old, AGENT_VERSION))
            assert (folder / CURRENT).read_bytes() == build_zipapp().content
            assert node["url"] == engine.url
            await three.gateway.until_engines(4)
        finally:
            process.send_signal(signal.SIGTERM)
            await process.wait()


async def gets_turns(three: Pool, agent: Agent) -> bool:
    before = await agent.served()
    assert set(await three.chats(6)) == {200}
    return await agent.served() > before


async def is_version(three: Pool, agent: Agent, version: str) -> bool:
    return bool((await three.node(agent))["agent_version"] == version)
