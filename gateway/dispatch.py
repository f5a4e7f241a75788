"""Where a turn goes: choose an engine, ask it, and another one while nothing was sent. Then its answer, settled.

Whether a turn may begin, and what it costs, is `gateway.lifecycle`; one attempt under way is `gateway.flight`. Breakers
learn here what became of each attempt.
"""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Any, Final

import orjson

from billing.holds import BYTES_PER_TOKEN, USUAL_OUTPUT_TOKENS
from billing.money import to_minor_up
from config.clock import monotonic
from config.defaults import Settings
from gateway.errors import EveryEngineFull, NoNodeAvailable
from gateway.flight import Flight, Stale, StreamFlight, WholeFlight
from gateway.placement import Placement, is_full
from gateway.relay.downstream import ClientGone, Downstream
from gateway.relay.events import Tokens, add_cost, answer_tokens, plain_tokens
from gateway.relay.faults import EngineFault, check_answer, fault_of_answer, unreachable
from gateway.relay.tap_complete import CompleteTap
from gateway.relay.taps import Tap
from gateway.relay.tokens import estimate
from gateway.relay.upstream import ConnectFailed, UpstreamConnection
from gateway.relay.upstreams import Upstreams
from gateway.turn import Turn
from nodes.registry import Registry
from nodes.routing.snapshot import Engine

log = logging.getLogger("poolgate.turns")

OUTPUT_TOKENS_GUESS_MAX: Final = 1024
"""What answers with a large token limit count for as load: few are longer."""


LATE_S = 1.0
LATE_OF_BOUND = 0.25
"""How late a bound on time may be noticed: so much of the least of them, at most LATE_S."""


