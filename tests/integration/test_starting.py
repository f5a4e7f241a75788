"""Models that nobody serves and a node has on disk: a node is asked to load one, and turns wait for that within a bound."""

import asyncio
import dataclasses
import uuid
from typing import Any

import pytest

from nodes.heartbeats import NodeStore
from nodes.protocol import EngineReport, Heartbeat, ModelInfo
from nodes.wishes import WishStore
from tests.gateways import MODEL, TestGateway, running_gateway
from tests.waiting import eventually

pytest_plugins = ["tests.fakes.engine_fixtures"]

PATH = "/v1/chat/completions"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
NODE = str(uuid.UUID(int=7))


async def beat(
    gateway: TestGateway, *engines: EngineReport, node: str = NODE, models: tuple[str, ...] = (MODEL,)
) -> Any:
    """What the node's agent is answered."""
    told = Heartbeat(api_key=gateway.key, node_id=node, engines=engines, cached_models=models)
    reply = await gateway.http.post(gateway.url + "/api/providers/heartbeat", json=told.to_json())
    assert reply.status == 200
    return await reply.json()


def ready(url: str) -> EngineReport:
    return EngineReport(
        engine_id="e0", url=url, state="ready", models=(ModelInfo(id=MODEL, context_length=2048),)
    )


@pytest.fixture
async def gateway(settings: Any, pool: Any) -> Any:
    settings = dataclasses.replace(settings, model_start_wait_s=30.0)
    async with running_gateway(settings, pool, scopes=("inference", "node")) as running:
        yield running


async def until_cached(gateway: TestGateway) -> None:
    await eventually(lambda: MODEL in gateway.gateway.registry.snapshot.cached)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_turn_starts_the_model_on_a_node_that_has_it_and_waits_for_it(gateway, engine, stream):
    assert (await beat(gateway))["preload_model"] is None
    await until_cached(gateway)
    asked = asyncio.create_task(gateway.post(PATH, CHAT | {"stream": stream}))

    async def is_wished() -> bool:
        return (await beat(gateway))["preload_model"] == {"model_name": MODEL, "status": "downloading"}

    await eventually(is_wished)
    assert not asked.done()
    assert (await beat(gateway, ready(engine.url)))["preload_model"] is None, "it is loaded"
    reply = await asked
    assert reply.status == 200
    await reply.read()
    (record,) = await gateway.settled(1)
    assert (record.outcome, record.node_id) == ("finished", NODE)


async def test_one_node_is_asked_however_many_turns_wait_and_two_have_it(gateway, pool):
    other = str(uuid.UUID(int=8))
    await beat(gateway)
    await beat(gateway, node=other)
    await eventually(lambda: gateway.gateway.registry.snapshot.cached.get(MODEL) == (NODE, other))
    asked = [asyncio.create_task(gateway.post(PATH, CHAT)) for _ in range(5)]
    await eventually(lambda: pool.fetchval("select count(*) from model_wishes"))
    wishes = WishStore(pool)
    assert {await wishes.wish(MODEL, [NODE, other]) for _ in range(3)} == {NODE}
    assert await pool.fetchval("select count(*) from model_wishes") == 1
    await NodeStore(pool).expire(await pool.fetchval("select clock_timestamp() + interval '1 hour'"))
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


async def test_past_its_bound_a_turn_gets_503_and_nothing_was_held(settings, pool):
    settings = dataclasses.replace(settings, model_start_wait_s=0.1)
    async with running_gateway(settings, pool, scopes=("inference", "node")) as gateway:
        await beat(gateway)
        await until_cached(gateway)
        reply = await gateway.post(PATH, CHAT)
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert (await reply.json())["error"]["code"] == "no_node_available"
        assert gateway.records == []
        metrics = (await (await gateway.http.get(gateway.url + "/metrics")).read()).decode()
        assert 'poolgate_model_starts_total{result="expired"} 1.0' in metrics


async def test_no_more_turns_wait_than_may(settings, pool):
    settings = dataclasses.replace(settings, model_start_waiting_max=0)
    async with running_gateway(settings, pool, scopes=("inference", "node")) as gateway:
        await beat(gateway)
        await until_cached(gateway)
        assert (await gateway.post(PATH, CHAT)).status == 503


async def test_a_model_that_no_node_has_is_not_waited_for(gateway):
    await beat(gateway, models=("another",))
    await eventually(lambda: "another" in gateway.gateway.registry.snapshot.cached)
    assert (await gateway.post(PATH, CHAT)).status == 503
    assert (await gateway.post(PATH, CHAT | {"model": "another"})).status == 404, "it has no price"
