"""Prompts counted by an engine: what is asked is what a real one was asked, and nothing waits for one that can't."""

import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from aiohttp import web

from bench.fake_engine.prompts import count_tokens
from config.defaults import Settings
from gateway.relay.tokenize import BODY_BYTES_MAX, PROMPTS_MAX, count_prompt, tokenize_bodies
from gateway.relay.upstreams import Upstreams
from nodes.breaker import Breaker
from nodes.routing.snapshot import Engine
from tests import captures_of
from tests.fakes.engine import FakeEngine
from tests.gateways import MODEL

pytest_plugins = ["tests.fakes.engine_fixtures"]

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@dataclasses.dataclass
class Asked:
    """What of an Ask and of an engine is looked at."""

    body: dict[str, Any]
    engine_path: str = "/v1/chat/completions"
    body_bytes: int = 100


@pytest.fixture
async def upstreams(settings: Settings) -> AsyncIterator[Upstreams]:
    made = Upstreams(settings)
    yield made
    made.close()


def ask(path: str = "/v1/chat/completions", **body: Any) -> Any:
    return Asked({"model": MODEL} | body, path, len(orjson.dumps(body)))


def at(port: int) -> Engine:
    return Engine("node/e0", "node", "e0", 1, "127.0.0.1", port, {}, Breaker(Settings()))


@pytest.mark.parametrize(
    ("capture", "asked"),
    [
        ("tokenize_chat", ask(messages=MESSAGES)),
        ("tokenize_prompt", ask("/v1/completions", prompt="Hello world")),
    ],
)
def test_an_engine_is_asked_what_a_real_one_was(capture: str, asked: Any) -> None:
    exchange = captures_of.load(capture)
    (body,) = tokenize_bodies(asked) or ()
    wanted = json.loads(exchange.request_body)
    wanted.pop("return_token_strs", None)
    assert {name: body[name] for name in wanted} == wanted
    assert json.loads(exchange.body)["count"] > 0


async def test_the_count_is_the_engines(engine: FakeEngine, upstreams: Upstreams, settings: Settings) -> None:
    async def counted(asked: Any) -> int | None:
        return await count_prompt(upstreams, settings, asked, at(engine.port))

    assert await counted(ask("/v1/completions", prompt=["Hello world", "Bye"])) == count_tokens(
        b"Hello world", template=False
    ) + count_tokens(b"Bye", template=False)
    assert await counted(ask("/v1/embeddings", input="Hello world")) == count_tokens(
        b"Hello world", template=False
    )
    chat, response = await counted(ask(messages=MESSAGES)), await counted(ask("/v1/responses", input="Hi"))
    assert chat
    assert response


async def test_an_engine_that_can_not_count_is_not_waited_for(
    engine: FakeEngine, upstreams: Upstreams, settings: Settings
) -> None:
    impatient = dataclasses.replace(settings, tokenize_timeout_s=0.05)
    where = at(engine.port)
    await engine.kill()
    assert await count_prompt(upstreams, impatient, ask(messages=MESSAGES), where) is None


@pytest.mark.parametrize(
    ("status", "text"),
    [(404, "{}"), (200, "no JSON"), (200, "[]"), (200, '{"count":-1}'), (200, '{"count":true}')],
)
async def test_an_answer_without_a_count_counts_for_nothing(
    upstreams: Upstreams, settings: Settings, status: int, text: str
) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text=text)

    app = web.Application()
    app.router.add_post("/tokenize", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        where = at(runner.addresses[0][1])
        assert await count_prompt(upstreams, settings, ask(messages=MESSAGES), where) is None
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    "asked",
    [
        ask("/v1/completions", prompt=[1, 2, 3]),
        ask("/v1/completions", prompt=[[1, 2, 3]]),
        ask("/v1/completions", prompt=["a"] * (PROMPTS_MAX + 1)),
        ask("/v1/responses", input=[{"role": "user", "content": "Hi"}]),
        ask("/v1/responses", input="Hi", tools=[{"type": "function", "name": "f"}]),
    ],
)
def test_what_can_not_be_counted_so_is_not_asked(asked: Any) -> None:
    assert tokenize_bodies(asked) is None


async def test_a_huge_request_is_not_sent_to_be_counted(
    engine: FakeEngine, upstreams: Upstreams, settings: Settings
) -> None:
    asked = ask("/v1/completions", prompt="x" * BODY_BYTES_MAX)
    assert await count_prompt(upstreams, settings, asked, at(engine.port)) is None


def test_what_shapes_a_chats_prompt_goes_along() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    (body,) = (
        tokenize_bodies(
            ask(
                messages=MESSAGES,
                tools=tools,
                reasoning_effort="low",
                add_generation_prompt=False,
                n=3,
                stream=True,
            )
        )
        or ()
    )
    assert body == {
        "model": MODEL, "messages": MESSAGES, "tools": tools, "add_generation_prompt": False,
        "chat_template_kwargs": {"reasoning_effort": "low"},
    }  # fmt: skip


def test_a_plain_response_is_counted_as_the_chat_that_an_engine_makes_of_it() -> None:
    (body,) = tokenize_bodies(ask("/v1/responses", input="Hi", instructions="Be kind.")) or ()
    assert body["messages"] == [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
    ]  # fmt: skip
