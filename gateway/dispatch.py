"""Where a turn goes and how its answer comes back: choose an engine, ask it, relay; another one while nothing was sent.

Whether a turn may begin, and what it costs, is `gateway.lifecycle`; how bytes move is `gateway.relay`. Breakers learn here
what became of each attempt.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from typing import Any

import orjson

from billing.holds import BYTES_PER_TOKEN, USUAL_OUTPUT_TOKENS
from billing.money import to_minor_up
from config.defaults import Settings
from gateway.errors import NoNodeAvailable
from gateway.placement import EveryEngineFull, Placement, is_full
from gateway.relay.downstream import ClientGone, Downstream
from gateway.relay.events import Tokens, add_cost, answer_tokens, plain_tokens
from gateway.relay.exchange import Delivery, stream, whole
from gateway.relay.faults import (
    EngineFault,
    broken,
    check_answer,
    fault_of_answer,
    too_large,
    too_long,
    unreachable,
)
from gateway.relay.tap_complete import CompleteTap
from gateway.relay.taps import Tap
from gateway.relay.tokens import estimate
from gateway.relay.upstream import ConnectFailed, UpstreamConnection, UpstreamPool
from gateway.relay.upstreams import Upstreams
from gateway.turn import Turn
from nodes.registry import Registry
from nodes.routing.snapshot import Engine

log = logging.getLogger("poolgate.turns")

OUTPUT_TOKENS_GUESS_MAX = 1024
"""What answers with a large token limit count for as load: few are longer."""


class Dispatcher:
    """Sends turns to engines.

    `settle` is called once a turn's answer is whole, before its last bytes go out; `covers` when an engine went past the
    turn's token limit: how many output tokens are paid for (`gateway.relay.exchange.Delivery`).
    """

    def __init__(
        self,
        settings: Settings,
        *,
        registry: Registry,
        placement: Placement,
        pepper: bytes,
        settle: Callable[[Turn], None],
        covers: Callable[[Turn, Tokens], int],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._placement = placement
        self._pepper = pepper
        self._settle = settle
        self._covers = covers
        self._salts: dict[int, str] = {}
        self.upstreams = Upstreams(settings)
        self.flights: set[Flight] = set()
        self.answer_bytes_max = settings.answer_bytes_max

    async def dispatch(self, turn: Turn, down: Downstream, failed: "Flight | None" = None) -> None:
        """Try engines until one answers; another one only while the client got nothing but comments. Raises ApiError.

        `failed`: the attempt without a task that was made before; what ended it is raised unless another one may mend it.
        """
        turn.sent = self._engine_body(turn)
        tokens = _load_tokens(turn)
        tried: list[Engine] = []
        faults: list[EngineFault] = []
        if failed is not None and not isinstance(failed.error, Stale):
            if not isinstance(failed.error, EngineFault):
                assert failed.error is not None
                raise failed.error
            tried.append(failed.engine)
            faults.append(failed.error)
        while not faults or self._may_go_on(turn, tried, faults[-1]):
            try:
                engine = self._choose(turn, tokens, tried, faults)
            except EveryEngineFull:
                self._judge(tried, faults, is_answered=False)
                tried, faults = [], []
                engine = await self._placement.wait(turn, tokens, down)
            tried.append(engine)
            turn.engine = engine
            engine.began(tokens)
            try:
                await self._attempt(turn, engine, down)
                self._judge(tried, faults, is_answered=True)
                return
            except EngineFault as fault:
                faults.append(fault)
                self._fail(turn, engine, fault)
            finally:
                engine.ended(tokens)
        self._judge(tried, faults, is_answered=False)
        raise faults[-1].error

    def _may_go_on(self, turn: Turn, tried: list[Engine], last: EngineFault) -> bool:
        may_try = len(tried) < self._settings.dispatch_attempts_max or is_full(last)
        return not turn.is_begun and last.may_retry and may_try

    def _fail(self, turn: Turn, engine: Engine, fault: EngineFault) -> None:
        self._note(turn, engine, fault)
        turn.outcome = "engine_failed" if fault.may_retry or turn.is_begun else "refused"

    # --- without a task -----------------------------------------------------------------------------------------

    def launch(self, turn: Turn, down: Downstream, landed: Callable[["Flight"], None]) -> "Flight | None":
        """Ask for a whole answer on an idle connection, moved along by that connection's callbacks. `landed` is called once,
        when the answer went out or with the flight's `error` set, from where `dispatch` goes on.

        None: this turn takes a task, in which it may wait for an engine. Raises NoNodeAvailable.
        """
        if turn.ask.tap is not None:
            return None
        turn.sent = self._engine_body(turn)
        tokens = _load_tokens(turn)
        try:
            engine = self._choose(turn, tokens, [], [])
        except EveryEngineFull:
            return None
        pool = self.upstreams.pool(engine)
        connection = pool.idle()
        if connection is None:
            return None
        turn.engine = engine
        engine.began(tokens)
        flight = Flight(self, turn, connection, tokens, down, landed)
        self.flights.add(flight)
        connection.begin(pool.request(turn.ask.engine_path, turn.request_id, turn.sent), flight.news)
        return flight

    def end_late(self) -> None:
        """End the flights whose answers take longer than `answer_timeout_s`; to be called every now and then."""
        oldest_s = time.monotonic() - self._settings.answer_timeout_s
        for flight in [flight for flight in self.flights if flight.begun_s < oldest_s]:
            flight.fail(too_long())

    def _judge(self, tried: list[Engine], faults: list[EngineFault], *, is_answered: bool) -> None:
        """Tell the breakers. When every engine failed at one turn, the turn may be to blame: then only the first one tried
        is counted, or a single poisonous request could take a whole model down."""
        for place, (engine, fault) in enumerate(zip(tried, faults, strict=False)):
            if fault.is_broken and (is_answered or fault.is_certain or place == 0):
                self._registry.engine_failed(engine)

    def _note(self, turn: Turn, engine: Engine, fault: EngineFault) -> None:
        log.log(
            logging.WARNING if fault.is_broken else logging.INFO, "%s failed: %s", engine.key, fault.cause,
            extra={"action": "attempt_failed", "request_id": turn.request_id, "engine": engine.key},
        )  # fmt: skip

    def _choose(self, turn: Turn, tokens: int, tried: list[Engine], faults: list[EngineFault]) -> Engine:
        try:
            return self._placement.choose(turn, tokens, tried, faults[-1] if faults else None)
        except EveryEngineFull:
            raise
        except NoNodeAvailable:
            if not faults:
                raise
            self._judge(tried, faults, is_answered=False)
            raise faults[-1].error from faults[-1]

    def _engine_body(self, turn: Turn) -> bytes:
        """The validated body, with what the gateway sets: usage in every event, and a cache salt for each account."""
        body = turn.ask.body
        if turn.ask.kind == "generate":
            body["cache_salt"] = self._salt(turn.principal.account_id)
        return orjson.dumps(body)

    def _salt(self, account_id: int) -> str:
        """Keeps one account's cached prefixes from being timed, or used, by another."""
        salt = self._salts.get(account_id)
        if salt is None:
            if len(self._salts) >= self._settings.key_cache_max:
                self._salts.clear()
            mark = hmac.digest(self._pepper, b"cache-salt:%d" % account_id, hashlib.sha256)
            salt = self._salts[account_id] = mark.hex()[:32]
        return salt

    # --- one attempt ------------------------------------------------------------------------------------------

    async def _attempt(self, turn: Turn, engine: Engine, down: Downstream) -> None:
        """Ask `engine`, on an idle connection first. That the engine has just closed that one says nothing of it.

        The connection is kept if all went well and closed at once if not.
        """
        pool = self.upstreams.pool(engine)
        connection = pool.idle() or await self._connected(pool)
        while True:
            begun_s = time.monotonic()
            connection.begin(pool.request(turn.ask.engine_path, turn.request_id, turn.sent))
            try:
                await self._relay(turn, connection, down)
                break
            except BaseException as error:
                connection.close()
                if not (isinstance(error, EngineFault) and connection.was_stale):
                    raise
            connection = await self._connected(pool)
        if turn.outcome == "timeout":  # we ended it, not the engine, which should stop now
            connection.close()
            if turn.first_event_s is None:
                self._registry.engine_failed(engine)
        else:
            connection.release()
            engine.breaker.succeeded(begun_s)

    async def _connected(self, pool: UpstreamPool) -> UpstreamConnection:
        try:
            return await pool.connect()
        except ConnectFailed as error:
            raise unreachable(str(error)) from error

    async def _relay(self, turn: Turn, connection: UpstreamConnection, down: Downstream) -> None:
        ask = turn.ask
        if ask.tap is None:
            await self._relay_whole(turn, connection, down)
            return
        tap = ask.tap()
        ends_at_s = None
        if ask.time_limit_s is not None:
            used_s = time.monotonic() - turn.started_s
            ends_at_s = asyncio.get_running_loop().time() + ask.time_limit_s - used_s
        delivery = Delivery(
            tap, down, turn, self._covers, turn.bound.completion_tokens, ask.gathers, ends_at_s
        )
        try:
            await stream(connection, delivery, self._settings)
        finally:
            if not ask.gathers and turn.first_event_s is not None:
                turn.delivered(tap.final_tokens())
        self._finish(turn, tap, down)

    def _finish(self, turn: Turn, tap: Tap, down: Downstream) -> None:
        """Settle, then send the last bytes."""
        if down.is_gone and turn.ask.gathers:
            raise ClientGone
        turn.delivered(tap.final_tokens())
        is_timeout = isinstance(tap, CompleteTap) and tap.timed_out
        turn.outcome, turn.status = "timeout" if is_timeout else "finished", 200
        self._settle(turn)
        cost_minor = to_minor_up(turn.amount_nano, self._settings.minor_per_major)
        if turn.ask.render is not None:
            down.answer(200, _json(turn), turn.ask.render(turn, tap, cost_minor), turn.told)
        else:
            down.finish(tap.ending(cost_minor))

    async def _relay_whole(self, turn: Turn, connection: UpstreamConnection, down: Downstream) -> None:
        body = await whole(connection, self._settings)
        self.answer(turn, connection.status, body, down)

    def answer(self, turn: Turn, status: int, body: bytes, down: Downstream) -> None:
        """Settle by what a whole answer counts, then send it. Raises EngineFault for one that is none, and ClientGone."""
        if status != 200:
            raise fault_of_answer(status, body)
        tokens = plain_tokens(body) or answer_tokens(check_answer(body)) or _estimated(turn.ask.body, body)
        if down.is_gone:
            raise ClientGone
        turn.first_event()
        turn.delivered(tokens)
        turn.outcome, turn.status = "finished", 200
        self._settle(turn)
        cost_minor = to_minor_up(turn.amount_nano, self._settings.minor_per_major)
        down.answer(200, _json(turn), add_cost(body, cost_minor), turn.told)

    def landed(self, flight: "Flight") -> None:
        """A flight is over; what its engine did is noted as after any attempt."""
        self.flights.discard(flight)
        flight.engine.ended(flight.tokens)
        if isinstance(flight.error, EngineFault):
            self._fail(flight.turn, flight.engine, flight.error)


