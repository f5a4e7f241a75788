"""What the official SDK raises when a turn can't be had: its own classes, with OpenAI's codes, and nothing charged."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.engine.system import MODEL, System, now

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
TOO_LONG: list[Any] = [{"role": "user", "content": "word " * 9000}]
CASES = [
    pytest.param(
        lambda client: client.embeddings.create(model=MODEL, input="Hello"),
        openai.NotFoundError, "model_not_found", id="embeddings of a model that generates",
    ),
    pytest.param(
        lambda client: client.with_options(api_key="sk-wrong").models.list(),
        openai.AuthenticationError, "invalid_api_key", id="wrong key, models",
    ),
    pytest.param(
        lambda client: client.with_options(api_key="sk-wrong").chat.completions.create(
            model=MODEL, messages=MESSAGES
        ),
        openai.AuthenticationError, "invalid_api_key", id="wrong key, chat",
    ),
    pytest.param(
        lambda client: client.models.retrieve("no-such-model"),
        openai.NotFoundError, "model_not_found", id="unknown model",
    ),
    pytest.param(
        lambda client: client.chat.completions.create(model="no-such-model", messages=MESSAGES),
        openai.NotFoundError, "model_not_found", id="chat with an unknown model",
    ),
    pytest.param(
        lambda client: client.chat.completions.create(model=MODEL, messages=TOO_LONG),
        openai.BadRequestError, "context_length_exceeded", id="too long a prompt",
    ),
    pytest.param(
        lambda client: client.chat.completions.create(model=MODEL, messages=TOO_LONG, stream=True),
        openai.BadRequestError, "context_length_exceeded", id="too long a prompt, streamed",
    ),
    pytest.param(
        lambda client: client.responses.create(model=MODEL, input="word " * 9000),
        openai.BadRequestError, "context_length_exceeded", id="too long an input of a response",
    ),
    pytest.param(
        lambda client: client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100_000),
        openai.BadRequestError, "context_length_exceeded", id="too many tokens asked for",
    ),
    pytest.param(
        lambda client: client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9),
        openai.BadRequestError, "decimal_above_max_value", id="a temperature out of bounds",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "raised", "code"), CASES)
def test_an_error_has_openais_class_and_code(
    client: OpenAI, system: System, ask: Callable[[OpenAI], Any], raised: type[openai.APIStatusError], code: str
) -> None:  # fmt: skip
    begun = now()
    with pytest.raises(raised) as caught:
        ask(client)
    assert caught.value.code == code
    assert (caught.value.request_id or "").startswith("req_")
    charged = [row for row in system.rows_so_far(begun) if row.tokens != (0, 0) or row.amount_nano]
    assert charged == []


@pytest.mark.parametrize(("ask", "raised", "code"), CASES)
async def test_an_error_is_the_same_asynchronously(
    async_client: AsyncOpenAI,
    ask: Callable[[AsyncOpenAI], Awaitable[Any]],
    raised: type[openai.APIStatusError],
    code: str,
) -> None:
    with pytest.raises(raised) as caught:
        await ask(async_client)
    assert caught.value.code == code


async def test_a_refused_turn_leaves_nothing_in_the_engine(async_client: AsyncOpenAI, system: System) -> None:
    before = await asyncio.to_thread(lambda: system.engine.metric("generation_tokens_total"))
    with pytest.raises(openai.BadRequestError):
        await async_client.chat.completions.create(model=MODEL, messages=TOO_LONG)
    engine = await asyncio.to_thread(lambda: system.engine)
    assert await asyncio.to_thread(engine.is_idle)
    assert await asyncio.to_thread(engine.metric, "generation_tokens_total") == before
