"""One attempt at one engine under way: asked, watched under every bound, passed on and settled, moved along by callbacks.

A flight takes no task, so that thousands of streams are thousands of these. `WholeFlight` waits for a body, `StreamFlight`
relays events as they come. Which engine is asked, and what follows from a failure, is `gateway.dispatch`.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from config.clock import monotonic
from config.defaults import Settings
from gateway.relay.downstream import EVENT_STREAM, ClientGone, Downstream, is_gone, send_on
from gateway.relay.events import Tokens, error_of, first_event
from gateway.relay.faults import broken, fault_of_answer, fault_of_event, silent, too_large, too_long
from gateway.relay.tap_complete import CompleteTap
from gateway.relay.taps import Tap
from gateway.relay.upstream import UpstreamConnection
from gateway.turn import Turn
from nodes.routing.snapshot import Engine

log = logging.getLogger("poolgate.relay")

ERROR_BODY_MAX = 65536
"""Bytes of an engine's error answer that are read; vLLM's are below 1 KiB."""

OVERRUN: dict[str, Any] = {}
"""Stands in a tap for the error that the engine did not send: it went on past what was asked for and is paid."""

ESTIMATE_SLACK = 8
"""How many times more tokens an estimate may see than the engine did: some scripts take ours several a token."""

KEEPALIVE = b": keep-alive\n\n"


class Stale(Exception):
    """An idle connection turned out to be closed, which says nothing of its engine: the turn may begin again."""


class Desk(Protocol):
    """What a flight needs of whoever sent it."""

    settings: Settings

    def answer(self, turn: Turn, status: int, body: bytes, down: Downstream) -> None:
        """Settle by what a whole answer counts, then send it. Raises EngineFault for one that is none, and ClientGone."""
        ...

    def finish(self, turn: Turn, tap: Tap, down: Downstream) -> None:
        """Settle a stream, then send its last bytes. Raises ClientGone."""
        ...

    def covers(self, turn: Turn, tokens: Tokens) -> int:
        """Output tokens that are paid for, now that an engine went past the turn's limit."""
        ...

    def landed(self, flight: "Flight", *, is_answered: bool) -> None:
        """A flight is over: by an answer, or with its `error` set, or abandoned."""
        ...


class Flight(ABC):
    """`error`: why there is no answer. `due_s`: when `late` wants to look at it, by the loop's clock.

    `landed` is called once: when the answer went out, or with `error` set; never after `abandon`.
    """

    __slots__ = ("_connection", "_desk", "_down", "_landed", "begun_s", "due_s", "engine", "error", "turn")

    def __init__(
        self, desk: Desk, turn: Turn, engine: Engine, connection: UpstreamConnection, down: Downstream,
        landed: Callable[["Flight"], None],
    ) -> None:  # fmt: skip
        self.turn = turn
        self.engine = engine
        self.error: Exception | None = None
        self.begun_s = monotonic()
        self.due_s = self.begun_s + desk.settings.answer_timeout_s
        self._desk = desk
        self._landed = landed
        # What each piece of a stream needs comes last, to lie with what else it needs.
        self._connection: UpstreamConnection | None = connection
        self._down = down

    def __repr__(self) -> str:
        state = "under way" if self._connection is not None else "over" if self.error is None else "failed"
        return f"<{type(self).__name__} {self.turn.request_id} {state}>"

    def news(self) -> None:
        """Something came of the answer, or it is over."""
        connection = self._connection
        if connection is not None:  # else it is the end of one that was closed here
            try:
                self._look(connection)
            except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for the answer
                self._break(error)

    def late(self, now_s: float) -> None:
        """`due_s` is over."""
        connection = self._connection
        if connection is not None:
            try:
                self._look_late(connection, now_s)
            except Exception as error:  # noqa: BLE001 - as above
                self._break(error)

    def _break(self, error: Exception) -> None:
        """It is told to whoever goes on from here; what breaks after the landing is nobody's answer, and must be seen."""
        if self._connection is None:
            raise error
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """There is no answer, because of `error`."""
        if self._connection is not None:
            self.error = error
            self.abandon()
            self._landed(self)

    def abandon(self) -> None:
        """Nobody wants the answer any more: the engine stops its work."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._count()
            self._desk.landed(self, is_answered=False)

    def _land(self, connection: UpstreamConnection) -> None:
        """The answer was sent: the connection is another turn's."""
        self._connection = None
        connection.release()
        self.engine.breaker.succeeded(self.begun_s)
        self._desk.landed(self, is_answered=True)
        self._landed(self)

    @abstractmethod
    def _look(self, connection: UpstreamConnection) -> None:
        """`news` came. What it raises is why there is no answer."""

    @abstractmethod
    def _look_late(self, connection: UpstreamConnection, now_s: float) -> None:
        """`due_s` is over: raises, or sets it anew."""

    @abstractmethod
    def _count(self) -> None:
        """Note what was delivered of an answer that breaks off."""


