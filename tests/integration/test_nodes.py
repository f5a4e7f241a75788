"""Nodes as a gateway sees them: heartbeats by the contract, engines it may call, silence, return, and lost stores."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from functools import reduce
from typing import Any

import asyncpg
import pytest

from gateway.app import Gateway
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from nodes.heartbeats import NodeStore
from tests.fakes.stores import frozen, kill, using
from tests.gateways import MODEL, TestGateway, listening, running_gateway
from tests.waiting import eventually

PATH = "/api/providers/heartbeat"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
CONTRACT = {
    "success": bool, "message": str, "timestamp": str, "update_available": bool, "needs_update": bool,
    "latest_version": str, "min_version": str, "approval_status": str, "approved": bool, "preload_model": object,
}  # fmt: skip
OURS = {
    "node_id": str, "epoch": int, "lease_s": float, "heartbeat_interval_s": float, "state": str, "preferences": dict,
    "wanted": str, "commands": list, "reach": dict,
}  # fmt: skip


class Provider:
    """An account with nodes; its heartbeats are sent over HTTP."""

    def __init__(self, gw: TestGateway, account_id: int, key: str) -> None:
        self.gw, self.account_id, self.key = gw, account_id, key
        self.node_id = str(uuid.uuid4())

    def beat(self, *urls: str, state: str = "ready", **more: Any) -> dict[str, Any]:
        engines = [
            {
                "engine_id": f"e{number}", "url": url, "state": state,
                "models": [{"id": MODEL, "context_length": 2048, "kind": "generate", "parent": None}],
            }
            for number, url in enumerate(urls)
        ]  # fmt: skip
        return {"api_key": self.key, "node_id": self.node_id, "engines": engines} | more

    async def send(self, body: Any, **options: Any) -> tuple[int, Any]:
        given = {"data": body} if isinstance(body, bytes) else {"json": body}
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        async with self.gw.http.post(self.gw.url + PATH, headers=headers, **given, **options) as reply:
            return reply.status, await reply.json()

    async def says(self, *urls: str, **more: Any) -> dict[str, Any]:
        """One good heartbeat; the reply."""
        status, body = await self.send(self.beat(*urls, **more))
        assert status == 200, body
        return dict(body)

    @property
    def engine_key(self) -> str:
        return f"{self.node_id}/e0"

    def is_routed(self) -> bool:
        return self.gw.gateway.registry.engine(self.engine_key) is not None


async def provider(gw: TestGateway, name: str = "provider", **of: Any) -> Provider:
    account = await AccountStore(gw.pool).create(name, is_provider=True, **of)
    keys = KeyStore(gw.pool, load_pepper(gw.gateway.settings))
    _, key = await keys.create(account.id, prefix="dc1-provider-", scopes=("node",))
    return Provider(gw, account.id, key)


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    async with running_gateway(settings, pool) as running:
        yield running


@pytest.fixture
async def node(gw) -> Provider:
    return await provider(gw)


async def chat_status(gw: TestGateway) -> int:
    async with await gw.post("/v1/chat/completions", ASK) as reply:
        await reply.read()
        return reply.status


# --- the heartbeat, by its contract ----------------------------------------------------------------------------------


async def test_a_reply_has_every_field_of_the_contract_and_the_lease(gw, node):
    reply = await node.says("http://127.0.0.1:9001")
    assert reply.keys() == CONTRACT.keys() | OURS.keys()
    for name, kind in (CONTRACT | OURS).items():
        assert isinstance(reply[name], kind), name
    assert (reply["success"], reply["approved"], reply["approval_status"]) == (True, True, "approved")
    assert (reply["node_id"], reply["epoch"]) == (node.node_id, 1)
    assert reply["lease_s"] == gw.gateway.settings.heartbeat_grace_s
    assert reply["timestamp"].endswith("Z")


async def test_the_contracts_own_daemon_needs_nothing_but_its_key(gw, node):
    status, first = await node.send({"api_key": node.key})
    assert status == 200
    facts = {"gpu_status": {"gpu_name": "A100"}, "uptime": 5.5, "provider_ip": "10.0.0.1", "unknown": 1}
    more = {"provider_hostname": "h", "cached_models": ["m"], "resource_spec": {"x": 1}}
    _, again = await node.send({"api_key": node.key} | facts | more)
    assert again["node_id"] == first["node_id"], "without node_id a key has one node"
    row = await gw.pool.fetchrow("select * from nodes")
    assert (row["hostname"], row["cached_models"], row["state"]) == ("h", ["m"], "online")


async def test_the_key_may_stand_in_its_header(node):
    status, _ = await node.send({"node_id": node.node_id}, headers={"x-provider-key": node.key})
    assert status == 200


@pytest.mark.parametrize("key", ["dc1-provider-wrong", "x" * 400, "\u00e9"])
async def test_a_bad_key_is_a_401_with_one_error(node, key):
    status, body = await node.send({"api_key": key})
    assert status == 401
    assert body.keys() == {"error", "request_id"}
    assert isinstance(body["error"], str)


async def test_a_key_for_inference_is_no_key_for_a_node(gw, node):
    assert (await node.send({"api_key": gw.key}))[0] == 403


async def test_a_provider_that_is_not_approved_is_a_403_until_it_is(gw):
    node = await provider(gw, "new-one", approval_status="pending")
    status, body = await node.send(node.beat())
    assert (status, body["error"]) == (403, "Provider not approved yet.")
    await AccountStore(gw.pool).set_approval(node.account_id, "approved")
    assert (await node.send(node.beat()))[0] == 200


async def test_approval_is_the_accounts_own_whatever_others_are_called(gw):
    node = await provider(gw, "new-one", approval_status="pending")
    await AccountStore(gw.pool).create(str(node.account_id), is_provider=True)
    assert (await node.send(node.beat()))[0] == 403


BAD: list[Any] = [
    [], "text", 5, None, {}, {"api_key": 5}, {"api_key": ["x"]},
    {"node_id": "no-uuid"}, {"node_id": 5}, {"epoch": -1}, {"epoch": "x"}, {"uptime": "long"},
    {"cached_models": "m"}, {"cached_models": [1]}, {"cached_models": ["m"] * 5000}, {"gpu_status": []},
    {"engines": {}}, {"engines": [1]}, {"engines": [{}]}, {"engines": [{"engine_id": "e"}]},
    {"engines": [{"engine_id": "e", "url": "http://127.0.0.1:1", "state": "odd"}]},
    {"engines": [{"engine_id": "e", "url": "ftp://127.0.0.1:1", "state": "ready"}]},
    {"engines": [{"engine_id": "e", "url": "http://127.0.0.1:1", "state": "ready"}] * 2},
    {"engines": [{"engine_id": f"e{n}", "url": "http://127.0.0.1:1", "state": "ready"} for n in range(65)]},
    {"engines": [{"engine_id": "e", "url": "http://127.0.0.1:1", "state": "ready", "restarts": 2**70}]},
    {"engines": [{"engine_id": "e", "url": "http://127.0.0.1:1", "state": "ready", "models": [{"id": ""}]}]},
    {"engines": [{"engine_id": "e\x00", "url": "http://127.0.0.1:1", "state": "ready"}]},
    {"provider_hostname": "a\x00b"}, {"cached_models": ["a\x00b"]}, {"gpu_status": {"x": "a\x00b"}},
    {"agent_version": "\x00"}, {"provider_hostname": "x" * 10_000}, {"load": []},
    {"engines": [{"engine_id": "e", "url": "http://127.0.0.1:1", "state": "ready"}], "load": {"e": 5}},
    {"gpu_status": reduce(lambda inner, _: {"x": inner}, range(500), {})},
]  # fmt: skip


@pytest.mark.parametrize("fields", BAD, ids=range(len(BAD)))
async def test_a_bad_payload_is_a_400_that_says_where(gw, node, fields):
    has_key = isinstance(fields, dict) and fields and "api_key" not in fields
    body = {"api_key": node.key, "node_id": node.node_id} | fields if has_key else fields
    status, answer = await node.send(body)
    assert status == 400, answer
    assert isinstance(answer["error"], str)
    assert node.key not in str(answer)
    assert await gw.pool.fetchval("select count(*) from nodes") == 0


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"{" * 100_000])
async def test_a_body_that_is_no_json_is_a_400(node, data):
    assert (await node.send(data))[0] == 400


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_heartbeat_of_two_megabytes_is_a_413(node, chunked):
    big = b'{"api_key":"' + b"x" * 2**21 + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        yield big

    headers = {"content-type": "application/json"} | ({} if chunked else {"content-length": str(len(big))})
    async with node.gw.http.post(node.gw.url + PATH, data=pieces(), headers=headers) as reply:
        status, body = reply.status, await reply.json()
    assert status == 413
    assert isinstance(body["error"], str)


# --- which engines may be called, and whose nodes they are -----------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["http://192.0.2.1:8000", "http://169.254.169.254", "http://example.com:8000", "https://127.0.0.1:1",
     "http://0.0.0.0:1", "http://127.0.0.1:1/path", "http://[::ffff:10.0.0.1]:1"],
)  # fmt: skip
async def test_an_engine_outside_of_the_networks_is_refused_and_nothing_is_written(gw, node, url):
    status, body = await node.send(node.beat(url))
    assert status == 400
    assert body["error"].startswith("engines[].url: ")
    assert await gw.pool.fetchval("select count(*) from nodes") == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.77", "[::1]", "[::ffff:127.0.0.1]"])
async def test_the_gateway_is_no_engine_of_its_own(gw, node, host):
    port = gw.url.rpartition(":")[2]
    status, body = await node.send(node.beat(f"http://{host}:{port}"))
    assert (status, "gateway's own" in body["error"]) == (400, True)


async def test_a_node_of_another_provider_can_not_be_taken_over(gw, node, engine):
    await node.says(engine.url)
    await eventually(node.is_routed)
    thief = await provider(gw, "thief")
    thief.node_id = node.node_id
    status, _ = await thief.send(thief.beat("http://127.0.0.1:9"))
    assert status == 400
    assert await gw.pool.fetchval("select account_id from nodes") == node.account_id
    assert await chat_status(gw) == 200


async def test_two_providers_may_name_their_engines_alike(gw, node, engines):
    other = await provider(gw, "other")
    await node.says((await engines()).url)
    await other.says((await engines()).url)
    await eventually(lambda: node.is_routed() and other.is_routed())
    assert len(gw.gateway.registry.snapshot.engines) == 2


@pytest.mark.parametrize("spelling", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
async def test_the_address_of_another_providers_engine_is_refused_however_it_is_spelled(
    gw, node, engine, spelling
):
    await node.says(engine.url)
    thief = await provider(gw, "thief")
    status, body = await thief.send(thief.beat(f"http://{spelling}:{engine.port}"))
    assert (status, body["error"]) == (400, "engines[].url: this address is another provider's engine.")
    assert await gw.pool.fetchval("select count(*) from nodes") == 1
    await gw.pool.execute("update nodes set state = 'offline'")
    assert (await thief.send(thief.beat(engine.url)))[0] == 200


async def test_an_engine_behind_its_agent_is_not_called_at_the_address_that_it_has_there(gw, node, engine):
    reply = await node.says(engine.url, reach={"mode": "agent"})
    assert reply["reach"]["way"] == "none"
    assert len(reply["reach"]["token"]) == 64
    await eventually(lambda: gw.gateway.registry.snapshot.nodes_online == 1)
    assert not node.is_routed()
    status, body = await node.send(node.beat("http://10.9.9.9:1", reach={"mode": "agent"}))
    assert status == 200, body
    body = node.beat(engine.url, reach={"mode": "agent"})
    body["engines"][0]["engine_id"] = "e\r\nx-poolgate-token: y"
    assert (await node.send(body))[0] == 400
    assert (await node.says(engine.url))["reach"] == {"way": "direct", "problem": "", "token": ""}
    await eventually(node.is_routed)


@pytest.mark.parametrize(
    "reach",
    ["tunnel", 5, {"mode": "odd"}, {"mode": "agent", "advertise": "h:1"}, {"mode": "agent", "advertise": 5}],
)
async def test_a_way_that_is_none_is_a_400_that_says_where(node, reach):
    status, body = await node.send(node.beat("http://127.0.0.1:9001", reach=reach))
    assert (status, "reach" in body["error"]) == (400, True)


# --- states reach routing --------------------------------------------------------------------------------------------


async def test_a_node_serves_within_a_moment_of_its_first_heartbeat(gw, node, engine):
    assert await chat_status(gw) == 503
    await node.says(engine.url)
    async with asyncio.timeout(1.0 + gw.gateway.settings.change_poll_s):
        await eventually(node.is_routed)
    assert await chat_status(gw) == 200


@pytest.mark.parametrize("state", ["starting", "draining", "failed", "stopped"])
async def test_an_engine_that_is_not_ready_gets_no_turns_and_a_ready_one_again(gw, node, engine, state):
    await node.says(engine.url)
    await eventually(node.is_routed)
    await node.says(engine.url, state=state)
    await eventually(lambda: not node.is_routed())
    assert await chat_status(gw) == 503
    await node.says(engine.url)
    await eventually(node.is_routed)
    assert await chat_status(gw) == 200


async def test_what_changed_is_read_and_nothing_else(gw, node):
    other = await provider(gw, "other")
    await node.says("http://127.0.0.1:9001", cached_models=["m", "n"])
    await other.says("http://127.0.0.1:9002", cached_models=["m"])
    store = NodeStore(gw.pool)
    rows = await store.changed([node.node_id], [])
    assert [(row.node_id, row.url) for row in rows.engines] == [(node.node_id, "http://127.0.0.1:9001")]
    assert (rows.nodes_online, [row.model for row in rows.cached]) == (2, ["m", "n"])
    rows = await store.changed([], [str(other.account_id)])
    assert ([row.node_id for row in rows.engines], rows.nodes) == ([other.node_id], {other.node_id})
    await eventually(lambda: node.is_routed() and other.is_routed())
    await gw.pool.execute("update accounts set status = 'suspended' where id = $1", other.account_id)
    await eventually(lambda: not other.is_routed())
    assert node.is_routed()
    await gw.pool.execute("update accounts set status = 'active' where id = $1", other.account_id)
    await eventually(other.is_routed)


async def test_an_engine_that_is_not_reported_any_more_leaves(gw, node, engine):
    await node.says(engine.url, engine.url)
    await eventually(lambda: len(gw.gateway.registry.snapshot.engines) == 2)
    await node.says(engine.url)
    await eventually(lambda: len(gw.gateway.registry.snapshot.engines) == 1)
    await node.says()
    await eventually(lambda: not gw.gateway.registry.snapshot.engines)


async def test_a_turn_under_way_goes_on_when_its_engine_leaves_the_picture(gw, node, engines):
    engine = await engines(pace_ms=20)
    await node.says(engine.url)
    await eventually(node.is_routed)
    asking = asyncio.create_task(
        gw.post("/v1/chat/completions", ASK | {"max_tokens": 30, "stream": True, "ignore_eos": True})
    )
    await engine.until(lambda record: record["running"] == 1)
    await node.says(engine.url, state="draining")
    await eventually(lambda: not node.is_routed())
    async with await asking as reply:
        assert (await reply.read()).endswith(b"[DONE]\n\n")
    assert (await gw.settled(1))[0].outcome == "finished"


@pytest.mark.parametrize("state", ["paused", "suspended", "draining"])
async def test_a_node_that_an_admin_took_out_stays_out_whatever_it_reports(gw, node, engine, state):
    await node.says(engine.url)
    await eventually(node.is_routed)
    await gw.pool.execute("update nodes set state = $1", state)
    await eventually(lambda: not node.is_routed())
    reply = await node.says(engine.url)
    assert reply["epoch"] == 1
    assert await gw.pool.fetchval("select state from nodes") == state
    await gw.pool.execute("update nodes set state = 'online'")
    await eventually(node.is_routed)


async def test_a_reported_load_decides_where_turns_go(gw, node, engines):
    busy, idle = await engines(), await engines()
    load = {"e0": {"running": 200, "waiting": 50, "kv_usage": 0.9, "sleeping": False}, "e1": {"running": 0}}
    await node.says(busy.url, idle.url)
    await eventually(lambda: len(gw.gateway.registry.snapshot.engines) == 2)
    await node.says(busy.url, idle.url, load=load)
    for _ in range(8):
        assert await chat_status(gw) == 200
    assert (len(await busy.requests()), len(await idle.requests())) == (0, 8)


async def test_a_load_of_an_engine_that_does_not_exist_is_ignored(node):
    await node.says("http://127.0.0.1:9001", load={"ghost": {"running": 5}})


# --- silence and return ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def beating(node: Provider, *urls: str) -> AsyncIterator[None]:
    """An agent that keeps reporting, whatever the gateway answers."""

    async def beat() -> None:
        while True:
            await node.send(node.beat(*urls))
            await asyncio.sleep(0.1)

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def quick(settings, pool) -> AsyncIterator[TestGateway]:
    """A gateway with a short grace."""
    async with running_gateway(replace(settings, heartbeat_grace_s=0.8), pool) as running:
        yield running


async def test_a_silent_node_leaves_and_returns_with_a_higher_epoch(quick, engine):
    node = await provider(quick)
    assert (await node.says(engine.url))["epoch"] == 1
    await eventually(node.is_routed)
    await eventually(lambda: not node.is_routed())
    assert await quick.pool.fetchval("select state from nodes") == "offline"
    assert await chat_status(quick) == 503
    assert (await node.says(engine.url))["epoch"] == 2
    await eventually(node.is_routed)
    assert await chat_status(quick) == 200


async def test_a_node_that_keeps_reporting_stays_while_a_silent_one_leaves(quick, engines):
    loud, silent = await provider(quick, "loud"), await provider(quick, "silent")
    one, two = await engines(), await engines()
    await silent.says(two.url)
    await loud.says(one.url)
    await eventually(lambda: loud.is_routed() and silent.is_routed())
    async with beating(loud, one.url):
        await eventually(lambda: not silent.is_routed())
        assert loud.is_routed()
        for _ in range(5):
            assert await chat_status(quick) == 200
    assert await quick.pool.fetchval("select epoch from nodes where id = $1", uuid.UUID(loud.node_id)) == 1


# --- without PostgreSQL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_without_postgres_the_picture_stays_and_afterwards_nodes_get_their_grace(
    settings, private_stores, engine, how
):
    async with (
        using(private_stores, settings, heartbeat_grace_s=2.5) as (own, pool),
        running_gateway(own, pool) as gw,
    ):
        node = await provider(gw)
        await node.says(engine.url)
        await eventually(node.is_routed)
        assert await chat_status(gw) == 200
        epoch = await pool.fetchval("select epoch from nodes")
        await pool.execute("checkpoint")  # the tests' PostgreSQL forgets its last moments when it is killed
        async with beating(node, engine.url):
            if how == "frozen":
                with frozen(private_stores, "postgres"):
                    await _serves_without(gw, node)
            else:
                kill(private_stores, "postgres")
                await _serves_without(gw, node)
                private_stores.restart("postgres")
            await _is_seen_again(own.database_url, node)
            assert node.is_routed()
            assert await _fetchval(own.database_url, "select epoch from nodes") == epoch, "it never left"
            assert await chat_status(gw) == 200


async def _serves_without(gw: TestGateway, node: Provider) -> None:
    """Longer than the grace: whoever judged by heartbeats now would throw the node out."""
    began_s = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() - began_s < gw.gateway.settings.heartbeat_grace_s * 1.2:
        assert await chat_status(gw) == 200
        assert node.is_routed()
        await asyncio.sleep(0.1)
    assert (await node.send(node.beat()))[0] == 503


async def _is_seen_again(url: str, node: Provider) -> None:
    async def is_so() -> bool:
        try:
            return bool(
                await _fetchval(
                    url, "select last_heartbeat_at > clock_timestamp() - interval '1 s' from nodes"
                )
            )
        except (asyncpg.PostgresError, OSError):
            return False

    await eventually(is_so)


async def _fetchval(url: str, statement: str) -> Any:
    connection = await asyncpg.connect(url, timeout=5)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_without_valkey_a_heartbeat_still_reaches_routing(settings, private_stores, engine):
    async with using(private_stores, settings) as (own, pool), running_gateway(own, pool) as gw:
        node = await provider(gw)
        kill(private_stores, "valkey")
        await node.says(engine.url, load={"e0": {"running": 1}})
        await eventually(node.is_routed)
        assert await chat_status(gw) == 200


async def test_a_worker_that_starts_knows_the_nodes_before_it_answers(settings, pool, engine):
    async with running_gateway(settings, pool) as first:
        await first.register(engine.url)
    gateway, sock = Gateway(settings), listening()
    await gateway.start(sock)
    try:
        assert len(gateway.registry.snapshot.engines) == 1
    finally:
        await gateway.stop()
        sock.close()


async def test_expiry_takes_only_nodes_last_heard_of_before_the_given_moment(gw, node):
    await node.says()
    store = NodeStore(gw.pool)
    heard_at = await gw.pool.fetchval("select last_heartbeat_at from nodes")
    assert await store.expire(heard_at) == []
    assert await store.expire(heard_at + timedelta(milliseconds=1)) == [node.node_id]
    assert await store.expire(heard_at + timedelta(milliseconds=1)) == [], "once"