class Stale(Exception):
    """An idle connection turned out to be closed, which says nothing of its engine: the turn may begin again."""


class Flight:
    """A whole answer's first attempt, without a task. `error`: why there is no answer; see `Dispatcher.launch`."""

    __slots__ = (
        "_connection",
        "_dispatcher",
        "_down",
        "_landed",
        "begun_s",
        "engine",
        "error",
        "tokens",
        "turn",
    )

    def __init__(
        self, dispatcher: Dispatcher, turn: Turn, connection: UpstreamConnection, tokens: int, down: Downstream,
        landed: Callable[["Flight"], None],
    ) -> None:  # fmt: skip
        assert turn.engine is not None
        self.turn = turn
        self.engine = turn.engine
        self.tokens = tokens
        self.error: Exception | None = None
        self.begun_s = time.monotonic()
        self._dispatcher = dispatcher
        self._connection: UpstreamConnection | None = connection
        self._down = down
        self._landed = landed

    def news(self) -> None:
        """Something came of the answer, or it is over."""
        connection = self._connection
        if connection is None:  # the end of one that was closed here
            return
        if not connection.is_over:
            if connection.buffered > self._dispatcher.answer_bytes_max:
                self.fail(too_large())
            else:
                connection.read_on()
        elif connection.failure is not None:
            self.fail(Stale() if connection.was_stale else broken(str(connection.failure)))
        else:
            self._answer(connection)

    def _answer(self, connection: UpstreamConnection) -> None:
        body = connection.take()
        try:
            self._dispatcher.answer(self.turn, connection.status, body, self._down)
        except Exception as error:  # noqa: BLE001 - it is told to whoever goes on from here
            self.fail(error)
        else:
            self._connection = None
            connection.release()
            self.engine.breaker.succeeded(self.begun_s)
            self._dispatcher.landed(self)
            self._landed(self)

    def fail(self, error: Exception) -> None:
        """There is no answer, because of `error`."""
        self.error = error
        self.abandon()
        self._landed(self)

    def abandon(self) -> None:
        """Nobody wants the answer any more: the engine stops its work."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._dispatcher.landed(self)


def _json(turn: Turn) -> dict[str, str]:
    """The headers of a whole answer, beside those that its limits tell."""
    return {"x-request-id": turn.request_id, "content-type": "application/json"}


def _expected_output(turn: Turn) -> int:
    bound = turn.bound
    each = bound.output_tokens if bound.is_limited else min(USUAL_OUTPUT_TOKENS, bound.output_tokens)
    return min(bound.choices * each, OUTPUT_TOKENS_GUESS_MAX)


def _estimated(asked: dict[str, Any], answer: bytes) -> Tokens:
    prompt, completion = estimate(asked, answer)
    return Tokens(prompt=prompt, completion=completion, estimated=True)


def _load_tokens(turn: Turn) -> int:
    """What a turn counts for as load on its engine."""
    return len(turn.sent) // BYTES_PER_TOKEN + _expected_output(turn)