class WholeFlight(Flight):
    """Waits for a body, which is then the answer."""

    __slots__ = ()

    def _look(self, connection: UpstreamConnection) -> None:
        if connection.complete:
            self._desk.answer(self.turn, connection.status, connection.take(), self._down)
            self._land(connection)
        elif connection.failure is not None:
            raise Stale if connection.was_stale else broken(str(connection.failure))
        elif connection.buffered > self._desk.settings.answer_bytes_max:
            raise too_large()
        else:
            connection.read_on()

    def _look_late(self, connection: UpstreamConnection, now_s: float) -> None:
        raise too_long()

    def _count(self) -> None:
        """Nothing: it goes out whole or not at all."""


class StreamFlight(Flight):
    """Relays a stream event by event through its tap, or, where the ask gathers, only into the tap.

    Nothing is sent before the first event came: a 200 may carry a 503 as that. Then what comes goes straight from socket to
    socket, all but the terminal bytes, which the tap keeps until the turn is settled.
    """

    __slots__ = ("_draining", "_ends_s", "_gathers", "_gives_up_s", "_is_flowing", "_tap", "_tokens_max")

    def __init__(
        self, desk: Desk, turn: Turn, engine: Engine, connection: UpstreamConnection, down: Downstream,
        landed: Callable[[Flight], None],
    ) -> None:  # fmt: skip
        super().__init__(desk, turn, engine, connection, down, landed)
        ask, settings = turn.ask, desk.settings
        assert ask.tap is not None
        self._tap = ask.tap()
        self._gathers = ask.gathers
        self._tokens_max = turn.bound.completion_tokens
        """Output tokens that are paid for. Past it the desk `covers` more; the stream ends if that is no more than came."""
        self._is_flowing = False
        self._draining: asyncio.Task[None] | None = None  # while the client is slower than the engine
        self._ends_s = None if ask.time_limit_s is None else turn.started_s + ask.time_limit_s
        gives_up_s = self.begun_s + settings.first_byte_timeout_s
        self._gives_up_s = gives_up_s if self._ends_s is None else min(gives_up_s, self._ends_s)
        self.due_s = min(self.begun_s + settings.keepalive_comment_s, self._gives_up_s)

    # --- until the first event ------------------------------------------------------------------------------------

    def _look(self, connection: UpstreamConnection) -> None:
        if self._is_flowing:
            self._look_on(connection)
        elif connection.status >= 300:
            self._look_for_error(connection)
        elif (event := first_event(connection.peek())) is not None:
            if (error := error_of(event)) is not None:
                raise fault_of_event(error)
            self._flow(connection)
        elif connection.is_over:
            raise (
                Stale
                if connection.was_stale
                else broken(str(connection.failure or "the engine sent no event"))
            )
        elif connection.buffered > self._desk.settings.event_bytes_max:
            raise broken("the engine's first event is larger than event_bytes_max")
        elif connection.is_paused:
            connection.read_on()

    def _look_for_error(self, connection: UpstreamConnection) -> None:
        """The engine says no; its reason may take a moment longer."""
        if connection.is_over or connection.buffered > ERROR_BODY_MAX:
            raise fault_of_answer(connection.status, connection.take())
        gives_up_s = monotonic() + self._desk.settings.connect_timeout_s
        self._gives_up_s = self.due_s = min(self._gives_up_s, gives_up_s)

    def _look_late(self, connection: UpstreamConnection, now_s: float) -> None:
        if self._is_flowing:
            self._look_for_silence(connection, now_s)
        elif now_s < self._gives_up_s:  # whatever the engine says meanwhile: its own comments go no further
            if not self._gathers:
                if not self._down.is_started:
                    self._start()
                self._down.write(KEEPALIVE)
            self.due_s = min(now_s + self._desk.settings.keepalive_comment_s, self._gives_up_s)
        elif connection.status >= 300:
            raise fault_of_answer(connection.status, connection.take())
        elif self._times_out():
            self._flow(connection)
        else:
            raise silent("no first event within first_byte_timeout_s")

    def _start(self) -> None:
        turn = self.turn
        self._down.start({**EVENT_STREAM, "x-request-id": turn.request_id}, turn.told)

    # --- while it flows -------------------------------------------------------------------------------------------

    def _flow(self, connection: UpstreamConnection) -> None:
        """Send what has come, and let what comes go straight on."""
        down = self._down
        if down.is_gone and not self._gathers:
            raise ClientGone
        if not self._tap.is_done:
            self.turn.first_event()
        self._is_flowing = True
        if not self._gathers and not down.is_started:
            self._start()
        connection.attach(self._pass_on)
        self.due_s = monotonic() + self._desk.settings.chunk_timeout_s
        if self._ends_s is not None:
            self.due_s = min(self.due_s, self._ends_s)
        try:
            self._relay(connection, connection.take())
        except (
            Exception
        ) as error:  # as the connection guards what comes later: the engine's bytes make no sense
            log.exception("a relay failed on an engine's answer", extra={"action": "relay_failed"})
            raise broken("the engine's answer could not be relayed") from error
        self._look_on(connection)

    def _pass_on(self, data: bytes) -> None:
        """A piece of the answer."""
        connection = self._connection
        if connection is None:
            return
        # What can't be written is not delivered, so it is not counted.
        if not self._gathers and is_gone(self._down):
            self.news()
            return
        self._relay(connection, data)
        tap = self._tap
        if tap.is_done or tap.error is not None or tap.pending_bytes or connection.is_paused:
            self.news()

    def _relay(self, connection: UpstreamConnection, data: bytes) -> None:
        tap = self._tap
        out = tap.feed(data)
        if out and not self._gathers and send_on(self._down, out):
            connection.pause()
        tokens, tokens_max = tap.tokens, self._tokens_max
        if tokens.completion > tokens_max and (
            not tokens.estimated or tokens.completion > tokens_max * ESTIMATE_SLACK
        ):
            self._tokens_max = self._desk.covers(self.turn, tokens)
            if tokens.completion > self._tokens_max and tap.error is None:
                tap.error = OVERRUN

    def _look_on(self, connection: UpstreamConnection) -> None:
        """Is it over, or does it have to wait?"""
        tap = self._tap
        if tap.is_done or tap.error is not None or connection.is_over:
            self._end(connection)
        elif tap.pending_bytes > self._desk.settings.event_bytes_max:
            raise broken("an event of the engine is larger than event_bytes_max")
        elif self._down.is_gone and not self._gathers:
            raise ClientGone
        elif connection.is_paused:
            if self._gathers:
                connection.resume()
            elif self._draining is None:
                self._draining = asyncio.get_running_loop().create_task(self._drain(), name="slow client")

    async def _drain(self) -> None:
        """Wait for a client that is slower than its engine, which waits meanwhile."""
        try:
            await self._down.drained()
        except ClientGone as gone:
            self._draining = None
            self.fail(gone)
            return
        self._draining = None
        if self._connection is not None:
            self._connection.resume()
            self.news()

    def _look_for_silence(self, connection: UpstreamConnection, now_s: float) -> None:
        """`due_s` is when silence would have lasted too long if nothing came from now on: looked at only then."""
        chunk_timeout_s = self._desk.settings.chunk_timeout_s
        silent_at_s = (now_s if connection.is_paused else connection.last_data_s) + chunk_timeout_s
        if now_s >= silent_at_s:
            raise silent("silence inside the answer for chunk_timeout_s")
        if self._ends_s is not None:
            if now_s >= self._ends_s and self._times_out():
                self._end(connection)
                return
            silent_at_s = min(silent_at_s, self._ends_s)
        self.due_s = silent_at_s

    # --- its end --------------------------------------------------------------------------------------------------

    def _times_out(self) -> bool:
        """/v1/complete ends here with what it has."""
        tap = self._tap
        if not isinstance(tap, CompleteTap):
            return False
        tap.time_out()
        return True

    def _end(self, connection: UpstreamConnection) -> None:
        tap, turn = self._tap, self.turn
        if tap.error is OVERRUN:
            raise broken("the engine produced more tokens than were asked for and paid")
        if tap.error is not None:
            raise fault_of_event(tap.error)
        if not tap.is_whole:
            raise broken(str(connection.failure or "the stream ended without a finish"))
        self._desk.finish(turn, tap, self._down)
        self._stop_draining()
        if turn.outcome == "timeout":  # we ended it, not the engine, which should stop now
            self._connection = None
            connection.close()
            self._desk.landed(self, is_answered=True)
            self._landed(self)
        else:
            self._land(connection)

    def abandon(self) -> None:
        self._stop_draining()
        super().abandon()

    def _stop_draining(self) -> None:
        draining, self._draining = self._draining, None
        if draining is not None:
            draining.cancel()

    def _count(self) -> None:
        if not self._gathers and self.turn.first_event_s is not None:
            self.turn.delivered(self._tap.final_tokens())
