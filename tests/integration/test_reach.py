"""Engines behind their agents: turns through its tunnel and its listener, and what becomes of them when either is cut."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from gateway.reach.pinned import pinning_context
from nodes.tunnel.frames import OPEN, encode
from nodes.tunnel.streams import Tunnel
from tests.fakes.cutting import counted, written
from tests.fakes.engine import FakeEngine
from tests.fakes.nodes import AgentNode, agent_node, provider_key
from tests.gateways import MODEL, TestGateway, running_gateway
from tests.waiting import eventually

CHAT = "/v1/chat/completions"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
STREAM = ASK | {"stream": True, "ignore_eos": True}
WAYS = ("tunnel", "listener")
MANY = 100_000

Behind = Callable[..., Awaitable[AgentNode]]


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    async with running_gateway(settings, pool) as running:
        yield running


@pytest.fixture
async def behind(gw: TestGateway, tmp_path: Path, unused_tcp_port_factory) -> AsyncIterator[Behind]:
    """Puts engines behind an agent and waits until turns go there by the `way`."""
    async with AsyncExitStack() as stack:

        async def put(way: str, *engines: FakeEngine, **options: Any) -> AgentNode:
            if way == "listener":
                options |= {"advertise": f"127.0.0.1:{unused_tcp_port_factory()}"}
            node = await stack.enter_async_context(
                agent_node(
                    gw.url,
                    gw.pool,
                    gw.gateway.settings,
                    tmp_path / way,
                    [one.url for one in engines],
                    **options,
                )
            )
            await eventually(lambda: goes_by(gw, node, way))
            return node

        yield put


def goes_by(gw: TestGateway, node: AgentNode, way: str) -> bool:
    """Every engine of the node is in the snapshot, and reached so."""
    kind = {"tunnel": "Tunnelled", "listener": "Listener"}[way]
    found = [gw.gateway.registry.engine(f"{node.node_id}/{name}") for name in node.engines]
    return all(engine is not None and type(engine.reach).__name__ == kind for engine in found)


def its_tunnel(gw: TestGateway, node: AgentNode) -> Tunnel:
    return gw.gateway.tunnels._tunnels[node.node_id]


# --- turns -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def asked(gw: TestGateway, body: dict[str, Any]) -> AsyncIterator[asyncio.StreamReader]:
    """One request on a connection of its own, whose answer is read by the test as it likes."""
    host, port = gw.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
    data = json.dumps(body).encode()
    writer.write(
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gw.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode()
        + data
    )
    try:
        yield reader
    finally:
        writer.transport.abort()


async def events(gw: TestGateway, body: dict[str, Any] = STREAM) -> list[Any]:
    """The whole stream: decoded events, and "[DONE]"."""
    async with await gw.post(CHAT, body) as reply:
        text = (await reply.read()).decode()
        assert reply.status == 200, text
    found = [event.removeprefix("data: ") for event in text.split("\n\n") if event.startswith("data: ")]
    return [json.loads(event) if event.startswith("{") else event for event in found]


async def status(gw: TestGateway, body: dict[str, Any] = ASK) -> int:
    async with await gw.post(CHAT, body) as reply:
        await reply.read()
        return reply.status


async def serves(gw: TestGateway) -> bool:
    return await status(gw) == 200


@pytest.mark.parametrize("way", WAYS)
async def test_the_official_sdk_streams_through_an_agent(gw, behind, engine, way):
    await behind(way, engine)
    ask: dict[str, Any] = {
        "model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    async with openai.AsyncOpenAI(base_url=f"{gw.url}/v1", api_key=gw.key) as sdk:
        stream = await sdk.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask)
        chunks = [chunk async for chunk in stream]
        whole = await sdk.chat.completions.create(**ask)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20
    records = await gw.settled(2)
    assert [(record.outcome, record.completion_tokens) for record in records] == [("finished", 20)] * 2
    assert all(record.amount_nano > 0 for record in records)


@pytest.mark.parametrize("way", WAYS)
async def test_what_an_engine_gets_through_its_agent_is_what_was_asked_and_no_secret(
    gw, behind, engines, way
):
    engine = await engines("--max-model-len", "2000000", record_bodies=True)
    node = await behind(way, engine, context_length=2_000_000)
    long = "long " * 180_000  # several windows
    assert await status(gw, ASK | {"messages": [{"role": "user", "content": long}]}) == 200
    (row,) = await engine.requests()
    assert long in str(row["body"])
    assert node.replies[-1].reach.token not in str(row)
    assert "x-poolgate" not in str(row["headers"]).lower()


@pytest.mark.parametrize("way", WAYS)
async def test_a_connection_serves_turn_after_turn(gw, behind, engine, way):
    node = await behind(way, engine)
    for _ in range(10):
        assert await status(gw) == 200
        assert await events(gw)
    # A stream's connection may still lack its last chunk when the next turn comes, which then takes another one.
    assert len(node.reach._door.fronts) <= 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["before the first event", "amid the stream"])
async def test_a_client_that_leaves_ends_the_engines_work_behind_an_agent(gw, behind, engines, way, when):
    engine = await engines(pace_ms=20, ttft_ms=0 if when == "amid the stream" else 60_000)
    await behind(way, engine)
    async with asked(gw, STREAM | {"max_tokens": 1500}) as reader:
        if when == "amid the stream":
            await reader.readuntil(b"data: ")
        else:
            await engine.until(lambda record: bool(record["requests"]))
    await engine.until(lambda record: record["requests"][0]["aborted"])
    assert (await gw.settled(1))[0].outcome == "client_gone"


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_reads_nothing_costs_its_window_and_stops_nobody_else(gw, behind, engines, way):
    engine = await engines("--max-model-len", "200000")
    node = await behind(way, engine)
    async with asked(gw, STREAM | {"max_tokens": MANY}) as slow:
        await slow.readuntil(b"data: ")
        for _ in range(5):
            assert (await events(gw, STREAM | {"max_tokens": 200}))[-1] == "[DONE]"
        if way == "tunnel":
            held = its_tunnel(gw, node)._streams.values()
            window = gw.gateway.settings.tunnel_window_bytes
            await eventually(lambda: any(stream._is_paused and stream._arrived for stream in held))
            assert all(sum(map(len, stream._arrived)) <= window for stream in held)
        end = b""
        while not end.endswith(b"0\r\n\r\n"):
            end = (end + await slow.read(2**16))[-16:]
    assert {record.outcome for record in await gw.settled(6)} == {"finished"}
    assert max(record.completion_tokens for record in gw.records) == MANY


# --- cuts ------------------------------------------------------------------------------------------------------------


def cut(gw: TestGateway, node: AgentNode, way: str) -> None:
    if way == "tunnel":
        its_tunnel(gw, node).lost("cut by the test")
    else:
        node.reach._door.close()


@pytest.mark.parametrize("way", WAYS)
async def test_a_stream_cut_on_its_way_ends_with_an_error_and_costs_what_came(gw, behind, engines, way):
    engine = await engines(lockstep=4, record_events=True)
    node = await behind(way, engine)
    async with asked(gw, STREAM | {"max_tokens": 50}) as reader:
        got = b""
        while got.count(b"data: {") < 4:
            got += await reader.read(4096)
        cut(gw, node, way)
        while not got.endswith(b"\r\n0\r\n\r\n"):
            got += await reader.read(4096)
    last = got.decode().rpartition("data: ")[2]
    assert json.loads(last.partition("\n")[0])["error"]["type"] == "server_error"
    assert b"[DONE]" not in got
    assert b"127.0.0.1" not in got
    sent = (await engine.until(lambda record: record["requests"][0]["aborted"]))["requests"][0]
    (record,) = await gw.settled(1)
    assert record.outcome == "engine_failed"
    assert record.completion_tokens == counted(written(sent["events"]), 1).completion > 0
    assert record.amount_nano > 0
    await engine.knobs(lockstep=None)
    await eventually(lambda: serves(gw))


@pytest.mark.parametrize("way", WAYS)
async def test_a_turn_that_nothing_was_sent_of_goes_to_another_node_when_its_way_is_cut(
    gw, behind, engines, way
):
    dead, other = await engines(ttft_ms=60_000), await engines()
    node = await behind(way, dead)
    asking = asyncio.create_task(events(gw))
    await dead.until(lambda record: bool(record["requests"]))
    await gw.register(other.url)
    cut(gw, node, way)
    assert (await asking)[-1] == "[DONE]"
    assert len(await other.requests()) == 1


async def test_an_agent_that_left_takes_its_engines_along(gw, engine, tmp_path):
    settings = gw.gateway.settings
    async with agent_node(gw.url, gw.pool, settings, tmp_path, [engine.url]) as node:
        await eventually(lambda: goes_by(gw, node, "tunnel"))
    await eventually(lambda: gw.gateway.registry.engine(node.engine_key) is None)
    assert await gw.pool.fetchval("select count(*) from tunnels") == 0
    assert await status(gw) == 503


async def test_a_tunnel_is_left_when_its_key_is_revoked_and_its_turns_end_whole(gw, behind, engines):
    engine = await engines(pace_ms=10)
    node = await behind("tunnel", engine)
    asking = asyncio.create_task(events(gw, STREAM | {"max_tokens": 60}))
    await engine.until(lambda record: bool(record["requests"]))
    tunnel = its_tunnel(gw, node)
    key_id = await gw.pool.fetchval("select id from api_keys where account_id = $1", node.account_id)
    await KeyStore(gw.pool, load_pepper(gw.gateway.settings)).revoke(key_id)
    await eventually(lambda: tunnel.is_draining)
    assert (await asking)[-1] == "[DONE]"
    await eventually(lambda: not gw.gateway.tunnels)
    assert tunnel.is_lost


async def test_a_probe_goes_the_way_of_turns(gw, behind, engine):
    node = await behind("tunnel", engine)
    await engine.knobs(health_status=500)
    found = gw.gateway.registry.engine(node.engine_key)
    assert found is not None
    assert not await gw.gateway._probe(found)
    await engine.knobs(health_status=200)
    assert await gw.gateway._probe(found)
    node.engines["e0"] = "http://127.0.0.1:1"
    assert not await gw.gateway._probe(found)


async def test_an_engine_that_is_down_behind_a_good_agent_is_another_nodes_turn(gw, behind, engines):
    down, other = await engines(), await engines()
    await behind("tunnel", down)
    await down.kill()
    await gw.register(other.url)
    assert [await status(gw) for _ in range(6)] == [200] * 6
    assert len(await other.requests()) == 6


async def test_a_worker_that_ends_lets_the_streams_of_its_tunnels_end(gw, behind, engines):
    engine = await engines(pace_ms=10)
    node = await behind("tunnel", engine)
    asking = asyncio.create_task(events(gw, STREAM | {"max_tokens": 60}))
    await engine.until(lambda record: bool(record["requests"]))
    stopping = asyncio.create_task(gw.gateway.stop())
    assert (await asking)[-1] == "[DONE]"
    await stopping
    assert (await gw.settled(1))[0].outcome == "finished"
    assert not gw.gateway.tunnels
    assert node.node_id not in gw.gateway.tunnels._tunnels


# --- listeners -------------------------------------------------------------------------------------------------------


async def exchange(node: AgentNode, head: str, body: bytes = b"") -> tuple[int, bytes]:
    """What a stranger gets who speaks to the listener."""
    listener = node.reach._listener
    assert listener is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port, ssl=pinning_context())
    writer.write(head.encode() + body)
    try:
        answer = await reader.read()
    finally:
        writer.transport.abort()
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    ("method", "path", "change", "wanted"),
    [
        ("GET", "/health", {}, 200),
        ("GET", "/health", {"token": ""}, 401),
        ("GET", "/health", {"token": "0" * 64}, 401),
        ("GET", "/health", {"engine": "e7"}, 502),
        ("GET", "/metrics", {}, 403),
        ("POST", "/sleep", {}, 403),
        ("POST", "/v1/load_lora_adapter", {}, 403),
        ("GET", "/health?x=1", {}, 403),
        ("GET", "/v1/../health", {}, 403),
        ("GET", "http://127.0.0.1/health", {}, 403),
    ],
)
async def test_a_listener_lets_pass_what_turns_need_to_whom_has_the_token(
    gw, behind, engine, method, path, change, wanted
):
    node = await behind("listener", engine)
    await engine.reset()
    given = {"token": node.replies[-1].reach.token, "engine": "e0"} | change
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: x\r\nx-poolgate-token: {given['token']}\r\n"
        f"x-poolgate-engine: {given['engine']}\r\nconnection: close\r\n\r\n"
    )
    got, _ = await exchange(node, head)
    assert got == wanted
    assert await engine.requests() == []


async def test_a_listener_is_used_instead_of_the_tunnel_and_the_tunnel_when_it_fails(
    settings, pool, engine, tmp_path, unused_tcp_port
):
    quick = replace(settings, listener_check_s=1.0)
    async with (
        running_gateway(quick, pool) as gw,
        agent_node(
            gw.url, pool, quick, tmp_path, [engine.url], advertise=f"127.0.0.1:{unused_tcp_port}"
        ) as node,
    ):
        await eventually(lambda: goes_by(gw, node, "listener") and node.way == "listener")
        await eventually(lambda: not gw.gateway.tunnels)
        listener = node.reach._listener
        assert listener is not None
        listener.close()
        await eventually(lambda: goes_by(gw, node, "tunnel"))
        assert await status(gw) == 200
        assert "can't be reached" in node.problem


async def test_another_certificate_at_the_listeners_address_gets_no_turn(gw, behind, engine, engines):
    other = await engines()
    node = await behind("listener", engine)
    await gw.pool.execute("update nodes set listener_fingerprint = $1 where reach = 'agent'", "0" * 64)
    found = gw.gateway.registry.engine(node.engine_key)
    assert found is not None
    await eventually(lambda: found.reach.fingerprint == "0" * 64)
    assert await status(gw) == 503
    assert await engine.requests() == []
    await gw.register(other.url)
    assert await status(gw) == 200


@pytest.mark.parametrize(
    ("advertise", "words"),
    [
        ("169.254.169.254:80", "never a node's"),
        ("[fd00:ec2::254]:80", "never a node's"),
        ("10.1.2.3:8443", "not public"),
        ("0.0.0.0:8443", "never a node's"),
        ("no-such-name.invalid:8443", "can't be resolved"),
        ("gateway", "the gateway's own"),
        ("closed", "can't be reached"),
    ],
)
async def test_an_address_that_is_not_the_agents_is_never_used_and_it_is_told_why(
    gw, engine, tmp_path, unused_tcp_port, advertise, words
):
    advertise = {"gateway": gw.url.removeprefix("http://"), "closed": "127.0.0.1:1"}.get(advertise, advertise)
    async with agent_node(
        gw.url,
        gw.pool,
        gw.gateway.settings,
        tmp_path,
        [engine.url],
        advertise=advertise,
        listen=f":{unused_tcp_port}",
    ) as node:
        await eventually(lambda: words in node.problem)
        assert node.way == "tunnel"
        assert await gw.pool.fetchval("select listener_host from nodes") is None


async def test_another_providers_listener_can_not_be_named_as_ones_own(gw, behind, engine, tmp_path):
    victim = await behind("listener", engine)
    listener = victim.reach._listener
    assert listener is not None
    thief = await provider_key(gw.pool, gw.gateway.settings)
    body = {
        "api_key": thief[1], "node_id": "7b2cbb3e-34a6-4b5f-9c3b-1f6d6a0f7d11",
        "reach": {"mode": "agent", "advertise": f"127.0.0.1:{listener.port}", "fingerprint": listener.fingerprint},
        "engines": [{"engine_id": "e0", "url": "http://127.0.0.1:1", "state": "ready", "models": [{"id": MODEL}]}],
    }  # fmt: skip

    async def is_told() -> bool:
        async with gw.http.post(f"{gw.url}/api/providers/heartbeat", json=body) as reply:
            told = await reply.json()
        return "does not have this node's token" in told["reach"]["problem"]

    await eventually(is_told)
    assert gw.gateway.registry.engine("7b2cbb3e-34a6-4b5f-9c3b-1f6d6a0f7d11/e0") is None


# --- who may open a tunnel --------------------------------------------------------------------------------------------


async def test_a_tunnel_needs_the_key_of_the_nodes_own_provider(gw, behind, engine):
    node = await behind("tunnel", engine)
    _, stranger = await provider_key(gw.pool, gw.gateway.settings)
    websocket = {
        "upgrade": "websocket",
        "connection": "upgrade",
        "sec-websocket-version": "13",
        "sec-websocket-key": "x" * 22 + "==",
    }

    async def asks(key: str, node_id: str, **headers: str) -> int:
        named = {"authorization": f"Bearer {key}", "x-poolgate-node": node_id} | headers
        async with gw.http.get(f"{gw.url}/api/providers/tunnel", headers=named) as reply:
            assert isinstance((await reply.json())["error"], str)
            return reply.status

    assert await asks(stranger, node.node_id, **websocket) == 403
    assert await asks("dc1-provider-wrong", node.node_id, **websocket) == 401
    assert await asks(gw.key, node.node_id, **websocket) == 403
    assert await asks(node.key, "not-a-uuid", **websocket) == 400
    assert await asks(node.key, node.node_id) == 400
    assert await status(gw) == 200


async def test_an_agent_that_breaks_the_rules_loses_its_tunnel_and_no_more(gw, behind, engine):
    node = await behind("tunnel", engine)
    headers = {"authorization": f"Bearer {node.key}", "x-poolgate-node": node.node_id}
    async with gw.http.ws_connect(f"{gw.url}/api/providers/tunnel", headers=headers) as socket:
        await socket.send_bytes(encode(OPEN, 1, b"e0"))  # only the gateway opens streams
        assert (await socket.receive()).type.name in ("CLOSE", "CLOSED")
    await eventually(lambda: node.node_id in gw.gateway.tunnels._tunnels or goes_by(gw, node, "tunnel"))


async def test_a_tunnel_takes_no_more_streams_than_it_may(settings, pool, engines, tmp_path):
    engine = await engines(ttft_ms=60_000)
    small = replace(settings, tunnel_streams_max=2)
    async with (
        running_gateway(small, pool) as gw,
        agent_node(gw.url, pool, small, tmp_path, [engine.url]) as node,
    ):
        await eventually(lambda: goes_by(gw, node, "tunnel"))
        async with asked(gw, STREAM), asked(gw, STREAM):
            await engine.until(lambda record: record["running"] == 2)
            assert await status(gw) == 503
