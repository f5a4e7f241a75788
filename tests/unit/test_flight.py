"""One attempt at an engine, event by event: what is counted is what went to the client."""

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest

from billing.holds import Bound
from billing.lease_account import Hold
from billing.limits.headers import NOTHING_TOLD, Told
from billing.limits.limiter import UNLIMITED
from billing.prices import Price
from config.defaults import Settings
from gateway.flight import Flight, StreamFlight
from gateway.identity.keyring import Principal
from gateway.relay.downstream import ClientGone
from gateway.relay.events import Tokens
from gateway.relay.faults import EngineFault
from gateway.relay.tap_openai import OpenAITap
from gateway.relay.upstream import UpstreamConnection
from gateway.turn import NO_TOKENS, Ask, Turn, new_request_id
from nodes.breaker import Breaker
from nodes.routing.snapshot import Engine
from tests.waiting import eventually

EVENT = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}],'
    b'"usage":{"prompt_tokens":9,"total_tokens":%d,"completion_tokens":%d}}\n\n'
)
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Client:
    """Downstream that a test sends away, or lets wait."""

    def __init__(self, *, is_gone: bool = False) -> None:
        self.is_gone = is_gone
        self.is_started = self.is_full = False
        self.got: list[bytes] = []
        self.has_read = asyncio.Event()

    def start(self, headers: Mapping[str, str], told: Told) -> None:
        self.is_started = True

    def write(self, data: bytes) -> None:
        assert not self.is_gone
        self.got.append(data)

    async def drained(self) -> None:
        await self.has_read.wait()
        if self.is_gone:
            raise ClientGone


class Wire:
    """A transport that goes nowhere."""

    is_reading = True

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True


def engine() -> Engine:
    return Engine(
        key="e", node_id="n", engine_id="e0", account_id=1, host="127.0.0.1", port=1, models={},
        breaker=Breaker(Settings()),
    )  # fmt: skip


def turn() -> Turn:
    """A stream's, with room for a hundred tokens."""
    ask = Ask(
        "chat", "/v1/chat/completions", "generate", {}, 0, is_stream=True, tap=lambda: OpenAITap(wants_usage=False)
    )  # fmt: skip
    bound = Bound(
        prompt_tokens=100, output_tokens=100, choices=1, is_limited=True, has_media=False, usual_prompt_tokens=100
    )  # fmt: skip
    return Turn(
        request_id=new_request_id(), principal=Principal(1, 1, "a", frozenset(), None), ask=ask, model="m",
        price=Price("m", 1, 1, 1), bound=bound, hold=Hold(None, (), 0, (), lambda _: None), quota=UNLIMITED,
        started_at=0.0, told=NOTHING_TOLD,
    )  # fmt: skip


class Desk:
    """Notes what flights tell."""

    def __init__(self, **bounds: float) -> None:
        self.settings = Settings(**bounds)  # type: ignore[arg-type] # numbers, each under its name
        self.landings: list[tuple[Flight, bool]] = []

    def covers(self, turn: Turn, tokens: Tokens) -> int:
        return tokens.completion

    def landed(self, flight: Flight, *, is_answered: bool) -> None:
        self.landings.append((flight, is_answered))


class Air:
    """A flight with everything around it."""

    def __init__(self, client: Client | None = None, **bounds: float) -> None:
        self.client, self.turn, self.desk, self.wire = client or Client(), turn(), Desk(**bounds), Wire()
        self.connection = UpstreamConnection(asyncio.get_running_loop())
        self.connection.connection_made(cast("Any", self.wire))
        self.landed: list[Flight] = []
        self.flight = StreamFlight(
            cast("Any", self.desk), self.turn, engine(), self.connection, cast("Any", self.client), self.landed.append,
        )  # fmt: skip
        self.connection.begin(b"", self.flight.news)

    def says(self, data: bytes) -> None:
        self.connection.data_received(data)

    def event(self, count: int) -> None:
        event = EVENT % (9 + count, count)
        self.says(b"%x\r\n%b\r\n" % (len(event), event))


