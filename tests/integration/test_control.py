"""The control websocket as a gateway serves it: who may connect, what comes down, what goes up."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from config.changes import wake_feeds
from gateway.app import Gateway
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from nodes.commands import CommandStore, TooManyCommands, UnknownNode
from nodes.control_messages import COMMANDS_MAX, CONTROL_PATH, INSTANCE_HEADER, NODE_HEADER
from tests.gateways import MODEL, TestGateway, listening, running_gateway
from tests.waiting import eventually

HEARTBEAT = "/api/providers/heartbeat"


class Node:
    """A provider's node, as its agent would act for it."""

    def __init__(self, gw: TestGateway, account_id: int, key: str, key_id: int) -> None:
        self.gw, self.account_id, self.key, self.key_id = gw, account_id, key, key_id
        self.node_id, self.instance = str(uuid.uuid4()), str(uuid.uuid4())

    async def beat(self, **more: Any) -> tuple[int, Any]:
        engine = {
            "engine_id": "e0", "url": f"http://127.0.0.1:{self.account_id}", "state": "ready",
            "models": [{"id": MODEL, "context_length": 2048, "kind": "generate", "parent": None}],
        }  # fmt: skip
        body = {"api_key": self.key, "node_id": self.node_id, "instance": self.instance, "engines": [engine]}
        async with self.gw.http.post(self.gw.url + HEARTBEAT, json=body | more) as reply:
            return reply.status, await reply.json()

    def headers(self, **changes: str) -> dict[str, str]:
        return {
            "x-provider-key": self.key,
            NODE_HEADER: self.node_id,
            INSTANCE_HEADER: self.instance,
        } | changes

    @asynccontextmanager
    async def connected(self, url: str = "") -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        async with self.gw.http.ws_connect(
            (url or self.gw.url) + CONTROL_PATH, headers=self.headers()
        ) as socket:
            yield socket

    async def status(self, **changes: str) -> int:
        """Of an attempt to connect that is refused."""
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await self.gw.http.ws_connect(self.gw.url + CONTROL_PATH, headers=self.headers(**changes))
        return refused.value.status

    @property
    def commands(self) -> CommandStore:
        return CommandStore(self.gw.pool)


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    async with running_gateway(settings, pool) as running:
        yield running


async def new_node(gw: TestGateway, name: str = "provider", **of: Any) -> Node:
    account = await AccountStore(gw.pool).create(name, is_provider=True, **of)
    keys = KeyStore(gw.pool, load_pepper(gw.gateway.settings))
    row, key = await keys.create(account.id, prefix="dc1-provider-", scopes=("node",))
    return Node(gw, account.id, key, row.id)


@pytest.fixture
async def node(gw) -> Node:
    node = await new_node(gw)
    assert (await node.beat())[0] == 200
    return node


async def until(socket: aiohttp.ClientWebSocketResponse, kind: str) -> dict[str, Any]:
    while True:
        message = await socket.receive(timeout=60)
        assert message.type is aiohttp.WSMsgType.TEXT, message
        told = json.loads(message.data)
        if told["type"] == kind:
            return dict(told)


async def closed(socket: aiohttp.ClientWebSocketResponse) -> int | None:
    while True:
        message = await socket.receive(timeout=60)
        if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING):
            return socket.close_code


# --- who may connect ---------------------------------------------------------------------------------------------------


async def test_only_the_nodes_own_agent_may_connect(gw, node):
    other = await new_node(gw, "other")
    assert await node.status(**{NODE_HEADER: "no-uuid"}) == 400
    assert await node.status(**{"x-provider-key": "dc1-provider-wrong"}) == 401
    assert await node.status(**{"x-provider-key": gw.key}) == 403
    assert await node.status(**{NODE_HEADER: str(uuid.uuid4())}) == 404
    assert await other.status(**{NODE_HEADER: node.node_id}) == 404, "nobody learns of another's node"
    assert await node.status(**{INSTANCE_HEADER: str(uuid.uuid4())}) == 409
    async with gw.http.get(gw.url + CONTROL_PATH, headers=node.headers()) as plain:
        assert plain.status == 400
        assert "websocket" in (await plain.json())["error"]
    async with node.connected() as socket:
        assert (await until(socket, "wanted"))["wanted"] == "serve"


async def test_a_key_that_is_revoked_loses_its_connection(gw, node):
    async with node.connected() as socket:
        await until(socket, "wanted")
        await KeyStore(gw.pool, load_pepper(gw.gateway.settings)).revoke(node.key_id)
        assert await closed(socket) == 4403


async def test_a_provider_that_is_approved_no_more_loses_its_connection(gw, node):
    async with node.connected() as socket:
        await until(socket, "wanted")
        await AccountStore(gw.pool).set_approval(node.account_id, "rejected")
        assert await closed(socket) == 4403
    assert await node.status() == 403


# --- one agent a node ----------------------------------------------------------------------------------------------------


