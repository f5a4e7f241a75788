"""`/v1/complete` and `/v1/complete/stream` with a real model, in the marketplace contract's shapes."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.engine.system import MODEL, System, now

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture
async def http(system: System) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(system.base_url, headers=system.headers) as opened:
        yield opened


async def test_a_completion_has_the_contracts_fields(http: aiohttp.ClientSession, system: System) -> None:
    begun = now()
    body = {"model": MODEL, "prompt": "Where is the Eiffel tower?", "max_tokens": 8}
    async with http.post("/v1/complete", json=body) as response:
        assert response.status == 200
        answer = await response.json()
        assert answer["id"] == response.headers["x-request-id"]
    assert answer.keys() == {"id", "model", "choices", "usage", "cost_halala", "latency_ms"}
    (choice,) = answer["choices"]
    assert choice.keys() == {"index", "text", "finish_reason"}
    assert choice["text"]
    assert choice["finish_reason"] in ("stop", "length")
    row = await asyncio.to_thread(system.row, begun)
    assert (row.surface, row.outcome, row.stream, row.estimated) == ("/v1/complete", "finished", False, False)
    assert row.tokens == (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])
    assert answer["cost_halala"] >= 1


async def test_a_streamed_completion_ends_with_usage_cost_and_done(
    http: aiohttp.ClientSession, system: System
) -> None:
    begun = now()
    body = {"model": MODEL, "prompt": "Where is the Eiffel tower?", "max_tokens": 8}
    async with http.post("/v1/complete/stream", json=body) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        *events, last, done = events_of(await response.text())
    assert done == "[DONE]"
    assert events
    assert all(event.keys() == {"text", "index"} for event in events)
    assert last.keys() == {"finish_reason", "usage", "cost_halala"}
    row = await asyncio.to_thread(system.row, begun)
    assert (row.surface, row.outcome, row.stream) == ("/v1/complete/stream", "finished", True)
    assert row.tokens == (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"])
    assert len(events) <= row.completion_tokens <= 8


async def test_what_the_contract_refuses_reaches_no_engine(
    http: aiohttp.ClientSession, system: System
) -> None:
    begun = now()
    for body in ({"model": MODEL}, {"model": MODEL, "prompt": "Hi", "max_tokens": 5000}):
        async with http.post("/v1/complete", json=body) as response:
            assert response.status == 400
    assert await asyncio.to_thread(system.rows_so_far, begun) == []


def events_of(text: str) -> list[Any]:
    """The events of a stream, decoded; the last one is not JSON."""
    lines = [event.removeprefix("data: ") for event in text.split("\n\n") if event.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
