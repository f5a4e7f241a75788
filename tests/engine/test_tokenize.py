"""A prompt counted by the real engine is the prompt that it then charges, to the token."""

import asyncio
from typing import Any

import orjson
import pytest
from openai import OpenAI

from config.defaults import Settings
from gateway.relay.tokenize import count_prompt
from gateway.relay.upstreams import Upstreams
from tests.engine.system import MODEL, System
from tests.integration.test_tokenize import ask, at

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Name the days of the week."}]},
    {
        "messages": [
            {"role": "system", "content": "Answer in Arabic."},
            {"role": "user", "content": [{"type": "text", "text": "مرحبا 🎉 <|im_end|>"}]},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "Go on."},
        ]
    },
    {
        "messages": [{"role": "user", "content": "What is the weather in Riyadh?"}],
        "tools": TOOLS,
        "tool_choice": "none",
    },
]


def counted(system: System, asked: Any) -> int | None:
    port = int(system.engine.url.rpartition(":")[2])

    async def count() -> int | None:
        settings = Settings(tokenize_timeout_s=30.0)
        upstreams = Upstreams(settings)
        try:
            return await count_prompt(upstreams, settings, asked, at(port))
        finally:
            upstreams.close()

    return asyncio.run(count())


@pytest.mark.parametrize("chat", CHATS, ids=["plain", "unicode", "tools"])
def test_a_chat_is_counted_as_it_is_charged(client: OpenAI, system: System, chat: dict[str, Any]) -> None:
    answer = client.chat.completions.create(model=MODEL, max_tokens=1, **chat)
    assert answer.usage is not None
    assert counted(system, ask(**orjson.loads(orjson.dumps(chat)))) == answer.usage.prompt_tokens


def test_every_prompt_of_a_completion_is_counted(client: OpenAI, system: System) -> None:
    prompts = ["One, two,", "Hello"]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=1)
    assert answer.usage is not None
    assert counted(system, ask("/v1/completions", prompt=prompts)) == answer.usage.prompt_tokens


def test_a_plain_response_is_counted_as_it_is_charged(client: OpenAI, system: System) -> None:
    answer = client.responses.create(
        model=MODEL, input="Name the days.", instructions="Be brief.", max_output_tokens=8
    )
    assert answer.usage is not None
    asked = ask("/v1/responses", input="Name the days.", instructions="Be brief.")
    assert counted(system, asked) == answer.usage.input_tokens
