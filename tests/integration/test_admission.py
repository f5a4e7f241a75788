"""What a turn is let in with: a bounded hold, a clamped limit, budgets, rate limits; and what clients are told of it."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from multidict import CIMultiDictProxy

from billing.budgets import BudgetStore
from billing.usage import UsageRecord
from gateway.admission import CLAMPED
from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from gateway.turn import Ask
from nodes.routing.snapshot import Engine
from tests.gateways import MODEL, TestGateway, running_gateway
from tests.waiting import eventually

COMPLETION_NANO = 40  # a token of the model in the packaged price book
PROMPT_NANO = 20
SAY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello."}]}


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    async with running_gateway(settings, pool) as running:
        yield running


async def poor(gw: TestGateway, balance_nano: int) -> int:
    """Let the gateway's client be a new account with so much; its id."""
    account = await AccountStore(gw.pool).create(f"poor-{balance_nano}", balance_nano=balance_nano)
    gw.key_row, gw.key = await KeyStore(gw.pool, load_pepper(gw.gateway.settings)).create(
        account.id, prefix="sk-pg-"
    )
    return account.id


async def say(gw: TestGateway, **changes: Any) -> tuple[int, CIMultiDictProxy[str], dict[str, Any]]:
    async with await gw.post("/v1/chat/completions", SAY | changes) as reply:
        return reply.status, reply.headers, json.loads(await reply.read())


async def test_a_large_ceiling_does_not_block_a_small_wallet_the_limit_is_clamped_and_said(gw, engine):
    await engine.knobs(tokens=20_000)
    await gw.register(engine.url, context_length=131_072)
    await poor(gw, 100_000)  # buys 2,500 output tokens of the 131,072 that the model could write
    status, headers, body = await say(gw)
    clamp = int(headers[CLAMPED])
    assert status == 200
    assert 500 < clamp < 2_500
    assert body["usage"]["completion_tokens"] == clamp
    assert body["choices"][0]["finish_reason"] == "length"


async def test_a_clamped_limit_is_none_that_an_engine_refuses(gw, engine):
    """The context of the largest engine makes the bound, and the smallest one may get the turn."""
    await gw.register(engine.url, context_length=2_048)  # as it is
    await gw.register("http://127.0.0.1:9", context_length=1_000_000)
    await poor(gw, 1_000_000)  # buys 25,000 output tokens of the 1,000,000
    status, headers, body = await say(gw)
    assert (status, headers[CLAMPED]) == (200, "2048"), body


async def test_a_limit_is_not_clamped_below_the_least_that_is_wanted(gw, engine):
    await gw.register(engine.url)
    await poor(gw, 100_000)
    assert (await say(gw, min_tokens=3_000))[0] == 402
    assert not await engine.requests()
    status, headers, _ = await say(gw, min_tokens=1_500)  # half of the wallet would buy less
    assert status == 200
    assert int(headers[CLAMPED]) >= 1_500


async def test_only_an_engine_that_may_get_the_turn_counts_its_prompt(gw, engine):
    theirs = await AccountStore(gw.pool).create("theirs", is_provider=True)
    await gw.register("http://127.0.0.1:9", account_id=theirs.id)
    await gw.register(engine.url)
    admission, asked = gw.gateway.lifecycle._admission, []
    count_prompt = admission._count_prompt

    async def noted(ask: Ask, by: Engine) -> int | None:
        asked.append(by.account_id)
        return await count_prompt(ask, by)

    admission._count_prompt = noted
    await poor(gw, 60_000)
    long = [{"role": "user", "content": "many words " * 400}]
    assert (await say(gw, messages=long, max_tokens=8, provider_id=gw.account_id))[0] == 200
    assert (await say(gw, messages=long, max_tokens=8, provider_id=theirs.id))[0] == 402
    assert asked == [gw.account_id, theirs.id]


async def test_a_wallet_that_buys_next_to_nothing_is_402_in_openai_s_words(gw, engine):
    await gw.register(engine.url)
    await poor(gw, 5 * COMPLETION_NANO)
    status, headers, body = await say(gw)
    assert (status, body["error"]["type"], body["error"]["code"]) == (
        402,
        "insufficient_quota",
        "insufficient_quota",
    )
    assert CLAMPED not in headers
    assert headers["x-request-id"].startswith("req_")
    assert not await engine.requests()


async def test_a_named_limit_is_not_clamped_but_refused(gw, engine):
    await gw.register(engine.url)
    await poor(gw, 100_000)
    assert (await say(gw, max_tokens=100_000))[0] == 402
    assert (await say(gw, max_tokens=100))[0] == 200


async def test_a_prompt_that_only_its_bytes_make_too_dear_is_counted_by_an_engine(gw, engine):
    await gw.register(engine.url)
    text = "many words " * 400  # 4,400 bytes, about a fourth of that in tokens
    await poor(gw, 60_000)  # less than 4,400 x 20, more than a fourth of it
    status, _, body = await say(gw, messages=[{"role": "user", "content": text}], max_tokens=8)
    assert status == 200, body
    assert body["usage"]["prompt_tokens"] < 1_500
    record = (await gw.settled(1))[0]
    assert record.loss_nano == 0