async def test_an_agent_that_begins_takes_the_node_and_the_one_that_had_it_is_fenced(node):
    _, reply = await node.beat()
    first, epoch = node.instance, reply["epoch"]
    async with node.connected() as socket:
        await until(socket, "wanted")
        node.instance = str(uuid.uuid4())
        status, taken = await node.beat(epoch=0)
        assert (status, taken["epoch"]) == (200, epoch + 1)
        assert await closed(socket) == 4409
    status, refused = await node.beat(instance=first, epoch=epoch)
    assert status == 409
    assert "another agent" in refused["error"].lower()
    assert (await node.beat(epoch=taken["epoch"]))[0] == 200
    assert await node.status(**{INSTANCE_HEADER: first}) == 409


async def test_the_fenced_agents_engines_are_the_new_ones_no_more(gw, node):
    mine = {"engine_id": "mine", "url": "http://127.0.0.1:19", "state": "ready", "models": []}
    first = node.instance
    node.instance = str(uuid.uuid4())
    await node.beat(epoch=0, engines=[mine])
    assert (await node.beat(instance=first, epoch=1))[0] == 409
    rows = await gw.pool.fetch("select engine_id from engines where node_id = $1", uuid.UUID(node.node_id))
    assert [row["engine_id"] for row in rows] == ["mine"]


async def test_a_second_connection_of_the_same_agent_takes_the_place_of_the_first(gw, node):
    async with node.connected() as first:
        await until(first, "wanted")
        async with node.connected() as second:
            await until(second, "wanted")
            assert await closed(first) == 1001
            assert len(gw.gateway._control) == 1
    await eventually(lambda: len(gw.gateway._control) == 0)


# --- down: what is wanted, and commands -----------------------------------------------------------------------------------


async def test_a_command_reaches_an_agent_that_is_connected_to_another_worker(gw, node, settings, pool):
    other = Gateway(replace(settings))
    sock = listening()
    await other.start(sock)
    try:
        async with node.connected(f"http://127.0.0.1:{sock.getsockname()[1]}") as socket:
            await until(socket, "wanted")
            admin = await admin_key(gw)
            body = {"command": "restart_engine", "arguments": {"engine_id": "e0"}}
            status, taken = await tell(gw, node, admin, body)
            assert (status, taken["success"]) == (202, True)
            command = await until(socket, "command")
            assert command["id"] == taken["id"]
            assert (command["name"], command["arguments"]) == ("restart_engine", {"engine_id": "e0"})
            await socket.send_json(
                {"type": "progress", "id": command["id"], "status": "done", "detail": "again"}
            )
            await eventually(lambda: is_done(node, command["id"]))
    finally:
        await other.stop()
        sock.close()


async def test_what_is_wanted_is_a_state_that_outlives_connections_and_the_nodes_absence(gw, node):
    admin = await admin_key(gw)
    async with node.connected() as socket:
        assert (await until(socket, "wanted"))["wanted"] == "serve"
        await tell(gw, node, admin, {"command": "drain"})
        assert (await until(socket, "wanted"))["wanted"] == "drain"
    assert await state(gw, node) == "draining"
    await eventually(lambda: gw.gateway.registry.engine(f"{node.node_id}/e0") is None)
    await gw.pool.execute("update nodes set state = 'offline'")
    _, reply = await node.beat()
    assert reply["wanted"] == "drain"
    assert await state(gw, node) == "draining"
    async with node.connected() as socket:
        assert (await until(socket, "wanted"))["wanted"] == "drain"
        await tell(gw, node, admin, {"command": "resume"})
        assert (await until(socket, "wanted"))["wanted"] == "serve"
    assert await state(gw, node) == "online"
    await eventually(lambda: gw.gateway.registry.engine(f"{node.node_id}/e0") is not None)


async def test_a_node_that_its_provider_paused_hears_of_it_at_once(gw, node):
    async with node.connected() as socket:
        await until(socket, "wanted")
        await gw.pool.execute("update nodes set state = 'paused'")
        assert (await until(socket, "wanted"))["wanted"] == "pause"


async def test_without_a_websocket_commands_ride_in_the_heartbeats_reply(gw, node):
    command_id = await node.commands.send(node.node_id, "preload_model", {"model_name": "llama"})
    _, reply = await node.beat()
    assert reply["preload_model"] == {"model_name": "llama", "status": "downloading"}
    assert [(each["id"], each["name"]) for each in reply["commands"]] == [(command_id, "preload_model")]
    _, again = await node.beat(progress=[{"id": command_id, "status": "downloading", "percent": 40}])
    assert len(again["commands"]) == 1, "it is not done yet"
    (row,) = await node.commands.recent(node.node_id)
    assert (row["status"], row["percent"]) == ("downloading", 40)
    _, last = await node.beat(progress=[{"id": command_id, "status": "done"}])
    assert (last["commands"], last["preload_model"]) == ([], None)


async def test_progress_of_another_nodes_command_changes_nothing(gw, node):
    other = await new_node(gw, "other")
    await other.beat()
    command_id = await node.commands.send(node.node_id, "update", {})
    assert (await other.beat(progress=[{"id": command_id, "status": "done"}]))[0] == 200
    (row,) = await node.commands.recent(node.node_id)
    assert row["status"] == "queued"
    assert (await node.beat(progress=[{"id": command_id, "status": "odd"}]))[0] == 400


