"""Turns through a whole gateway: what clients get, what is charged, what becomes of failures."""

import pytest

from tests.gateways import MODEL, running_gateway

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8}


async def test_a_chat_is_answered_and_metered(settings, pool, engine):
    async with running_gateway(settings, pool) as gw:
        await gw.register(engine.url)
        reply = await gw.post("/v1/chat/completions", ASK)
        body = await reply.json()
        assert reply.status == 200, body
        assert body["cost_halala"] >= 0
        record = (await gw.settled(1))[0]
        assert record.completion_tokens == body["usage"]["completion_tokens"]
