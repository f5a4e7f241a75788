"""Where a turn goes and how its answer comes back: choose an engine, ask it, relay; another one while nothing was sent.

Whether a turn may begin, and what it costs, is `gateway.lifecycle`; how bytes move is `gateway.relay`. Breakers learn here
what became of each attempt.
"""

import asyncio
import hashlib
import hmac
import logging
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from billing.holds import BYTES_PER_TOKEN, USUAL_OUTPUT_TOKENS
from billing.money import to_minor_up
from config.defaults import Settings
from gateway.errors import NoNodeAvailable
from gateway.relay.downstream import EVENT_STREAM, ClientGone, Downstream
from gateway.relay.events import Tokens, add_cost, answer_tokens
from gateway.relay.exchange import Delivery, stream, whole
from gateway.relay.faults import EngineFault, check_answer, unreachable
from gateway.relay.tap_complete import CompleteTap
from gateway.relay.taps import Tap
from gateway.relay.tokens import estimate
from gateway.relay.upstream import ConnectFailed, UpstreamConnection, request_bytes
from gateway.relay.upstreams import Upstreams
from gateway.turn import Turn
from nodes.registry import Registry
from nodes.routing.router import Need, NoEngine, choose
from nodes.routing.snapshot import Engine

log = logging.getLogger("poolgate.turns")

OUTPUT_TOKENS_GUESS_MAX = 1024
"""What answers with a large token limit count for as load: few are longer."""

NO_NODE_RETRY_AFTER_S = 5

JSON = {"content-type": "application/json"}


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
        pepper: bytes,
        settle: Callable[[Turn], None],
        covers: Callable[[Turn, Tokens], int],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._pepper = pepper
        self._settle = settle
        self._covers = covers
        self._salts: dict[int, str] = {}
        self._rng = random.Random()  # noqa: S311 - spreads load, keeps no secret
        self.upstreams = Upstreams(settings)

    async def dispatch(self, turn: Turn, down: Downstream) -> None:
        """Try engines until one answers; another one only while the client got nothing but comments. Raises ApiError."""
        body = self._engine_body(turn)
        tokens = len(body) // BYTES_PER_TOKEN + _expected_output(turn)
        tried: list[Engine] = []
        faults: list[EngineFault] = []
        while len(tried) < self._settings.dispatch_attempts_max:
            engine = self._choose(turn, tokens, tried, faults)
            tried.append(engine)
            turn.engine = engine
            engine.began(tokens)
            try:
                await self._attempt(turn, engine, body, down)
                self._judge(tried, faults, is_answered=True)
                return
            except EngineFault as fault:
                faults.append(fault)
                self._note(turn, engine, fault)
                is_begun = turn.first_event_s is not None and not turn.ask.gathers
                turn.outcome = "engine_failed" if fault.may_retry or is_begun else "refused"
                if is_begun or not fault.may_retry:
                    break
            finally:
                engine.ended(tokens)
        self._judge(tried, faults, is_answered=False)
        raise faults[-1].error

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
        ask, settings = turn.ask, self._settings
        need = Need(turn.model, ask.kind, tokens, ask.provider_id, tried, context=tokens)
        snapshot = self._registry.snapshot
        try:
            return choose(
                snapshot,
                need,
                sample=settings.choice_sample,
                turns_max=settings.engine_turns_max,
                rng=self._rng,
            )
        except NoEngine as error:
            if faults:
                self._judge(tried, faults, is_answered=False)
                raise faults[-1].error from faults[-1]
            raise NoNodeAvailable(retry_after_s=NO_NODE_RETRY_AFTER_S) from error

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

    async def _attempt(self, turn: Turn, engine: Engine, body: bytes, down: Downstream) -> None:
        """Ask `engine`, on an idle connection first. That the engine has just closed that one says nothing of it."""
        pool = self.upstreams.pool(engine)
        request = request_bytes(engine.authority, turn.ask.engine_path, turn.request_id, body)
        connection = pool.idle()
        if connection is not None:
            try:
                await self._exchange(turn, connection, request, down)
                return
            except EngineFault:
                if not connection.was_stale:
                    raise
        try:
            connection = await pool.connect()
        except ConnectFailed as error:
            raise unreachable(str(error)) from error
        await self._exchange(turn, connection, request, down)

    async def _exchange(
        self, turn: Turn, connection: UpstreamConnection, request: bytes, down: Downstream
    ) -> None:
        """One request on one connection, which is kept if all went well and closed at once if not."""
        begun_s = time.monotonic()
        connection.begin(request)
        try:
            await self._relay(turn, connection, down)
        except BaseException:
            connection.close()
            raise
        assert turn.engine is not None
        if turn.outcome == "timeout":  # we ended it, not the engine, which should stop now
            connection.close()
            if turn.first_event_s is None:
                self._registry.engine_failed(turn.engine)
        else:
            connection.release()
            turn.engine.breaker.succeeded(begun_s)

    async def _relay(self, turn: Turn, connection: UpstreamConnection, down: Downstream) -> None:
        ask = turn.ask
        headers = {"x-request-id": turn.request_id, **turn.headers}
        if ask.tap is None:
            await self._relay_whole(turn, connection, down, headers)
            return
        tap = ask.tap()
        ends_at_s = None
        if ask.time_limit_s is not None:
            used_s = time.monotonic() - turn.started_s
            ends_at_s = asyncio.get_running_loop().time() + ask.time_limit_s - used_s
        delivery = Delivery(
            tap, down, EVENT_STREAM | headers, turn.first_event, partial(self._covers, turn),
            turn.bound.completion_tokens, ask.gathers, ends_at_s,
        )  # fmt: skip
        try:
            await stream(connection, delivery, self._settings)
        finally:
            if not ask.gathers and turn.first_event_s is not None:
                turn.delivered(tap.final_tokens())
        self._finish(turn, tap, down, headers)

    def _finish(self, turn: Turn, tap: Tap, down: Downstream, headers: dict[str, str]) -> None:
        """Settle, then send the last bytes."""
        if down.is_gone and turn.ask.gathers:
            raise ClientGone
        turn.delivered(tap.final_tokens())
        is_timeout = isinstance(tap, CompleteTap) and tap.timed_out
        turn.outcome, turn.status = "timeout" if is_timeout else "finished", 200
        self._settle(turn)
        cost_minor = to_minor_up(turn.amount_nano, self._settings.minor_per_major)
        if turn.ask.render is not None:
            down.answer(200, JSON | headers, turn.ask.render(turn, tap, cost_minor))
        else:
            down.finish(tap.ending(cost_minor))

    async def _relay_whole(
        self, turn: Turn, connection: UpstreamConnection, down: Downstream, headers: dict[str, str]
    ) -> None:
        body = await whole(connection, self._settings)
        check_answer(body)
        if down.is_gone:
            raise ClientGone
        turn.first_event()
        turn.delivered(answer_tokens(body) or _estimated(turn.ask.body, body))
        turn.outcome, turn.status = "finished", 200
        self._settle(turn)
        cost_minor = to_minor_up(turn.amount_nano, self._settings.minor_per_major)
        down.answer(200, JSON | headers, add_cost(body, cost_minor))


def _expected_output(turn: Turn) -> int:
    bound = turn.bound
    each = bound.output_tokens if bound.is_limited else min(USUAL_OUTPUT_TOKENS, bound.output_tokens)
    return min(bound.choices * each, OUTPUT_TOKENS_GUESS_MAX)


def _estimated(asked: dict[str, Any], answer: bytes) -> Tokens:
    prompt, completion = estimate(asked, answer)
    return Tokens(prompt=prompt, completion=completion, estimated=True)
