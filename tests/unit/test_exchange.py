"""One attempt at an engine, event by event: what is counted is what went to the client."""

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest

from billing.limits.headers import NOTHING_TOLD, Told
from config.defaults import Settings
from gateway.relay.downstream import ClientGone
from gateway.relay.exchange import Delivery, stream
from gateway.relay.tap_openai import OpenAITap
from gateway.relay.upstream import UpstreamConnection

EVENT = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}],'
    b'"usage":{"prompt_tokens":9,"total_tokens":%d,"completion_tokens":%d}}\n\n'
)


class Client:
    """Downstream that a test sends away."""

    def __init__(self, *, is_gone: bool = False) -> None:
        self.is_gone = is_gone
        self.is_started = self.is_full = False
        self.got: list[bytes] = []

    def start(self, headers: Mapping[str, str], told: Told) -> None:
        self.is_started = True

    def write(self, data: bytes) -> None:
        assert not self.is_gone
        self.got.append(data)


class Engine(UpstreamConnection):
    """A connection on which a test says what the engine says."""

    def __init__(self) -> None:
        super().__init__(asyncio.get_running_loop())
        self.complete, self.status, self.last_data_s = False, 200, self._loop.time()

    def says(self, count: int) -> None:
        event = EVENT % (9 + count, count)
        if self._sink is None:
            self.on_body(event)
        else:
            self._pass_on(event)


class Turn:
    """A turn that notes that it has begun."""

    request_id, told = "req_1", NOTHING_TOLD

    def __init__(self, begun: list[bool]) -> None:
        self._begun = begun

    def first_event(self) -> None:
        self._begun.append(True)


def delivery(client: Client, tap: OpenAITap, begun: list[bool]) -> Delivery[Turn]:
    return Delivery(tap, cast("Any", client), Turn(begun), lambda _, tokens: tokens.completion, 100)


async def test_events_that_come_after_the_client_left_are_not_counted() -> None:
    engine, client, tap = Engine(), Client(), OpenAITap(wants_usage=False)
    relaying = asyncio.create_task(stream(engine, delivery(client, tap, []), Settings()))
    engine.says(1)
    await asyncio.sleep(0)
    engine.says(2)
    client.is_gone = True
    engine.says(3)  # in the same tick: the handler's cancellation has not come yet
    with pytest.raises(ClientGone):
        await relaying
    assert len(client.got) == tap.tokens.completion == 2


async def test_a_client_that_left_as_the_first_event_came_has_begun_nothing() -> None:
    engine, client, tap, begun = Engine(), Client(is_gone=True), OpenAITap(wants_usage=False), list[bool]()
    engine.says(1)
    with pytest.raises(ClientGone):
        await stream(engine, delivery(client, tap, begun), Settings())
    assert (begun, tap.tokens.prompt, client.is_started) == ([], 0, False)
