"""Two workers, and a tunnel that ends in one of them: turns of the other one go there by one hop."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import openai
import pytest

from gateway.app import Gateway
from gateway.reach.hop import HopServer, hop
from nodes.tunnel.streams import TunnelLost
from tests.fakes.cutting import counted, written
from tests.fakes.nodes import AgentNode, agent_node
from tests.gateways import MODEL, TestGateway, listening, running_gateway
from tests.waiting import eventually

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
STREAM = ASK | {"stream": True, "ignore_eos": True}


@dataclass
class Pair:
    """`near` has the agent's tunnel; `far` is asked, over `url`."""

    near: TestGateway
    far: Gateway
    url: str
    node: AgentNode
    settled: list[object]

    async def read(self, body: dict[str, object]) -> tuple[int, bytes]:
        async with self.near.http.post(
            f"{self.url}/v1/chat/completions", json=body, headers=self.near.headers
        ) as reply:
            return reply.status, await reply.read()


@asynccontextmanager
async def other_worker(gw: TestGateway) -> AsyncIterator[tuple[Gateway, str]]:
    gateway, sock = Gateway(replace(gw.gateway.settings, journal_dir="")), listening()
    await gateway.start(sock)
    try:
        yield gateway, f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        if not gateway.health.is_draining:
            await gateway.stop()
        sock.close()


@pytest.fixture
async def engine(engines):
    return await engines("--max-model-len", "131072", pace_ms=5)


@pytest.fixture
async def pair(settings, pool, engine, tmp_path: Path) -> AsyncIterator[Pair]:
    async with (
        running_gateway(settings, pool) as gw,
        other_worker(gw) as (far, url),
        agent_node(gw.url, pool, settings, tmp_path, [engine.url]) as node,
    ):
        records: list[object] = []
        record = far.lifecycle._record

        def noted(one: object) -> None:
            records.append(one)
            record(one)  # type: ignore[arg-type]

        far.lifecycle._record = noted
        await eventually(lambda: far.registry.engine(node.engine_key) is not None)
        yield Pair(gw, far, url, node, records)


async def test_the_sdk_streams_over_a_hop(pair, engine):
    assert not pair.far.tunnels
    async with openai.AsyncOpenAI(base_url=f"{pair.url}/v1", api_key=pair.near.key) as sdk:
        for _ in range(2):
            stream = await sdk.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=20, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason == "length"
    assert len(await engine.requests()) == 2
    assert len(pair.near.gateway._hops.ends) == 1, "the second turn took the first one's connection"
    assert pair.near.records == []


async def test_a_client_that_leaves_ends_the_engines_work_over_a_hop(pair, engine):
    asking = asyncio.create_task(pair.read(STREAM | {"max_tokens": 1500}))
    await engine.until(lambda record: bool(record["requests"]))
    asking.cancel()
    await engine.until(lambda record: record["requests"][0]["aborted"])
    await eventually(lambda: not pair.near.gateway._hops.ends)


async def test_a_client_that_reads_nothing_over_a_hop_stops_nobody_else(pair, engine):
    await engine.knobs(pace_ms=0)
    host, port = pair.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
    body = json.dumps(STREAM | {"max_tokens": 40_000}).encode()
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {pair.near.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await reader.readuntil(b"data: ")
    for _ in range(3):
        assert (await pair.read(STREAM))[1].endswith(b"[DONE]\n\n")
    held = pair.near.gateway.tunnels._tunnels[pair.node.node_id]._streams.values()
    await eventually(lambda: any(stream._is_paused for stream in held))
    end = b""
    while not end.endswith(b"0\r\n\r\n"):
        end = (end + await reader.read(2**16))[-16:]
    writer.transport.abort()


async def test_a_long_prompt_and_a_long_answer_fit_through_a_hop(pair, engine):
    await engine.knobs(pace_ms=0)
    long = STREAM | {"messages": [{"role": "user", "content": "x" * 7000}], "max_tokens": 200}
    for _ in range(3):
        status, body = await pair.read(long)
        assert status == 200, body
        assert body.endswith(b"[DONE]\n\n")


async def test_a_tunnel_cut_behind_a_hop_ends_the_stream_with_an_error_and_a_bill(pair, engine):
    await engine.knobs(lockstep=4, record_events=True)
    async with pair.near.http.post(
        f"{pair.url}/v1/chat/completions", json=STREAM | {"max_tokens": 50}, headers=pair.near.headers
    ) as reply:
        assert reply.status == 200
        body = b""
        while body.count(b"data: {") < 4:
            body += await reply.content.readany()
        pair.near.gateway.tunnels._tunnels[pair.node.node_id].lost("cut by the test")
        body += await reply.read()
    assert json.loads(body.decode().rpartition("data: ")[2])["error"]["type"] == "server_error"
    await eventually(lambda: pair.settled)
    (record,) = pair.settled
    (entry,) = await engine.requests()
    assert record.outcome == "engine_failed"
    assert record.completion_tokens == counted(written(entry["events"]), 1).completion > 0


async def test_a_worker_that_ends_cuts_no_stream_of_another_one(pair, engine):
    """Its agent is asked to open another tunnel; all that it knows of here is the ending worker, so the node leaves."""
    asking = asyncio.create_task(pair.read(STREAM | {"max_tokens": 100}))
    await engine.until(lambda record: bool(record["requests"]))
    await pair.near.gateway.stop()
    status, body = await asking
    assert (status, body[-15:].endswith(b"[DONE]\n\n")) == (200, True)
    await eventually(lambda: pair.far.registry.engine(pair.node.engine_key) is None)


async def test_a_hop_to_a_worker_that_died_is_another_nodes_turn(pair, engines):
    other = await engines()
    await pair.near.register(other.url)
    await eventually(lambda: len(pair.far.registry.snapshot.engines) == 2)
    pair.near.gateway._hops.close()
    for _ in range(6):
        assert (await pair.read(ASK))[0] == 200
    assert len(await other.requests()) == 6


# --- who may hop ------------------------------------------------------------------------------------------------------


class Nobody:
    """Has no tunnels, and says what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def open(self, node_id: str, engine_id: str, protocol: asyncio.Protocol) -> None:
        self.asked.append(node_id)
        raise TunnelLost("none here")


@pytest.fixture
async def server() -> AsyncIterator[tuple[HopServer, Nobody, str]]:
    streams = Nobody()
    made = HopServer(b"the workers' secret", streams)  # type: ignore[arg-type]
    worker = await made.start("127.0.0.1")
    yield made, streams, worker
    made.close()


async def test_whoever_lacks_the_workers_secret_gets_nowhere(server):
    made, streams, worker = server
    with pytest.raises(TunnelLost, match="no worker of ours"):
        await hop(b"another secret", worker, "n", "e", asyncio.Protocol)
    with pytest.raises(TunnelLost, match="no tunnel"):
        await hop(b"the workers' secret", worker, "n", "e", asyncio.Protocol)
    assert streams.asked == ["n"]
    await eventually(lambda: not made.ends and made.unproved == 0)


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 5000, b"\n" * 200])
async def test_what_is_no_handshake_is_closed(server, data, monkeypatch):
    made, streams, worker = server
    monkeypatch.setattr("gateway.reach.hop.HANDSHAKE_S", 0.2)
    host, _, port = worker.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    with contextlib.suppress(ConnectionResetError):
        assert len(await reader.read()) <= 48, "a nonce and a proof, and no more"
    writer.transport.abort()
    assert streams.asked == []
    await eventually(lambda: not made.ends and made.unproved == 0)
