"""The only engine dies under its turns: each ends at once with an error, none hangs, and another engine serves."""

import asyncio
import signal
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.engine.system import CHUNK_TIMEOUT_S, MODEL, START_BOUND_S, EngineRow, System, now
from tests.fakes.processes import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MESSAGES: list[Any] = [{"role": "user", "content": "Tell a long story."}]
LONG: dict[str, Any] = {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}
# What a turn may take to end after its engine died: the bound of silence, and room for a loaded machine.
END_BOUND_S = CHUNK_TIMEOUT_S + 20


class Stream:
    """A long streamed chat, read in a task of its own."""

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client
        self.has_begun = asyncio.Event()
        self.chunks = 0
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        stream = await self._client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, **LONG
        )
        async with stream:
            async for chunk in stream:
                self.chunks += bool(chunk.choices[0].delta.content)
                if self.chunks == 3:
                    self.has_begun.set()

    async def error(self) -> BaseException:
        with pytest.raises(openai.APIError) as caught:
            async with asyncio.timeout(END_BOUND_S):
                await self.task
        return caught.value


async def serves_again(system: System, dead: EngineRow) -> None:
    """The agent starts another engine in its place, and the gateway sends turns there."""

    def restarted() -> bool:
        engine = system.engine
        return engine.state == "ready" and engine.restarts == dead.restarts + 1

    await asyncio.to_thread(eventually, restarted, within_s=START_BOUND_S)
    await asyncio.to_thread(eventually, lambda: system.up.chat(MODEL)[0] == 200)
    assert (await asyncio.to_thread(lambda: system.engine.node_id)) == dead.node_id


async def test_a_killed_engine_ends_its_turns_with_errors_and_is_started_again(
    async_client: AsyncOpenAI, system: System
) -> None:
    engine, begun = await asyncio.to_thread(lambda: system.engine), now()
    stream = Stream(async_client)
    await stream.has_begun.wait()
    whole = asyncio.create_task(async_client.chat.completions.create(model=MODEL, messages=MESSAGES, **LONG))
    await asyncio.to_thread(eventually, lambda: engine.metric("num_requests_running") == 2)
    engine.server().kill()

    error = await stream.error()
    assert isinstance(error, openai.APIError)
    assert not isinstance(error, openai.APIConnectionError)
    assert (error.code, error.type) == ("engine_failed", "server_error")
    async with asyncio.timeout(END_BOUND_S):
        with pytest.raises(openai.InternalServerError) as refused:
            await whole
    assert refused.value.code in ("engine_failed", "no_node_available")
    with pytest.raises(openai.InternalServerError) as late:
        async with asyncio.timeout(END_BOUND_S):
            await async_client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4)
    assert late.value.status_code in (502, 503)

    streamed, unanswered, refused_late = await asyncio.to_thread(system.rows, begun, 3)
    assert (streamed.outcome, unanswered.outcome) == ("engine_failed", "engine_failed")
    assert streamed.completion_tokens >= stream.chunks
    assert (unanswered.tokens, refused_late.tokens) == ((0, 0), (0, 0))
    await serves_again(system, engine)


async def test_an_engine_that_is_told_to_end_leaves_no_stream_hanging(
    async_client: AsyncOpenAI, system: System
) -> None:
    """A terminated vLLM can fall silent with its connection open, for as long as its client waits."""
    engine, begun = await asyncio.to_thread(lambda: system.engine), now()
    stream = Stream(async_client)
    await stream.has_begun.wait()
    engine.server().send_signal(signal.SIGTERM)
    error = await stream.error()
    assert isinstance(error, openai.APIError)
    assert error.code in ("engine_failed", "engine_timeout")
    row = await asyncio.to_thread(system.row, begun)
    assert row.outcome == "engine_failed"
    assert stream.chunks <= row.completion_tokens < LONG["max_tokens"]
    await serves_again(system, engine)
