"""Requests with an Idempotency-Key through a whole gateway: one turn each, charged once, answered as often as asked."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import asyncpg
import pytest
from openai import AsyncOpenAI

from config.defaults import Settings
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from tests.fakes.engine import FakeEngine
from tests.gateways import MODEL, TestGateway, running_gateway
from tests.waiting import eventually

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 8}
COMPLETE = {"model": MODEL, "prompt": "What is it?", "max_tokens": 8}
PAID = [
    pytest.param("/v1/chat/completions", CHAT, id="chat"),
    pytest.param("/v1/chat/completions", CHAT | {"stream": True}, id="streamed chat"),
    pytest.param("/v1/completions", COMPLETE, id="completion"),
    pytest.param("/v1/responses", {"model": MODEL, "input": "Hi", "max_output_tokens": 8}, id="response"),
    pytest.param(
        "/v1/responses", {"model": MODEL, "input": "Hi", "max_output_tokens": 8, "stream": True},
        id="streamed response",
    ),
    pytest.param("/v1/complete", COMPLETE, id="complete"),
    pytest.param("/v1/complete/stream", COMPLETE, id="streamed complete"),
]  # fmt: skip


@pytest.fixture
async def gw(settings: Settings, pool: asyncpg.Pool) -> AsyncIterator[TestGateway]:
    async with running_gateway(settings, pool) as running:
        yield running


async def ask(
    gw: TestGateway, body: dict[str, Any] = CHAT, path: str = "/v1/chat/completions", *, key: str = "k-1"
) -> tuple[int, Any, bytes]:
    headers = gw.headers | {"idempotency-key": key}
    async with gw.http.post(gw.url + path, json=body, headers=headers) as reply:
        return reply.status, reply.headers, await reply.read()


@pytest.mark.parametrize(("path", "body"), PAID)
async def test_a_repeat_gets_the_first_answer_byte_for_byte_and_costs_nothing(
    gw: TestGateway, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    await gw.register(engine.url)
    status, headers, first = await ask(gw, body, path)
    again_status, again_headers, again = await ask(gw, body, path)
    assert (status, again_status) == (200, 200)
    assert again == first
    assert again_headers["x-request-id"] == headers["x-request-id"]
    assert again_headers["content-type"] == headers["content-type"]
    assert "idempotent-replayed" not in headers
    assert again_headers["idempotent-replayed"] == "true"
    (record,) = gw.records
    assert record.idempotency_key == "k-1"
    assert record.amount_nano > 0
    assert len(await engine.requests()) == 1


async def test_a_turn_whose_client_left_is_charged_in_full_and_its_answer_is_waiting(
    gw: TestGateway, engine: FakeEngine
) -> None:
    await gw.register(engine.url)
    await engine.knobs(pace_ms=20, tokens=30)
    body = CHAT | {"stream": True, "max_tokens": 30, "ignore_eos": True}
    headers = gw.headers | {"idempotency-key": "k-1"}
    async with aiohttp.ClientSession() as http:
        reply = await http.post(gw.url + "/v1/chat/completions", json=body, headers=headers)
        await reply.content.readany()
        reply.close()
    (record,) = await gw.settled(1)
    assert (record.outcome, record.completion_tokens) == ("finished", 30)
    status, headers, again = await until_answered(gw, body)
    assert status == 200
    assert headers["idempotent-replayed"] == "true"
    assert again.endswith(b"data: [DONE]\n\n")
    assert len(gw.records) == 1


async def until_answered(gw: TestGateway, body: dict[str, Any]) -> tuple[int, Any, bytes]:
    """What a client gets that comes back while it is told that the first request still runs."""
    while (found := await ask(gw, body))[0] == 409:
        assert b"idempotency_key_in_use" in found[2]
    return found


async def test_a_client_that_left_before_its_whole_answer_finds_it(
    gw: TestGateway, engine: FakeEngine
) -> None:
    await gw.register(engine.url)
    await engine.knobs(ttft_ms=500)
    asking = asyncio.create_task(ask(gw))
    await eventually(lambda: gw.gateway.lifecycle.in_flight)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    status, headers, _ = await ask(gw)
    assert (status, headers["retry-after"]) == (409, "1")
    await gw.settled(1)
    status, headers, body = await until_answered(gw, CHAT)
    assert (status, headers["idempotent-replayed"]) == (200, "true")
    assert b"chat.completion" in body
    assert len(await engine.requests()) == 1


async def test_a_kept_answer_is_not_for_a_key_that_may_not_use_its_model(
    gw: TestGateway, engine: FakeEngine, pool: asyncpg.Pool
) -> None:
    await gw.register(engine.url)
    await ask(gw)
    _, gw.key = await KeyStore(pool, load_pepper(gw.gateway.settings)).create(
        gw.account_id, prefix="sk-pg-", models=["another"]
    )
    assert (await ask(gw))[0] == 404


async def test_another_body_with_the_key_is_refused(gw: TestGateway, engine: FakeEngine) -> None:
    await gw.register(engine.url)
    await ask(gw)
    status, headers, body = await ask(gw, CHAT | {"max_tokens": 9})
    assert (status, headers["x-should-retry"]) == (409, "false")
    assert b"idempotency_key_reused" in body
    status, _, _ = await ask(gw, CHAT | {"max_tokens": 9}, key="k-2")
    assert status == 200


async def test_a_refused_request_leaves_its_key_free(gw: TestGateway, engine: FakeEngine) -> None:
    await gw.register(engine.url)
    await engine.fault("http_error", status=400)
    assert (await ask(gw))[0] == 400
    status, headers, _ = await ask(gw)
    assert status == 200
    assert "idempotent-replayed" not in headers


async def test_openais_sdk_waits_for_the_first_answer(gw: TestGateway, engine: FakeEngine) -> None:
    await gw.register(engine.url)
    await engine.knobs(ttft_ms=500)

    async def complete(client: AsyncOpenAI) -> Any:
        return await client.chat.completions.create(**CHAT, extra_headers={"Idempotency-Key": "k-1"})  # type: ignore[call-overload]

    async with AsyncOpenAI(base_url=f"{gw.url}/v1", api_key=gw.key, max_retries=10) as client:
        first = asyncio.create_task(complete(client))
        await eventually(lambda: gw.gateway.lifecycle.in_flight)
        again = await complete(client)
        assert again == await first
    assert len(gw.records) == 1


async def test_a_key_that_is_none_is_refused(gw: TestGateway) -> None:
    status, _, body = await ask(gw, key="two words")
    assert status == 400
    assert b"invalid_idempotency_key" in body


async def test_a_keyed_turn_that_a_stop_cuts_is_charged_for_what_went_out_and_not_run_again(
    settings: Settings, pool: asyncpg.Pool, engine: FakeEngine
) -> None:
    await engine.knobs(pace_ms=50, tokens=1000)
    body = CHAT | {"stream": True, "max_tokens": 1000, "ignore_eos": True}
    async with running_gateway(replace(settings, shutdown_grace_s=0.0), pool) as gw:
        await gw.register(engine.url)
        headers = gw.headers | {"idempotency-key": "k-1"}
        async with gw.http.post(gw.url + "/v1/chat/completions", json=body, headers=headers) as reply:
            got = b""
            while got.count(b'"content":') < 3:  # the first has only the role
                got += await reply.content.readany()
            stopping = asyncio.create_task(gw.gateway.stop())
            got += await reply.content.read()
        await stopping
        assert b"The service is restarting" in got
        assert gw.gateway.keyed_turns.in_flight == 0
        (record,) = gw.records
        assert (record.outcome, record.amount_nano > 0) == ("cut", True)
        kept = await pool.fetch("select state, is_answered, answer from idempotency_claims")
        assert [tuple(row) for row in kept] == [("finished", True, None)]


async def test_of_requests_that_race_with_a_key_one_runs(
    gw: TestGateway, engine: FakeEngine, pool: asyncpg.Pool
) -> None:
    await gw.register(engine.url)
    await asyncio.gather(*(ask(gw, key=f"k-{n % 3}") for n in range(30)))
    await eventually(lambda: not gw.gateway.keyed_turns.in_flight)
    assert len(gw.records) == 3
    assert await pool.fetchval("select count(*) from idempotency_claims where is_answered") == 3
