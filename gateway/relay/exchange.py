"""One attempt at one engine: send the request, watch the answer under every bound, pass it on.

Two shapes: `stream` relays events as they come, `whole` waits for a body. Both raise EngineFault for what is the engine's
fault and ClientGone for what is the client's; nobody is charged here.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from billing.limits.headers import Told
from config.defaults import Settings
from gateway.relay.downstream import EVENT_STREAM, ClientGone, Downstream
from gateway.relay.events import Tokens, error_of, first_event
from gateway.relay.faults import (
    broken,
    fault_of_answer,
    fault_of_event,
    silent,
    too_large,
    too_long,
)
from gateway.relay.tap_complete import CompleteTap
from gateway.relay.taps import Tap
from gateway.relay.upstream import UpstreamConnection

log = logging.getLogger("poolgate.relay")

ERROR_BODY_MAX = 65536
"""Bytes of an engine's error answer that are read; vLLM's are below 1 KiB."""

OVERRUN: dict[str, Any] = {}
"""Stands in a tap for the error that the engine did not send: it went on past what was asked for and is paid."""

ESTIMATE_SLACK = 8
"""How many times more tokens an estimate may see than the engine did: some scripts take ours several a token."""

KEEPALIVE = b": keep-alive\n\n"


class Metered(Protocol):
    """What a relay needs of the turn that it is for."""

    request_id: str
    told: Told

    def first_event(self) -> None:
        """The engine's first event is here."""
        ...


Turned = TypeVar("Turned", bound=Metered)


class Delivery(Generic[Turned]):
    """One stream's way from its engine through `tap` to `down`, event by event, or, with `gathered`, only into the tap.

    `tokens_max`: output tokens that are paid for. Past it `covers` is asked for a new bound; the stream ends when that
    is no higher than what was produced.
    """

    __slots__ = (
        "_connection", "_covers", "_event_bytes_max", "_tokens_max", "down", "ends_at_s", "gathered", "tap", "turn",
    )  # fmt: skip

    def __init__(
        self, tap: Tap, down: Downstream, turn: Turned, covers: Callable[[Turned, Tokens], int], tokens_max: int,
        gathered: bool = False, ends_at_s: float | None = None,
    ) -> None:  # fmt: skip
        self.tap = tap
        self.down = down
        self.turn = turn
        self.gathered = gathered
        self.ends_at_s = ends_at_s
        self._covers = covers
        self._tokens_max = tokens_max
        self._event_bytes_max = 0
        self._connection: UpstreamConnection | None = None

    def start(self) -> None:
        """Send the head."""
        turn = self.turn
        self.down.start({**EVENT_STREAM, "x-request-id": turn.request_id}, turn.told)

    def open(self, connection: UpstreamConnection, event_bytes_max: int) -> None:
        """Send what has come, and let what comes go straight from socket to socket."""
        self._connection = connection
        self._event_bytes_max = event_bytes_max
        if not self.gathered and not self.down.is_started:
            self.start()
        connection.attach(self.pass_on)
        try:
            self.pass_on(connection.take())
        except (
            Exception
        ) as error:  # as the connection guards what comes later: the engine's bytes make no sense
            log.exception("a relay failed on an engine's answer", extra={"action": "relay_failed"})
            raise broken("the engine's answer could not be relayed") from error

    def pass_on(self, data: bytes) -> None:
        """A piece of the answer. Wakes whoever waits for the stream's end where it has to look."""
        connection, tap, down = self._connection, self.tap, self.down
        assert connection is not None
        if down.is_gone and not self.gathered:  # what can't be written is not delivered, so it is not counted
            connection.poke()
            return
        out = tap.feed(data)
        if out and not self.gathered:
            down.write(out)
            if down.is_full:
                connection.pause()
                connection.poke()
        tokens, tokens_max = tap.tokens, self._tokens_max
        if tokens.completion > tokens_max and (
            not tokens.estimated or tokens.completion > tokens_max * ESTIMATE_SLACK
        ):
            self._tokens_max = self._covers(self.turn, tokens)
            if tokens.completion > self._tokens_max and tap.error is None:
                tap.error = OVERRUN
        if tap.is_done or tap.error is not None or tap.pending_bytes > self._event_bytes_max:
            connection.poke()