class Dispatcher:
    """Sends turns to engines.

    `settle` is called once a turn's answer is whole, before its last bytes go out; `covers` when an engine went past the
    turn's token limit: how many output tokens are paid for (`gateway.flight.Desk`).
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
        upstreams: Upstreams,
    ) -> None:
        self.settings = settings
        self._minor_per_major = settings.minor_per_major
        self.covers = covers
        self._registry = registry
        self._placement = placement
        self._pepper = pepper
        self._settle = settle
        self._salts: dict[int, str] = {}
        self.upstreams = upstreams
        self.flights: set[Flight] = set()
        """Those that no task waits for."""
        self._awaited: set[Flight] = set()
        self.late_s = min(LATE_S, LATE_OF_BOUND * _least_bound_s(settings))

    def launch(self, turn: Turn, down: Downstream, landed: Callable[[Flight], None]) -> Flight | None:
        """Ask an engine on an idle connection. `landed` is called once, when the answer went out or with the flight's
        `error` set, from where `dispatch` goes on.

        None: there is no such connection, or the turn has to wait for an engine: then it is `dispatch` that goes on. Raises
        NoNodeAvailable.
        """
        self._encode(turn)
        try:
            engine = self._choose(turn)
        except EveryEngineFull:
            return None
        connection = self.upstreams.pool(engine).idle()
        if connection is None:
            turn.engine = engine  # which `dispatch` need not choose again
            return None
        return self._take_off(turn, engine, connection, down, landed, self.flights)

    async def dispatch(
        self, turn: Turn, down: Downstream, failed: Flight | None = None,
        landed: Callable[[Flight], None] | None = None,
    ) -> Flight | None:  # fmt: skip
        """Ask engines until one answers; another one only while the client got nothing but comments. Raises ApiError.

        `failed`: the flight that was launched before; what ended it is raised unless another one may mend it. With `landed`
        the next flight is not waited for but returned, and `landed` is called as by `launch`.
        """
        if failed is not None and not isinstance(failed.error, EngineFault | Stale):
            assert failed.error is not None
            raise failed.error
        while not turn.faults or self._may_go_on(turn):
            if not turn.sent:
                self._encode(turn)
            engine = turn.engine if failed is None and not turn.faults else None
            if engine is None:
                engine = await self._chosen(turn, down)
            was_stale = failed is not None and isinstance(failed.error, Stale)
            connection = await self._connected(turn, engine, is_new=was_stale)
            failed = None
            if connection is None:
                continue
            if landed is not None:
                return self._take_off(turn, engine, connection, down, landed, self.flights)
            flight = await self._flown(turn, engine, connection, down)
            if flight.error is None:
                return None
            if not isinstance(flight.error, EngineFault | Stale):
                raise flight.error
            failed = flight
        self._judge(turn, is_answered=False)
        _, fault = turn.faults[-1]
        raise fault.error

    async def _chosen(self, turn: Turn, down: Downstream) -> Engine:
        """An engine for the turn, if need be after waiting for one. Raises ApiError."""
        with suppress(EveryEngineFull):
            return self._choose(turn)
        self._judge(turn, is_answered=False)
        turn.faults = ()
        return await self._placement.wait(turn, turn.load_tokens, down)

    def end_late(self) -> None:
        """Have flights looked at whose time has come; to be called every `late_s`."""
        now_s = monotonic()
        for flight in [flight for flight in chain(self.flights, self._awaited) if flight.due_s <= now_s]:
            flight.late(now_s)

    def _take_off(
        self, turn: Turn, engine: Engine, connection: UpstreamConnection, down: Downstream,
        landed: Callable[[Flight], None], among: set[Flight],
    ) -> Flight:  # fmt: skip
        turn.engine = engine
        engine.began(turn.load_tokens)
        ask = turn.ask
        flight: Flight
        if ask.tap is None:
            flight = WholeFlight(self, turn, engine, connection, down, landed)
        else:
            flight = StreamFlight(self, turn, engine, connection, down, landed)
        among.add(flight)
        connection.post(ask.engine_path, turn.request_id, turn.sent, flight.news)
        return flight

    async def _flown(
        self, turn: Turn, engine: Engine, connection: UpstreamConnection, down: Downstream
    ) -> Flight:
        """A flight that has landed."""
        landing: asyncio.Future[Flight] = asyncio.get_running_loop().create_future()
        flight = self._take_off(
            turn, engine, connection, down, lambda it: None if landing.done() else landing.set_result(it),
            self._awaited,
        )  # fmt: skip
        try:
            return await landing
        except asyncio.CancelledError:
            flight.abandon()
            raise

    def landed(self, flight: Flight, *, is_answered: bool) -> None:
        """A flight is over: what its engine did is noted."""
        self.flights.discard(flight)
        self._awaited.discard(flight)
        turn, engine, error = flight.turn, flight.engine, flight.error
        engine.ended(turn.load_tokens)
        if isinstance(error, EngineFault):
            if is_full(error):  # at once: those who wait are looked at next, and must not try it
                self._registry.engine_full(engine)
            self._fail(turn, engine, error)
        if is_answered and turn.faults:
            self._judge(turn, is_answered=True)
        if is_answered and turn.first_event_s is None:  # it ran out of time unheard
            self._registry.engine_failed(engine)

    async def _connected(self, turn: Turn, engine: Engine, *, is_new: bool) -> UpstreamConnection | None:
        """A connection to `engine`; None where it can't be reached, which is noted."""
        pool = self.upstreams.pool(engine)
        connection = None if is_new else pool.idle()
        if connection is None:
            turn.engine = engine
            engine.began(turn.load_tokens)
            try:
                return await pool.connect()
            except ConnectFailed as error:
                self._fail(turn, engine, unreachable(str(error)))
            finally:
                engine.ended(turn.load_tokens)
        return connection

    def _may_go_on(self, turn: Turn) -> bool:
        _, last = turn.faults[-1]
        may_try = len(turn.faults) < self.settings.dispatch_attempts_max or is_full(last)
        return not turn.is_begun and last.may_retry and may_try

    def _fail(self, turn: Turn, engine: Engine, fault: EngineFault) -> None:
        log.log(
            logging.WARNING if fault.is_broken else logging.INFO, "%s failed: %s", engine.key, fault.cause,
            extra={"action": "attempt_failed", "request_id": turn.request_id, "engine": engine.key},
        )  # fmt: skip
        turn.faults = (*turn.faults, (engine, fault))
        turn.outcome = "engine_failed" if fault.may_retry or turn.is_begun else "refused"

    def _judge(self, turn: Turn, *, is_answered: bool) -> None:
        """Tell the breakers. When every engine failed at one turn, the turn may be to blame: then only the first one tried
        is counted, or a single poisonous request could take a whole model down."""
        for place, (engine, fault) in enumerate(turn.faults):
            if fault.is_broken and (is_answered or fault.is_certain or place == 0):
                self._registry.engine_failed(engine)

    def _choose(self, turn: Turn) -> Engine:
        if not turn.faults:
            return self._placement.choose(turn, turn.load_tokens, ())
        _, last = turn.faults[-1]
        try:
            return self._placement.choose(turn, turn.load_tokens, [engine for engine, _ in turn.faults], last)
        except EveryEngineFull:
            raise
        except NoNodeAvailable:
            self._judge(turn, is_answered=False)
            raise last.error from last

    def _encode(self, turn: Turn) -> None:
        """The validated body, with what the gateway sets: usage in every event, and a cache salt for each account."""
        body = turn.ask.body
        if turn.ask.kind == "generate":
            body["cache_salt"] = self._salt(turn.principal.account_id)
        turn.sent = orjson.dumps(body)
        turn.load_tokens = len(turn.sent) // BYTES_PER_TOKEN + _expected_output(turn)

    def _salt(self, account_id: int) -> str:
        """Keeps one account's cached prefixes from being timed, or used, by another."""
        salt = self._salts.get(account_id)
        if salt is None:
            if len(self._salts) >= self.settings.key_cache_max:
                self._salts.clear()
            mark = hmac.digest(self._pepper, b"cache-salt:%d" % account_id, hashlib.sha256)
            salt = self._salts[account_id] = mark.hex()[:32]
        return salt

    # --- answers --------------------------------------------------------------------------------------------------

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
        cost_minor = to_minor_up(turn.amount_nano, self._minor_per_major)
        down.answer(200, _json(turn), add_cost(body, cost_minor), turn.told)

    def finish(self, turn: Turn, tap: Tap, down: Downstream) -> None:
        """Settle a stream, then send its last bytes. Raises ClientGone."""
        if down.is_gone and turn.ask.gathers:
            raise ClientGone
        turn.delivered(tap.final_tokens())
        is_timeout = isinstance(tap, CompleteTap) and tap.timed_out
        turn.outcome, turn.status = "timeout" if is_timeout else "finished", 200
        self._settle(turn)
        cost_minor = to_minor_up(turn.amount_nano, self._minor_per_major)
        if turn.ask.render is not None:
            down.answer(200, _json(turn), turn.ask.render(turn, tap, cost_minor), turn.told)
        else:
            down.finish(tap.ending(cost_minor))


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


def _least_bound_s(settings: Settings) -> float:
    """The least of the bounds that flights have."""
    return min(
        settings.answer_timeout_s, settings.first_byte_timeout_s, settings.chunk_timeout_s,
        settings.complete_timeout_s, settings.connect_timeout_s, settings.keepalive_comment_s,
    )  # fmt: skip