async def test_events_that_come_after_the_client_left_are_not_counted() -> None:
    air = Air()
    air.says(HEAD)
    air.event(1)
    air.event(2)
    air.client.is_gone = True
    air.event(3)  # before the connection said that it was lost
    assert air.landed == [air.flight]
    assert isinstance(air.flight.error, ClientGone)
    assert len(air.client.got) == air.turn.tokens.completion == 2


async def test_a_client_that_left_as_the_first_event_came_has_begun_nothing() -> None:
    air = Air(Client(is_gone=True))
    air.says(HEAD)
    air.event(1)
    assert isinstance(air.flight.error, ClientGone)
    assert (air.turn.first_event_s, air.turn.tokens, air.client.is_started) == (None, NO_TOKENS, False)


async def test_what_was_delivered_is_counted_when_nobody_waits_any_more() -> None:
    air = Air()
    air.says(HEAD)
    air.event(1)
    air.event(2)
    air.flight.abandon()
    air.event(3)
    assert air.turn.tokens.completion == 2
    assert (air.landed, air.desk.landings) == ([], [(air.flight, False)])
    air.flight.abandon()
    air.flight.fail(RuntimeError())
    assert len(air.desk.landings) == 1


async def test_a_flight_lands_once_whatever_comes_after() -> None:
    air = Air()
    air.says(HEAD)
    air.event(1)
    air.connection.connection_lost(None)
    air.connection.connection_lost(None)
    air.flight.late(float("inf"))
    assert isinstance(air.flight.error, EngineFault)
    assert air.landed == [air.flight]


async def test_the_engine_waits_while_its_client_is_slow() -> None:
    air = Air()
    air.says(HEAD)
    air.event(1)
    air.client.is_full = True
    air.event(2)
    assert not air.wire.is_reading
    air.client.is_full = False
    air.client.has_read.set()
    await eventually(lambda: air.wire.is_reading)
    air.event(3)
    assert len(air.client.got) == 3


async def test_a_slow_client_that_goes_ends_the_flight() -> None:
    air = Air()
    air.says(HEAD)
    air.client.is_full = True
    air.event(1)
    air.client.is_gone = True
    air.client.has_read.set()
    await eventually(lambda: bool(air.landed))
    assert isinstance(air.flight.error, ClientGone)


async def test_waiting_for_a_slow_client_ends_with_the_flight() -> None:
    air = Air()
    air.says(HEAD)
    air.client.is_full = True
    air.event(1)
    (waiting,) = [task for task in asyncio.all_tasks() if task.get_name() == "slow client"]
    air.flight.abandon()
    await asyncio.wait([waiting], timeout=30)
    assert waiting.cancelled()


async def test_a_client_that_waits_is_told_so_and_then_that_it_waits_in_vain() -> None:
    air = Air(first_byte_timeout_s=25.0, keepalive_comment_s=10.0)
    begun_s = air.flight.begun_s
    assert air.flight.due_s == begun_s + 10
    air.flight.late(begun_s + 10)
    assert (air.client.is_started, air.client.got) == (True, [b": keep-alive\n\n"])
    air.flight.late(begun_s + 20)
    assert air.flight.due_s == begun_s + 25
    air.flight.late(begun_s + 25)
    assert isinstance(air.flight.error, EngineFault)
    assert "first_byte_timeout_s" in air.flight.error.cause


async def test_silence_is_counted_from_the_last_piece() -> None:
    air = Air(chunk_timeout_s=60.0)
    air.says(HEAD)
    air.event(1)
    air.connection.last_data_s += 50
    due_s = air.flight.due_s
    air.flight.late(due_s)
    assert air.flight.error is None
    assert air.flight.due_s == pytest.approx(due_s + 50, abs=1)
    air.flight.late(air.flight.due_s)
    assert isinstance(air.flight.error, EngineFault)
    assert "chunk_timeout_s" in air.flight.error.cause


async def test_what_breaks_after_the_landing_is_not_lost() -> None:
    def broken(_: Flight) -> None:
        raise RuntimeError("whoever was told")

    air = Air()
    air.flight._landed = broken
    air.says(HEAD)
    with pytest.raises(RuntimeError, match="whoever was told"):
        air.connection.connection_lost(None)
