"""The official SDK, asynchronous: many turns at once, each metered, and what leaves before its end costs only that."""

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.engine.system import MODEL, System, now

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

MESSAGES: list[Any] = [{"role": "user", "content": "Where is the Eiffel tower?"}]


async def test_chats_whole_and_streamed(async_client: AsyncOpenAI, system: System) -> None:
    begun = now()
    raw = await async_client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, max_tokens=8
    )
    whole = raw.parse()
    assert raw.headers["x-request-id"].startswith("req_")
    assert whole.choices[0].message.content
    stream = await async_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    async with stream:
        *chunks, last = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    usages = (whole.usage, last.usage)
    rows = await asyncio.to_thread(system.rows, begun, 2)
    assert [row.tokens for row in rows] == [
        (usage.prompt_tokens, usage.completion_tokens) for usage in usages if usage is not None
    ]


async def test_models_completions_and_responses(async_client: AsyncOpenAI) -> None:
    assert MODEL in [model.id async for model in async_client.models.list()]
    completion = await async_client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4)
    assert completion.choices[0].text
    stream = await async_client.responses.create(
        model=MODEL, input="Say hello.", max_output_tokens=6, stream=True
    )
    async with stream:
        events = [event.type async for event in stream]
    assert (events[0], events[-1]) == ("response.created", "response.completed")


async def test_sixteen_chats_at_once_are_all_answered_and_metered(
    async_client: AsyncOpenAI, system: System
) -> None:
    async def chat(number: int) -> tuple[int, int]:
        messages: list[Any] = [{"role": "user", "content": f"Say the number {number}."}]
        asked: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 16}
        if number % 2:
            usage = (await async_client.chat.completions.create(**asked)).usage
        else:
            stream = await async_client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
            async with stream:
                usage = [chunk async for chunk in stream][-1].usage
        return usage.prompt_tokens, usage.completion_tokens

    begun = now()
    counted = await asyncio.gather(*(chat(number) for number in range(16)))
    rows = await asyncio.to_thread(system.rows, begun, 16)
    assert {row.outcome for row in rows} == {"finished"}
    assert sorted(row.tokens for row in rows) == sorted(counted)