async def test_the_same_command_is_given_once_and_too_many_are_refused(gw, node):
    first = await node.commands.send(node.node_id, "stop_engine", {"engine_id": "0"})
    assert await node.commands.send(node.node_id, "stop_engine", {"engine_id": "0"}) == first
    for number in range(1, COMMANDS_MAX):
        await node.commands.send(node.node_id, "stop_engine", {"engine_id": str(number)})
    with pytest.raises(TooManyCommands):
        await node.commands.send(node.node_id, "update", {})
    status, _ = await tell(gw, node, await admin_key(gw), {"command": "update"})
    assert status == 409
    with pytest.raises(UnknownNode):
        await node.commands.send(str(uuid.uuid4()), "update", {})


async def test_a_command_that_nobody_came_for_is_over(gw, node):
    await node.commands.send(node.node_id, "update", {}, expires_s=0)
    assert (await node.beat())[1]["commands"] == []
    await node.commands.trim()
    (row,) = await node.commands.recent(node.node_id)
    assert (row["status"], row["detail"]) == ("failed", "the agent did not come for it")
    await node.commands.trim(kept_s=0)
    assert await node.commands.recent(node.node_id) == []


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b'{"command": "format"}', b'{"command": "stop_engine"}', b'{"command": 5}',
        b'{"command": "pause", "arguments": {"x": "y"}}', b'{"command": "update", "arguments": []}',
        b'{"command": "stop_engine", "arguments": {"engine_id": "a\\u0000"}}',
    ],
)  # fmt: skip
async def test_a_wrong_command_is_a_400(gw, node, body):
    status, answer = await tell(gw, node, await admin_key(gw), body)
    assert status == 400, answer
    assert isinstance(answer["error"], str)


async def test_only_an_admin_gives_commands(gw, node):
    for key in (gw.key, node.key):
        assert (await tell(gw, node, key, {"command": "pause"}))[0] == 403
    assert (await tell(gw, node, await admin_key(gw), {"command": "pause"}, node_id=str(uuid.uuid4())))[
        0
    ] == 404
    assert await state(gw, node) == "online"


# --- up -----------------------------------------------------------------------------------------------------------------


async def test_load_goes_to_every_workers_picture_and_renews_the_lease(gw, node):
    await eventually(lambda: gw.gateway.registry.engine(f"{node.node_id}/e0") is not None)
    async with node.connected() as socket:
        load = {"running": 3, "waiting": 2, "kv_usage": 0.5, "sleeping": False}
        await socket.send_json({"type": "load", "engines": {"e0": load, "stranger": load}})
        await until(socket, "lease")
        engine = gw.gateway.registry.engine(f"{node.node_id}/e0")
        await eventually(lambda: engine.load.running == 3)
        assert (engine.load.waiting, engine.load.kv_usage) == (2, 0.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"type": "load", "engines": {"e0": {"running": -1}}}',
        '{"type": "progress"}',
        "[" * 60_000,
    ],
)
async def test_what_is_no_message_ends_the_connection(node, text):
    async with node.connected() as socket:
        await socket.send_str(text)
        assert await closed(socket) == 4400


async def test_a_message_that_is_too_large_ends_the_connection(node):
    async with node.connected() as socket:
        await socket.send_str(" " * 100_000)
        assert await closed(socket) == 1009


async def test_a_worker_that_ends_says_so_and_does_not_wait_for_agents(gw, node):
    async with node.connected() as socket:
        await until(socket, "wanted")
        stopping = asyncio.create_task(gw.gateway.stop())
        assert await closed(socket) == 1001
        with contextlib.suppress(
            aiohttp.ClientError
        ):  # over the connection that its heartbeat left, which is still good
            async with node.connected() as again:
                assert await closed(again) == 1001
        await stopping


async def admin_key(gw: TestGateway) -> str:
    known = await gw.pool.fetchval("select id from accounts where name = 'root'")
    account_id = known or (await AccountStore(gw.pool).create("root", is_admin=True)).id
    keys = KeyStore(gw.pool, load_pepper(gw.gateway.settings))
    _, key = await keys.create(account_id, prefix="sk-pg-", scopes=("admin",))
    return key


async def tell(gw: TestGateway, node: Node, key: str, body: Any, node_id: str = "") -> tuple[int, Any]:
    path = f"/api/admin/nodes/{node_id or node.node_id}/commands"
    given = {"data": body} if isinstance(body, bytes) else {"json": body}
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    async with gw.http.post(gw.url + path, headers=headers, **given) as reply:
        return reply.status, await reply.json()


async def is_done(node: Node, command_id: int) -> bool:
    rows = await node.commands.recent(node.node_id)
    return any(
        row["id"] == command_id and row["status"] == "done" and row["detail"] == "again" for row in rows
    )


async def state(gw: TestGateway, node: Node) -> str:
    await wake_feeds(gw.gateway._valkey)
    return str(await gw.pool.fetchval("select state from nodes where id = $1", uuid.UUID(node.node_id)))
