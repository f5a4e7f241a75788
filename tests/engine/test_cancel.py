"""A client that leaves: the real engine stops at once, and only what was delivered is charged."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.engine.system import MODEL, Row, System, now
from tests.fakes.processes import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

MESSAGES: list[Any] = [{"role": "user", "content": "Tell a long story."}]
# More than half a minute of work, so that none of these ends by itself before its client leaves.
LONG: dict[str, Any] = {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}
CHUNKS = 6


class Produced:
    """What the engine generated since this was made: the bound of what may be charged."""

    def __init__(self, system: System) -> None:
        self._engine = system.engine
        self._before = self._engine.metric("generation_tokens_total")

    def tokens(self) -> float:
        """Once the engine is at rest again."""
        eventually(self._engine.is_idle)
        return self._engine.metric("generation_tokens_total") - self._before


def is_charged_for_what_it_read(row: Row, *, chunks: int, produced: float) -> None:
    assert row.outcome == "client_gone"
    assert row.prompt_tokens > 0
    assert chunks <= row.completion_tokens <= produced < LONG["max_tokens"]


def chat(client: OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **LONG, **more)


def completion(client: OpenAI, **more: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=["One, two,", "Hello"], stream=True, **LONG, **more)


@pytest.mark.parametrize(
    ("ask", "more"),
    [
        pytest.param(chat, {}, id="chat"),
        pytest.param(chat, {"stream_options": {"include_usage": True}}, id="chat with usage"),
        pytest.param(chat, {"n": 2}, id="two answers"),
        pytest.param(completion, {}, id="two prompts"),
        pytest.param(completion, {"n": 2}, id="two prompts with two answers each"),
    ],
)
def test_a_closed_stream_stops_the_engine_and_costs_what_was_read(
    client: OpenAI, system: System, ask: Callable[..., Any], more: dict[str, Any]
) -> None:
    produced, begun = Produced(system), now()
    read = 0
    with ask(client, **more) as stream:
        for chunk in stream:
            choice = chunk.choices[0]
            read += bool(choice.text if hasattr(choice, "text") else choice.delta.content)
            if read == CHUNKS:
                break
    is_charged_for_what_it_read(system.row(begun), chunks=CHUNKS, produced=produced.tokens())


async def test_a_cancelled_task_stops_the_engine_and_costs_what_was_read(
    async_client: AsyncOpenAI, system: System
) -> None:
    produced, begun = await asyncio.to_thread(Produced, system), now()
    read = asyncio.Semaphore(0)

    async def reading() -> None:
        stream = await async_client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, **LONG
        )
        async with stream:
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    read.release()

    task = asyncio.create_task(reading())
    for _ in range(CHUNKS):
        await read.acquire()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    row = await asyncio.to_thread(system.row, begun)
    is_charged_for_what_it_read(row, chunks=CHUNKS, produced=await asyncio.to_thread(produced.tokens))


def test_a_closed_response_stream_is_charged_by_estimate(client: OpenAI, system: System) -> None:
    """vLLM tells nothing of a response's tokens before its last event."""
    produced, begun = Produced(system), now()
    read = 0
    with client.responses.create(
        model=MODEL, input="Tell a long story.", max_output_tokens=4000, stream=True
    ) as stream:
        for event in stream:
            read += event.type == "response.output_text.delta"
            if read == CHUNKS:
                break
    row = system.row(begun)
    assert (row.outcome, row.estimated) == ("client_gone", True)
    assert row.completion_tokens > 0
    assert produced.tokens() < 4000


def test_who_leaves_before_a_whole_answer_pays_nothing_and_the_engine_stops(
    client: OpenAI, system: System
) -> None:
    produced, begun = Produced(system), now()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1.0).chat.completions.create(model=MODEL, messages=MESSAGES, **LONG)
    row = system.row(begun)
    assert (row.outcome, row.tokens, row.amount_nano) == ("client_gone", (0, 0), 0)
    assert produced.tokens() < LONG["max_tokens"]
