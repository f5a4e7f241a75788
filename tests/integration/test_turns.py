"""Turns through a whole gateway: what clients get, what is charged, and what becomes of every way out."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from tests.gateways import MODEL, TestGateway, running_gateway
from tests.waiting import eventually

ASK = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 8,
}
STREAM = ASK | {"stream": True}
WITH_USAGE = STREAM | {"stream_options": {"include_usage": True}}


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    async with running_gateway(settings, pool) as running:
        yield running


def events_of(body: bytes) -> list[Any]:
    """The events of a stream: decoded JSON, "[DONE]", or the comment."""
    events: list[Any] = []
    for event in body.split(b"\n\n"):
        if event.startswith(b"data: {"):
            events.append(json.loads(event[6:]))
        elif event:
            events.append(event.removeprefix(b"data: ").decode())
    return events


def text_of(events: list[Any]) -> str:
    chunks = [event for event in events if isinstance(event, dict) and event.get("choices")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


async def stream(
    gw: TestGateway, body: dict[str, Any] = STREAM, path: str = "/v1/chat/completions"
) -> tuple[int, Any]:
    async with await gw.post(path, body) as reply:
        return reply.status, events_of(await reply.read())


# --- answers and their metering -----------------------------------------------------------------------------------


async def test_a_chat_is_answered_and_metered(gw, engine):
    await gw.register(engine.url)
    async with await gw.post("/v1/chat/completions", ASK) as reply:
        body = await reply.json()
    record = (await gw.settled(1))[0]
    sent = (await engine.requests())[0]
    assert reply.status == 200
    assert record.completion_tokens == body["usage"]["completion_tokens"] == sent["completion_tokens"]
    assert record.prompt_tokens == body["usage"]["prompt_tokens"]
    assert (record.outcome, record.status, record.estimated) == ("finished", 200, False)
    assert body["id"] == f"chatcmpl-{reply.headers['x-request-id']}"


async def test_a_usage_row_is_written_and_its_account_charged(gw, engine, pool):
    await gw.register(engine.url)
    await stream(gw, STREAM | {"max_tokens": 100, "ignore_eos": True})
    record = (await gw.settled(1))[0]
    assert record.amount_nano > 0
    await eventually(lambda: gw.gateway.money.journal.pending == 0)
    row = await pool.fetchrow("select * from usage")
    assert (row["turn_id"].hex, row["completion_tokens"], row["amount_nano"]) == (
        record.turn_id,
        100,
        record.amount_nano,
    )
    wallet = await pool.fetchval(
        "select credit_nano - debit_nano from ledger_accounts where kind = 'wallet' and owner_id = $1",
        gw.account_id,
    )
    assert wallet == 100 * 10**9 - record.amount_nano


async def test_usage_that_was_not_asked_for_is_stripped_and_still_counted(gw, engine):
    await gw.register(engine.url)
    status, events = await stream(gw)
    assert status == 200
    assert all("usage" not in event for event in events if isinstance(event, dict))
    assert events[-1] == "[DONE]"
    record = (await gw.settled(1))[0]
    assert record.completion_tokens == (await engine.requests())[0]["completion_tokens"] > 0


async def test_usage_that_was_asked_for_comes_with_its_cost(gw, engine):
    await gw.register(engine.url)
    _, events = await stream(gw, WITH_USAGE)
    assert [event for event in events if isinstance(event, dict) and "usage" in event] == [events[-2]]
    record = (await gw.settled(1))[0]
    assert events[-2]["usage"]["completion_tokens"] == record.completion_tokens
    assert events[-2]["cost_halala"] == -(-record.amount_nano // 10**7)


@pytest.mark.parametrize("knobs", [{"merge": 5}, {"textless_every": 3}, {"merge": 3, "textless_every": 2}])
async def test_events_are_not_tokens_and_tokens_are_what_is_counted(gw, engines, knobs):
    engine = await engines(**knobs)
    await gw.register(engine.url)
    _, events = await stream(gw, STREAM | {"max_tokens": 30, "ignore_eos": True})
    assert len([event for event in events if isinstance(event, dict)]) < 31
    assert (await gw.settled(1))[0].completion_tokens == 30


async def test_several_answers_in_one_stream_are_counted_together(gw, engine):
    await gw.register(engine.url)
    await stream(gw, STREAM | {"n": 3, "ignore_eos": True})
    record = (await gw.settled(1))[0]
    assert record.completion_tokens == 24
    assert record.prompt_tokens == (await engine.requests())[0]["prompt_tokens"]


async def test_a_cut_stream_of_several_answers_charges_what_each_delivered(gw, engines):
    engine = await engines(pace_ms=5)
    await gw.register(engine.url)
    body = STREAM | {"n": 2, "max_tokens": 500, "ignore_eos": True}
    async with await gw.post("/v1/chat/completions", body) as reply:
        await read_events(reply, 20)
        reply.close()
    record = (await gw.settled(1))[0]
    sent = (await engine.until(lambda record: record["requests"][0]["aborted"]))["requests"][0]
    assert 10 <= record.completion_tokens <= sent["completion_tokens"]
    assert record.prompt_tokens == sent["prompt_tokens"]


async def test_cached_prompt_tokens_are_recorded(gw, engines):
    engine = await engines("--prompt-tokens-details", "--block-size", "16")
    await gw.register(engine.url)
    long = ASK | {"messages": [{"role": "user", "content": "word " * 500}]}
    for _ in range(2):
        async with await gw.post("/v1/chat/completions", long) as reply:
            assert reply.status == 200
    first, second = await gw.settled(2)
    assert first.cached_tokens == 0
    assert 0 < second.cached_tokens <= second.prompt_tokens
    assert second.amount_nano < first.amount_nano


async def test_an_engine_that_reports_no_usage_is_counted_by_tokenizer(gw, engine):
    await gw.register(engine.url)
    await engine.knobs(replay="chat_stream_nousage")
    _, events = await stream(gw, STREAM | {"max_tokens": 64})
    record = (await gw.settled(1))[0]
    assert record.estimated
    assert record.prompt_tokens > 0
    assert abs(record.completion_tokens - 32) <= 8, text_of(events)


async def test_completions_with_several_prompts_are_metered(gw, engine):
    await gw.register(engine.url)
    body = {"model": MODEL, "prompt": ["One", "Two"], "max_tokens": 4, "ignore_eos": True, "stream": True}
    status, _ = await stream(gw, body, "/v1/completions")
    record = (await gw.settled(1))[0]
    assert (status, record.completion_tokens) == (200, 8)


async def test_embeddings_come_from_a_pooling_engine_and_charge_the_prompt(gw, engines):
    engine = await engines("--pooling")
    await gw.register(engine.url, kind="pooling")
    async with await gw.post("/v1/embeddings", {"model": MODEL, "input": "hello"}) as reply:
        body = await reply.json()
    record = (await gw.settled(1))[0]
    assert reply.status == 200
    assert body["data"][0]["embedding"]
    assert (record.prompt_tokens, record.completion_tokens) == (body["usage"]["prompt_tokens"], 0)


async def test_responses_stream_ends_at_completed_and_is_metered(gw, engine):
    await gw.register(engine.url)
    body = {"model": MODEL, "input": "hello", "stream": True, "max_output_tokens": 6}
    async with await gw.post("/v1/responses", body) as reply:
        raw = await reply.read()
    last = [event for event in raw.split(b"\n\n") if event][-1]
    assert last.startswith(b"event: response.completed")
    record = (await gw.settled(1))[0]
    assert record.completion_tokens == (await engine.requests())[0]["completion_tokens"] > 0
    assert not record.estimated


async def test_a_cut_responses_stream_is_charged_by_estimate(gw, engines):
    engine = await engines(pace_ms=5)
    await gw.register(engine.url)
    body = {"model": MODEL, "input": "hello", "stream": True, "max_output_tokens": 900}
    await engine.knobs(tokens=900)
    async with await gw.post("/v1/responses", body) as reply:
        await read_events(reply, 20)
        reply.close()
    record = (await gw.settled(1))[0]
    assert record.estimated
    assert record.completion_tokens > 0
    assert record.prompt_tokens > 0


async def test_the_estimate_of_a_cut_responses_stream_has_its_instructions_and_tools(gw, engines):
    engine = await engines(pace_ms=5, tokens=900)
    await gw.register(engine.url)
    tool = {"type": "function", "name": "look", "description": "words " * 200, "parameters": {}}
    body = {
        "model": MODEL, "input": "hello", "instructions": "words " * 300, "tools": [tool], "stream": True,
        "max_output_tokens": 900,
    }  # fmt: skip
    async with await gw.post("/v1/responses", body) as reply:
        await read_events(reply, 20)
        reply.close()
    assert (await gw.settled(1))[0].prompt_tokens >= 500


async def test_an_estimate_above_the_limit_neither_cuts_a_stream_nor_is_charged(gw, engines):
    """One token of the engine is seven of the tokenizer that estimates."""
    engine = await engines(answer=["தமிழ்"] * 40, pace_ms=5)
    await gw.register(engine.url)
    account = await AccountStore(gw.pool).create("poor", balance_nano=40_000)  # no room beyond the hold
    _, gw.key = await KeyStore(gw.pool, load_pepper(gw.gateway.settings)).create(account.id, prefix="sk-pg-")
    body = {"model": MODEL, "input": "hello", "stream": True, "max_output_tokens": 40, "ignore_eos": True}
    async with await gw.post("/v1/responses", body) as reply:
        raw = await reply.read()
    assert b"event: response.completed" in raw
    async with await gw.post("/v1/responses", body) as reply:
        await read_events(reply, 30)
        reply.close()
    whole, cut = await gw.settled(2)
    assert (whole.outcome, whole.completion_tokens, whole.estimated) == ("finished", 40, False)
    assert (cut.outcome, cut.completion_tokens, cut.estimated) == ("client_gone", 40, True)
    assert cut.loss_nano == 0


# --- /v1/complete --------------------------------------------------------------------------------------------------


async def test_complete_answers_as_the_contract_has_it(gw, engine):
    await gw.register(engine.url)
    async with await gw.post("/v1/complete", {"model": MODEL, "prompt": "Hello", "max_tokens": 5}) as reply:
        body = await reply.json()
    assert reply.status == 200, body
    assert set(body) == {"id", "model", "choices", "usage", "cost_halala", "latency_ms"}
    assert set(body["choices"][0]) == {"index", "text", "finish_reason"}
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 5
    assert (await gw.settled(1))[0].completion_tokens == 5


async def test_complete_stream_sends_text_a_final_event_and_done(gw, engine):
    await gw.register(engine.url)
    status, events = await stream(
        gw, {"model": MODEL, "prompt": "Hello", "max_tokens": 5}, "/v1/complete/stream"
    )
    *deltas, final, done = events
    assert (status, done) == (200, "[DONE]")
    assert all(set(delta) == {"text", "index"} for delta in deltas)
    assert set(final) == {"finish_reason", "usage", "cost_halala"}
    assert final["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["/v1/complete", "/v1/complete/stream"])
async def test_complete_ends_with_timeout_and_what_it_has(settings, pool, engines, path):
    engine = await engines(pace_ms=20)
    async with running_gateway(replace(settings, complete_timeout_s=1.0), pool) as gw:
        await gw.register(engine.url)
        await engine.knobs(tokens=4000)
        async with await gw.post(path, {"model": MODEL, "prompt": "Hello", "max_tokens": 1500}) as reply:
            raw = await reply.read()
        final = json.loads(raw)["choices"][0] if path == "/v1/complete" else events_of(raw)[-2]
        assert final["finish_reason"] == "timeout"
        record = (await gw.settled(1))[0]
        assert 0 < record.completion_tokens < 200
        await engine.until(lambda record: record["requests"][0]["aborted"])


MANY = 100_000
"""Tokens of an answer that no chain of socket buffers holds: about 20 MB."""

# --- clients that leave, or do not read ---------------------------------------------------------------------------


async def read_events(reply: Any, count: int) -> bytes:
    raw = b""
    while raw.count(b"\n\n") < count:
        raw += await reply.content.readany()
    return raw


async def test_a_client_that_leaves_stops_the_engine_and_pays_for_what_it_got(gw, engines):
    engine = await engines(pace_ms=10)
    await gw.register(engine.url)
    async with await gw.post(
        "/v1/chat/completions", STREAM | {"max_tokens": 1000, "ignore_eos": True}
    ) as reply:
        raw = await read_events(reply, 11)
        reply.close()
    sent = (await engine.until(lambda record: record["requests"][0]["aborted"]))["requests"][0]
    record = (await gw.settled(1))[0]
    assert record.outcome == "client_gone"
    assert raw.count(b'"content"') - 1 <= record.completion_tokens <= sent["completion_tokens"]
    assert record.prompt_tokens == sent["prompt_tokens"]


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_a_client_that_leaves_before_the_first_event_pays_nothing(gw, engines, body):
    engine = await engines(ttft_ms=60_000)
    await gw.register(engine.url)
    asking = asyncio.create_task(gw.post("/v1/chat/completions", body))
    await engine.until(lambda record: record["requests"])
    asking.cancel()
    record = (await gw.settled(1))[0]
    assert (record.outcome, record.prompt_tokens, record.completion_tokens, record.amount_nano) == (
        "client_gone",
        0,
        0,
        0,
    )
    await engine.until(lambda record: record["requests"][0]["aborted"])
    assert gw.gateway.registry.snapshot.engines[0].load.turns == 0


async def test_the_prompt_of_a_client_that_left_before_its_answer_counts_against_token_limits(gw, engines):
    engine = await engines("--max-model-len", "200000", pace_ms=50, tokens=1000)
    await gw.register(engine.url)
    await gw.pool.execute(
        "update api_keys set limits = '{\"tokens_minute\": 100000}' where id = $1", gw.key_row.id
    )
    asking = asyncio.create_task(
        gw.post("/v1/complete", {"model": MODEL, "prompt": "words " * 2_000, "max_tokens": 1000})
    )
    flights = gw.gateway.lifecycle._dispatcher.flights
    await eventually(lambda: any(flight.turn.first_event_s is not None for flight in flights))
    asking.cancel()
    record = (await gw.settled(1))[0]
    assert (record.outcome, record.amount_nano) == ("client_gone", 0)

    async def is_counted() -> bool:
        async with await gw.post("/v1/complete", {"model": MODEL, "prompt": "Hi", "max_tokens": 1}) as reply:
            return 96_000 < int(reply.headers["x-ratelimit-remaining-tokens"]) < 98_000

    await eventually(is_counted)


async def test_a_client_that_reads_nothing_pauses_the_engine_and_then_goes_on(gw, engines):
    engine = await engines("--max-model-len", "200000")
    await gw.register(engine.url)
    reader, writer = await asyncio.open_connection(*gw.url.removeprefix("http://").split(":"), limit=2**16)
    body = json.dumps(STREAM | {"max_tokens": MANY, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gw.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    engine_of = gw.gateway.registry.snapshot.engines[0]
    await eventually(lambda: engine_of.load.turns == 1)
    written = -1
    while (now := (await engine.requests())[0]["completion_tokens"]) != written:
        written = now
        await asyncio.sleep(0.3)
    assert written < MANY, "the engine should be waiting for the client"
    total, end = 0, b""
    while not end.endswith(b"0\r\n\r\n"):
        data = await reader.read(2**16)
        assert data
        total += len(data)
        end = (end + data)[-16:]
    writer.close()
    assert total > MANY * 200
    assert (await gw.settled(1))[0].completion_tokens == MANY


async def test_a_client_that_never_reads_is_taken_as_gone(settings, pool, engines):
    engine = await engines("--max-model-len", "200000")
    async with running_gateway(replace(settings, client_stall_s=1.0), pool) as gw:
        await gw.register(engine.url)
        host, port = gw.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, port)
        body = json.dumps(STREAM | {"max_tokens": MANY, "ignore_eos": True}).encode()
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gw.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        record = (await gw.settled(1))[0]
        assert record.outcome == "client_gone"
        await engine.until(lambda record: record["requests"][0]["aborted"])
        writer.close()


# --- engines that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "error_mid", "after": 3},
        {"kind": "no_finish", "after": 3},
        {"kind": "close", "after": 3},
        {"kind": "reset", "after": 3},
        {"kind": "truncated_chunk", "after": 3},
        {"kind": "die", "after": 3},
    ],
    ids=lambda fault: fault["kind"],
)
async def test_a_begun_stream_that_fails_ends_with_an_error_event_and_no_done(gw, engine, fault):
    await gw.register(engine.url)
    await engine.fault(**fault)
    status, events = await stream(gw)
    assert status == 200
    assert events[-1]["error"]["type"] == "server_error"
    assert "[DONE]" not in events
    record = (await gw.settled(1))[0]
    assert record.outcome == "engine_failed"
    assert 0 < record.completion_tokens <= 3
    assert record.amount_nano > 0


async def test_silence_inside_an_answer_is_death(settings, pool, engine):
    async with running_gateway(replace(settings, chunk_timeout_s=0.5), pool) as gw:
        await gw.register(engine.url)
        await engine.fault("stall", after=3)
        _, events = await stream(gw)
        assert events[-1]["error"]["code"] == "engine_timeout"
        await engine.until(lambda record: record["running"] == 0)


async def test_no_first_event_in_time_is_a_504(settings, pool, engine):
    async with running_gateway(replace(settings, first_byte_timeout_s=1.0), pool) as gw:
        await gw.register(engine.url)
        await engine.fault("stall", after=-1)
        status, _ = await stream(gw)
        assert status == 504
        assert (await gw.settled(1))[0].amount_nano == 0


async def test_a_waiting_stream_gets_comments_and_then_an_error_event(settings, pool, engine):
    settings = replace(settings, first_byte_timeout_s=1.0, keepalive_comment_s=0.2)
    async with running_gateway(settings, pool) as gw:
        await gw.register(engine.url)
        await engine.fault("stall", after=-1)
        status, events = await stream(gw)
        assert status == 200
        assert events[0] == ": keep-alive"
        assert events[-1]["error"]["code"] == "engine_timeout"


@pytest.mark.parametrize("kind", ["http_error", "error_first", "garbage", "close", "reset"])
@pytest.mark.parametrize("body", [ASK, STREAM], ids=["whole", "stream"])
async def test_a_turn_with_nothing_sent_goes_to_another_engine(gw, engines, kind, body):
    bad, good = await engines(), await engines()
    await gw.register(bad.url, good.url)
    await bad.fault(kind, after=-1, times=None, status=503)
    turns = 0
    while not await bad.requests():  # which engine is asked first is chance
        turns += 1
        async with await gw.post("/v1/chat/completions", body) as reply:
            assert reply.status == 200, await reply.text()
            await reply.read()
    assert len(await gw.settled(turns)) == turns


async def test_a_4xx_is_never_tried_again_and_moves_no_breaker(gw, engines):
    engine = await engines()
    await gw.register(engine.url)
    for _ in range(5):
        await engine.fault("http_error", status=400, after=-1)
        async with await gw.post("/v1/chat/completions", ASK) as reply:
            assert reply.status == 400
    assert len(await engine.requests()) == 5
    assert not gw.gateway.registry.snapshot.engines[0].breaker.is_open


async def test_a_dead_engine_opens_its_breaker_and_comes_back_by_probes(gw, engine):
    await gw.register(engine.url)
    await engine.kill()
    for _ in range(3):
        async with await gw.post("/v1/chat/completions", ASK) as reply:
            assert reply.status == 503
            assert int(reply.headers["retry-after"]) >= 1
    breaker = gw.gateway.registry.snapshot.engines[0].breaker
    assert breaker.is_open
    await engine.start()
    await eventually(lambda: not breaker.is_open)
    status, _ = await stream(gw)
    assert status == 200


async def test_an_idle_connection_that_the_engine_closed_costs_nobody_a_turn(settings, pool, engines):
    engine = await engines(keep_alive_ms=50)
    async with running_gateway(replace(settings, engine_idle_s=60.0), pool) as gw:
        await gw.register(engine.url)
        for _ in range(10):
            async with await gw.post("/v1/chat/completions", ASK) as reply:
                assert reply.status == 200
                await reply.read()
            await asyncio.sleep(0.05)
        assert gw.gateway.registry.snapshot.engines[0].breaker.failures == 0


@pytest.mark.parametrize("kind", ["drip", "drip_wire"])
async def test_bytes_may_come_in_any_pieces(gw, engine, kind):
    await gw.register(engine.url)
    await engine.fault(kind, gap_ms=0.05)
    status, events = await stream(gw, WITH_USAGE | {"max_tokens": 3})
    assert status == 200
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"]["completion_tokens"] == 3


async def test_an_event_that_never_ends_is_cut_at_its_bound(settings, pool, engine):
    async with running_gateway(replace(settings, event_bytes_max=65536), pool) as gw:
        await gw.register(engine.url)
        await engine.fault("endless_event", after=2)
        _, events = await stream(gw)
        assert events[-1]["error"]["code"] == "engine_failed"
        await engine.until(lambda record: record["running"] == 0)


async def test_an_answer_larger_than_its_bound_is_refused(settings, pool, engine):
    async with running_gateway(replace(settings, answer_bytes_max=65536), pool) as gw:
        await gw.register(engine.url)
        await engine.fault("huge", size_bytes=10**6)
        async with await gw.post("/v1/chat/completions", ASK) as reply:
            assert reply.status == 502


@pytest.mark.parametrize(
    "answer",
    [
        "hello",
        "[]",
        "{}",
        '{"choices":',
        '{"error":{"message":"secret /root/models at 10.0.0.7","code":500}}',
    ],
)
async def test_a_200_without_an_answer_in_it_is_a_failure_that_costs_nothing(gw, answer):
    async def answer_it(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(answer)}\r\n\r\n"
        writer.write((head + answer).encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer_it, "127.0.0.1", 0)
    async with server:
        await gw.register(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with await gw.post("/v1/chat/completions", ASK) as reply:
            text = await reply.text()
    assert reply.status == 502
    assert "secret" not in text
    assert (await gw.settled(1))[0].amount_nano == 0


async def test_one_poisonous_request_does_not_take_a_whole_model_down(gw, engines):
    pool_of = [await engines() for _ in range(3)]
    await gw.register(*(engine.url for engine in pool_of))
    for engine in pool_of:
        await engine.fault("http_error", status=500, after=-1, times=None, contains="poison")
    poison = ASK | {"messages": [{"role": "user", "content": "poison"}]}
    for _ in range(2):
        async with await gw.post("/v1/chat/completions", poison) as reply:
            assert reply.status == 502
    assert not any(engine.breaker.is_open for engine in gw.gateway.registry.snapshot.engines)


async def test_an_answer_that_takes_too_long_is_not_tried_on_every_engine(settings, pool, engines):
    first, second = await engines(ttft_ms=60_000), await engines(ttft_ms=60_000)
    async with running_gateway(replace(settings, answer_timeout_s=1.0), pool) as gw:
        await gw.register(first.url, second.url)
        async with await gw.post("/v1/chat/completions", ASK) as reply:
            assert reply.status == 504
        assert len(await first.requests()) + len(await second.requests()) == 1


@pytest.mark.parametrize("path", ["/v1/complete", "/v1/complete/stream"])
async def test_a_mute_engine_is_not_praised_for_a_time_limit(settings, pool, engine, path):
    async with running_gateway(replace(settings, complete_timeout_s=1.0), pool) as gw:
        await gw.register(engine.url)
        await engine.fault("stall", after=-1)
        async with await gw.post(path, {"model": MODEL, "prompt": "Hello"}) as reply:
            assert "timeout" in await reply.text()
        record = (await gw.settled(1))[0]
        assert (record.outcome, record.amount_nano) == ("timeout", 0)
        assert gw.gateway.registry.snapshot.engines[0].breaker.failures == 1


async def test_comments_of_the_engine_do_not_silence_ours(settings, pool, engines):
    engine = await engines(ttft_ms=1500, sse_keep_alive_ms=50)
    async with running_gateway(replace(settings, keepalive_comment_s=0.3), pool) as gw:
        await gw.register(engine.url)
        _, events = await stream(gw)
        assert events[0] == ": keep-alive"
        assert events[-1] == "[DONE]"


# --- a gateway that stops ------------------------------------------------------------------------------------------


async def test_a_turn_that_outlives_the_grace_is_cut_told_and_charged(settings, pool, engines):
    engine = await engines(pace_ms=20)
    async with running_gateway(replace(settings, shutdown_grace_s=0.3), pool) as gw:
        await gw.register(engine.url)
        body = STREAM | {"max_tokens": 2000, "ignore_eos": True}
        async with await gw.post("/v1/chat/completions", body) as reply:
            raw = await read_events(reply, 5)
            stopping = asyncio.create_task(gw.gateway.stop())
            raw += await reply.read()
            await stopping
        assert events_of(raw)[-1]["error"]["code"] == "service_unavailable"
        record = gw.records[0]
        assert record.outcome == "cut"
        assert record.completion_tokens > 0
        assert await pool.fetchval("select completion_tokens from usage") == record.completion_tokens


async def test_a_turn_cut_before_its_first_event_is_a_503(settings, pool, engines):
    engine = await engines(ttft_ms=60_000)
    async with running_gateway(replace(settings, shutdown_grace_s=0.2), pool) as gw:
        await gw.register(engine.url)
        asking = asyncio.create_task(gw.post("/v1/chat/completions", ASK))
        await engine.until(lambda record: record["requests"])
        await gw.gateway.stop()
        assert (await asking).status == 503
        assert gw.records[0].amount_nano == 0


async def test_a_draining_gateway_takes_no_new_turns_on_old_connections(gw, engines):
    engine = await engines(pace_ms=20)
    await gw.register(engine.url)
    async with await gw.post("/v1/chat/completions", ASK) as reply:
        await reply.read()  # leaves an idle connection behind
    async with await gw.post(
        "/v1/chat/completions", STREAM | {"max_tokens": 50, "ignore_eos": True}
    ) as reply:
        await read_events(reply, 2)
        stopping = asyncio.create_task(gw.gateway.stop())
        await eventually(lambda: gw.gateway.health.is_draining)
        with pytest.raises(aiohttp.ClientConnectionError):
            await gw.post("/v1/chat/completions", ASK)
        assert events_of(await reply.read())[-1] == "[DONE]"
        await stopping


async def test_a_whole_answer_that_nobody_reads_is_bounded_too(settings, pool, engine):
    async with running_gateway(replace(settings, client_stall_s=0.5), pool) as gw:
        await gw.register(engine.url)
        await engine.fault("huge", size_bytes=30 * 10**6, times=None)
        host, port = gw.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, port, limit=2**16)
        body = json.dumps(ASK).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gw.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode()
        for _ in range(5):
            writer.write(head + body)
        await gw.settled(1)
        manager = gw.gateway._runner.server
        await eventually(lambda: not manager.connections)
        assert len(gw.records) == 1, "the second request must wait until the first answer was read"
        writer.close()


# --- who may --------------------------------------------------------------------------------------------------------


async def test_a_key_limited_to_models_sees_and_uses_only_those(settings, pool, engine):
    async with running_gateway(settings, pool, models=["another"]) as gw:
        await gw.register(engine.url)
        async with await gw.post("/v1/chat/completions", ASK) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (404, "model_not_found")
        async with gw.http.get(gw.url + "/v1/models", headers=gw.headers) as reply:
            assert (await reply.json())["data"] == []
        async with gw.http.get(gw.url + "/v1/models") as reply:
            assert MODEL in [entry["id"] for entry in (await reply.json())["data"]]


async def test_an_empty_wallet_is_402_within_a_moment_and_a_topped_up_one_goes_on(gw, engine, pool):
    await gw.register(engine.url)
    accounts = AccountStore(pool)
    poor = await accounts.create("poor")
    _, gw.key = await KeyStore(pool, load_pepper(gw.gateway.settings)).create(poor.id, prefix="sk-pg-")

    async def status() -> int:
        return (await stream(gw))[0]

    assert await status() == 402
    await accounts.credit(poor.id, 10**9)
    async with asyncio.timeout(5):
        while await status() != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_key_without_the_scope_is_403(settings, pool, engine):
    async with running_gateway(settings, pool, scopes=["node"]) as gw:
        await gw.register(engine.url)
        assert (await stream(gw))[0] == 403


@pytest.mark.parametrize("where", ["bearer", "X-API-Key", "x-renter-key", "query"])
async def test_a_key_is_taken_wherever_the_contracts_put_it(gw, engine, where):
    await gw.register(engine.url)
    headers = {"bearer": gw.headers, "query": {}}.get(where, {where: gw.key})
    query = f"?key={gw.key}" if where == "query" else ""
    async with gw.http.post(f"{gw.url}/v1/chat/completions{query}", json=ASK, headers=headers) as reply:
        assert reply.status == 200


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer sk-wrong"}, {"authorization": "Basic abc"}]
)
async def test_no_key_and_a_wrong_key_are_401(gw, headers):
    async with gw.http.post(gw.url + "/v1/chat/completions", json=ASK, headers=headers) as reply:
        body = await reply.json()
    assert (reply.status, body["error"]["code"]) == (401, "invalid_api_key")
    assert reply.headers["x-request-id"].startswith("req_")


async def test_a_model_in_the_book_that_no_node_serves_is_503(gw):
    async with await gw.post("/v1/chat/completions", ASK) as reply:
        assert reply.status == 503
        assert reply.headers["retry-after"]


async def test_a_turn_can_be_pinned_to_a_provider(gw, engine):
    await gw.register(engine.url)
    async with await gw.post("/v1/chat/completions", ASK | {"provider_id": gw.account_id}) as reply:
        assert reply.status == 200
    async with await gw.post("/v1/chat/completions", ASK | {"provider_id": gw.account_id + 999}) as reply:
        assert reply.status == 503
    assert "provider_id" not in json.dumps(await engine.requests())