async def test_a_budget_stops_its_key_and_its_raise_lets_it_go_on(gw, engine):
    await gw.register(engine.url)
    account_id = await poor(gw, 10**9)
    budgets = BudgetStore(gw.pool)
    await budgets.set(account_id, gw.key_row.id, "day", 60_000)
    assert (await say(gw, max_tokens=8))[0] == 200
    status, _, body = await say(gw, max_tokens=2_000)
    assert (status, body["error"]["code"]) == (402, "insufficient_quota")
    assert "budget" in body["error"]["message"]
    await budgets.set(account_id, gw.key_row.id, "day", 10**9)

    async def goes_on() -> bool:
        return (await say(gw, max_tokens=2_000))[0] == 200

    await eventually(goes_on)


async def test_limits_are_told_on_every_answer_and_kept(gw, engine):
    await gw.register(engine.url)
    await gw.pool.execute(
        'update api_keys set limits = \'{"requests_minute": 3, "tokens_minute": 100000}\' where id = $1',
        gw.key_row.id,
    )
    seen = []
    for _ in range(3):
        status, headers, _ = await say(gw, max_tokens=4)
        seen.append(
            (status, headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"])
        )
    assert seen == [(200, "3", "2"), (200, "3", "1"), (200, "3", "0")]
    status, headers, body = await say(gw, max_tokens=4)
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(headers["retry-after"]) <= 60
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-ratelimit-limit-tokens" in headers
    assert all(
        name in headers for name in ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")
    )


async def test_limits_are_told_on_streams_and_on_errors_too(gw, engine):
    await gw.register(engine.url)
    await gw.pool.execute(
        "update api_keys set limits = '{\"requests_minute\": 50}' where id = $1", gw.key_row.id
    )
    async with await gw.post("/v1/chat/completions", SAY | {"stream": True, "max_tokens": 4}) as reply:
        assert reply.headers["x-ratelimit-limit-requests"] == "50"
        await reply.read()
    await engine.knobs(faults=[{"kind": "http_error", "status": 400}])
    status, headers, _ = await say(gw, max_tokens=4)
    assert (status, headers["x-ratelimit-limit-requests"]) == (400, "50")


async def test_an_engine_that_writes_more_than_was_asked_for_is_paid_from_the_lease_while_it_has_room(
    gw, engine
):
    await engine.knobs(replay="chat_stream_usage_continuous")  # longer than the limit below
    await gw.register(engine.url)
    record = await overrun(gw)
    assert record.outcome == "finished"
    assert record.completion_tokens > 2
    assert (
        record.amount_nano == record.prompt_tokens * PROMPT_NANO + record.completion_tokens * COMPLETION_NANO
    )
    assert record.loss_nano == 0


async def test_an_engine_that_writes_more_than_the_wallet_has_is_cut_and_the_loss_is_the_platform_s(
    gw, engine
):
    await engine.knobs(replay="chat_stream_usage_continuous")
    await gw.register(engine.url)
    hold_nano = 1_000_000
    await poor(gw, hold_nano)
    gw.gateway.lifecycle._admission._prices._entries[MODEL] = (replace(
        gw.gateway.lifecycle._admission._prices.price(MODEL, 0), prompt_nano=0, cached_nano=0,
        completion_nano=hold_nano * 10**6 // 2,
    ),)  # fmt: skip
    record = await overrun(gw)
    assert record.outcome == "engine_failed"
    assert record.completion_tokens > 2
    assert record.amount_nano == hold_nano
    assert record.loss_nano > 0


@pytest.mark.parametrize("is_stream", [True, False])
async def test_what_no_request_can_have_used_is_not_paid_for(gw, engine, is_stream):
    await engine.knobs(prompt_tokens=10**9)
    await gw.register(engine.url)
    async with await gw.post("/v1/chat/completions", SAY | {"stream": is_stream, "max_tokens": 8}) as reply:
        await reply.read()
    record = (await gw.settled(1))[0]
    assert record.prompt_tokens < 1_000
    assert (record.amount_nano < 10**5, record.loss_nano) == (True, 0)


async def overrun(gw: TestGateway) -> UsageRecord:
    """What is settled when an engine answers a request for 2 tokens as it likes."""
    async with await gw.post("/v1/chat/completions", SAY | {"stream": True, "max_tokens": 2}) as reply:
        await reply.read()
    return (await gw.settled(1))[-1]


async def test_postgres_gone_is_503_billing_unavailable_and_never_402(gw, engine, monkeypatch):
    await gw.register(engine.url)
    await poor(gw, 10**6)
    assert (await say(gw, max_tokens=10**6))[0] == 402  # the key is known now, and nothing is leased

    class Gone:
        def acquire(self) -> Any:
            raise ConnectionRefusedError

    monkeypatch.setattr(gw.gateway.money.leases._teller, "_pool", Gone())
    status, headers, body = await say(
        gw, max_tokens=20_000
    )  # most of the wallet: no lease of a part would do
    assert (status, body["error"]["code"]) == (503, "billing_unavailable")
    assert int(headers["retry-after"]) >= 1
