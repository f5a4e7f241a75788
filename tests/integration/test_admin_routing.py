"""What admins see of routing, over HTTP and with `poolgate top`; and headers that ask something of the node."""

import asyncio
import dataclasses
import json
import sys
import uuid
from typing import Any

import pytest

from billing.money import NANO
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from tests.fakes.up import ROOT, clean_environment
from tests.gateways import MODEL, TestGateway, running_gateway
from tests.waiting import eventually

pytest_plugins = ["tests.fakes.engine_fixtures"]

PATH = "/v1/chat/completions"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
EXPLAIN, POOL = "/api/admin/routing/explain", "/api/admin/routing/pool"


@pytest.fixture
async def admin(settings: Any, pool: Any) -> Any:
    """A gateway whose key may do everything."""
    async with running_gateway(settings, pool, scopes=("inference", "admin")) as gateway:
        yield gateway


async def get(gateway: TestGateway, path: str, **query: Any) -> tuple[int, Any]:
    reply = await gateway.http.get(gateway.url + path, params=query, headers=gateway.headers)
    return reply.status, await reply.json()


async def test_it_tells_what_each_engine_failed_and_scored(admin, engine, engines):
    first, second = await admin.register(engine.url, (await engines()).url)
    admin.gateway.registry.engine(second).load.tokens = 4000
    status, told = await get(admin, EXPLAIN, model=MODEL, tokens="100")
    assert status == 200
    assert [row["engine"] for row in told["candidates"]] == [first, second]
    assert [row["scores"]["load"] for row in told["candidates"]] == [0.0, 400.0]
    assert told["candidates"][0]["scores"]["uncached"] == 100
    admin.gateway.registry.engine(first).breaker.is_open = True
    _, told = await get(admin, EXPLAIN, model=MODEL, tier_min="1")
    assert {row["engine"]: row["failed"] for row in told["candidates"]} == {
        first: ["breaker", "tier"], second: ["tier"],
    }  # fmt: skip
    assert (await get(admin, EXPLAIN, model="nobody's"))[1]["candidates"] == []


@pytest.mark.parametrize(
    ("query", "words"),
    [({}, "model"), ({"model": MODEL, "tokens": "-1"}, "tokens"), ({"model": MODEL, "kind": "x"}, "kind"),
     ({"model": MODEL, "other": "1"}, "other")],
)  # fmt: skip
async def test_what_is_asked_wrongly_is_told_by_name(admin, query, words):
    status, told = await get(admin, EXPLAIN, **query)
    assert status == 400
    assert told["error"].startswith(words)
    assert told["request_id"]


async def test_only_admins_may_ask(settings, pool, engine):
    async with running_gateway(settings, pool) as gateway:
        await gateway.register(engine.url)
        for path in (EXPLAIN + "?model=m", POOL):
            assert (await gateway.http.get(gateway.url + path)).status == 401
            assert (await gateway.http.get(gateway.url + path, headers=gateway.headers)).status == 403
        reply = await gateway.http.post(
            gateway.url + PATH, json=CHAT, headers=gateway.headers | {"x-poolgate-explain": "1"}
        )
        assert reply.status == 200
        assert "x-poolgate-explain" not in reply.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_an_admins_turn_is_explained_in_its_answer(admin, engine, stream):
    (key,) = await admin.register(engine.url)
    headers = admin.headers | {"x-poolgate-explain": "1"}
    reply = await admin.http.post(admin.url + PATH, json=CHAT | {"stream": stream}, headers=headers)
    told = json.loads(reply.headers["x-poolgate-explain"])
    await reply.read()
    assert told["chosen"] == key
    assert told["candidates"][0]["failed"] == []