async def stream(connection: UpstreamConnection, delivery: Delivery[Any], settings: Settings) -> None:
    """Relay one stream to its end, all but the terminal bytes, which the tap keeps until the turn is settled."""
    await _first_event(connection, delivery, settings)
    if delivery.down.is_gone and not delivery.gathered:
        raise ClientGone
    if not delivery.tap.is_done:
        delivery.turn.first_event()
    delivery.open(connection, settings.event_bytes_max)
    await _flow(connection, delivery, settings)
    tap = delivery.tap
    if tap.error is OVERRUN:
        raise broken("the engine produced more tokens than were asked for and paid")
    if tap.error is not None:
        raise fault_of_event(tap.error)
    if not tap.is_whole:
        raise broken(str(connection.failure or "the stream ended without a finish"))


async def _first_event(connection: UpstreamConnection, delivery: Delivery[Any], settings: Settings) -> None:
    """Wait for the first event, with comments to the client meanwhile: a 200 may carry a 503 as its first event."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + settings.first_byte_timeout_s
    if delivery.ends_at_s is not None:
        give_up_s = min(give_up_s, delivery.ends_at_s)
    comment_at_s = loop.time() + settings.keepalive_comment_s
    while (event := first_event(connection.peek())) is None:
        if connection.status >= 300:
            raise fault_of_answer(connection.status, await _error_body(connection, settings))
        if connection.is_over:
            raise broken(str(connection.failure or "the engine sent no event"))
        if connection.buffered > settings.event_bytes_max:
            raise broken("the engine's first event is larger than event_bytes_max")
        now_s = loop.time()
        if now_s >= give_up_s:
            if _timed_out(delivery):
                return
            raise silent("no first event within first_byte_timeout_s")
        if now_s >= comment_at_s:  # whatever the engine says meanwhile: its own comments go no further
            comment_at_s = now_s + settings.keepalive_comment_s
            if not delivery.gathered:
                _say_waiting(delivery)
        await connection.changed(min(comment_at_s, give_up_s) - now_s)
    if connection.status >= 300:
        raise fault_of_answer(connection.status, await _error_body(connection, settings))
    if (error := error_of(event)) is not None:
        raise fault_of_event(error)


def _say_waiting(delivery: Delivery[Any]) -> None:
    down = delivery.down
    if not down.is_started:
        delivery.start()
    down.write(KEEPALIVE)


async def _flow(connection: UpstreamConnection, delivery: Delivery[Any], settings: Settings) -> None:
    """Sleep while the stream flows; wake for its end, silence, a slow client or the time-out of /v1/complete."""
    loop = asyncio.get_running_loop()
    tap, down = delivery.tap, delivery.down
    while not (tap.is_done or tap.error is not None or connection.is_over):
        if tap.pending_bytes > settings.event_bytes_max:
            raise broken("an event of the engine is larger than event_bytes_max")
        if down.is_gone and not delivery.gathered:
            raise ClientGone
        if connection.is_paused:
            if not delivery.gathered:
                await down.drained()
            connection.resume()
            continue
        now_s = loop.time()
        silence_ends_s = connection.last_data_s + settings.chunk_timeout_s
        if now_s >= silence_ends_s:
            raise silent("silence inside the answer for chunk_timeout_s")
        if delivery.ends_at_s is not None:
            if now_s >= delivery.ends_at_s and _timed_out(delivery):
                return
            silence_ends_s = min(silence_ends_s, delivery.ends_at_s)
        await connection.changed(silence_ends_s - now_s)


def _timed_out(delivery: Delivery[Any]) -> bool:
    """/v1/complete ends here with what it has."""
    if isinstance(delivery.tap, CompleteTap):
        delivery.tap.time_out()
        return True
    return False


async def whole(connection: UpstreamConnection, settings: Settings) -> bytes:
    """The engine's whole answer, of whatever status."""
    loop = asyncio.get_running_loop()
    gives_up_s = loop.time() + settings.answer_timeout_s
    while not connection.is_over:
        if connection.buffered > settings.answer_bytes_max:
            raise too_large()
        left_s = gives_up_s - loop.time()
        if left_s <= 0:
            raise too_long()
        await connection.changed(left_s)
    if connection.failure is not None:
        raise broken(str(connection.failure))
    return connection.take()


async def _error_body(connection: UpstreamConnection, settings: Settings) -> bytes:
    loop = asyncio.get_running_loop()
    gives_up_s = loop.time() + settings.connect_timeout_s
    while not connection.is_over and connection.buffered <= ERROR_BODY_MAX and loop.time() < gives_up_s:
        await connection.changed(gives_up_s - loop.time())
    return connection.take()