async def test_facts_of_a_node_are_set_and_turns_go_by_them(admin, engine, engines):
    _, second = await admin.register(engine.url, (await engines()).url)
    node = second.partition("/")[0]
    url = f"{admin.url}/api/admin/routing/nodes/{node}"
    reply = await admin.http.put(
        url, json={"region": "ruh-1", "tier": 3, "price_percent": 80}, headers=admin.headers
    )
    assert (reply.status, await reply.json()) == (200, {"success": True})
    chosen = admin.gateway.registry.engine(second)
    await eventually(lambda: (chosen.region, chosen.tier, chosen.price_percent) == ("ruh-1", 3, 80))
    for wishes in (
        {"x-poolgate-tier-min": "2"},
        {"x-poolgate-price-percent-max": "90"},
        {"x-poolgate-region": "ruh-1"},
    ):
        reply = await admin.http.post(admin.url + PATH, json=CHAT, headers=admin.headers | wishes)
        assert reply.status == 200
    assert {f"{record.node_id}/e0" for record in await admin.settled(3)} == {second}
    reply = await admin.http.post(
        admin.url + PATH, json=CHAT, headers=admin.headers | {"x-poolgate-tier-min": "9"}
    )
    assert reply.status == 503


@pytest.mark.parametrize(
    ("body", "status"), [({"tier": -1}, 400), ({"other": 1}, 400), ([], 400), ({"tier": 1}, 404)]
)
async def test_facts_that_make_no_sense_or_are_of_nobody_are_refused(admin, body, status):
    for node in {uuid.uuid4(), "nonsense" if status == 404 else uuid.uuid4()}:
        url = f"{admin.url}/api/admin/routing/nodes/{node}"
        assert (await admin.http.put(url, json=body, headers=admin.headers)).status == status


@pytest.mark.parametrize("wishes", [{"x-poolgate-tier-min": "gold"}, {"x-poolgate-session": "s" * 200}])
async def test_a_header_that_makes_no_sense_is_400(admin, engine, wishes):
    await admin.register(engine.url)
    reply = await admin.http.post(admin.url + PATH, json=CHAT, headers=admin.headers | wishes)
    assert reply.status == 400
    assert next(iter(wishes)) in (await reply.json())["error"]["message"]


async def test_a_session_stays_with_its_engine(admin, engines):
    urls = [(await engines()).url for _ in range(3)]
    await admin.register(*urls)
    for _ in range(6):
        headers = admin.headers | {"x-poolgate-session": "s"}
        assert (await admin.http.post(admin.url + PATH, json=CHAT, headers=headers)).status == 200
    assert len({record.node_id for record in await admin.settled(6)}) == 1


async def test_top_draws_the_pool_once(settings, pool, engine, engines):
    settings = dataclasses.replace(settings, engine_turns_max=1)
    account = await AccountStore(pool).create("boss", balance_nano=NANO, is_admin=True)
    _, key = await KeyStore(pool, load_pepper(settings)).create(
        account.id, prefix="sk-pg-", scopes=("admin",)
    )
    async with running_gateway(settings, pool) as gateway:
        (busy,) = await gateway.register((await engines(lockstep=1)).url)
        waiting = [asyncio.create_task(gateway.post(PATH, CHAT | {"stream": True})) for _ in range(2)]
        await eventually(lambda: gateway.gateway.placement.queue.waiting == 1)
        code, said = await _top(gateway.url, key)
        assert code == 0, said
        assert "1 nodes  1 engines" in said
        assert "1 waiting" in said
        assert f"{busy[:8]}/e0" in said
        code, said = await _top(gateway.url, key, "--json")
        assert (code, json.loads(said)["queue"]["waiting"]) == (0, 1)
        code, said = await _top(gateway.url, gateway.key)
        assert (code, "scope admin" in said) == (1, True)
        code, said = await _top("http://127.0.0.1:9", key)
        assert (code, "can't be reached" in said) == (1, True)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _top(url: str, key: str, *more: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "top", "--once", "--every", "0.1", "--url", url, *more, cwd=ROOT,
        env=clean_environment() | {"POOLGATE_ADMIN_KEY": key}, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()
