"""The life of a turn: admit, dispatch, settle. Every surface's inference request passes through `run`.

What a surface looks like is `gateway.api`; whether a turn may begin is `gateway.admission`; which engine it goes to and how
it is relayed is `gateway.dispatch`. A turn is settled exactly once whatever way it ended, in memory and in the journal,
before its last bytes go out.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from billing.prices import cost_nano
from billing.usage import UsageRecord
from config.defaults import Settings
from gateway.admission import Admission
from gateway.dispatch import Dispatcher
from gateway.errors import ApiError, Unavailable, error_event
from gateway.flight import Flight
from gateway.identity.keyring import Principal
from gateway.relay.downstream import ClientGone, Downstream
from gateway.relay.events import Tokens
from gateway.relay.upstreams import Upstreams
from gateway.turn import OVERRUN_STEP, Ask, Turn
from nodes.registry import Registry

log = logging.getLogger("poolgate.turns")

Landed = Callable[[Flight], None]
"""Told once that a flight is over: its answer was sent, or its `error` is set and `carry` goes on from there."""


def restarting() -> Unavailable:
    """What a turn is told that outlives its process's grace."""
    return Unavailable("The service is restarting. Try again.", retry_after_s=1)


class Lifecycle:
    """Runs turns. `record` gets one usage record for each, which is safe from the process's death when it returns."""

    def __init__(
        self,
        settings: Settings,
        *,
        registry: Registry,
        admission: Admission,
        pepper: bytes,
        record: Callable[[UsageRecord], None],
    ) -> None:
        self._admission = admission
        self._record = record
        self._dispatcher = Dispatcher(
            settings, registry=registry, pepper=pepper, settle=self._settle, covers=self._covers
        )
        self._running: set[asyncio.Task[Any]] = set()
        self._cut: set[asyncio.Task[Any]] = set()

    async def run(
        self,
        ask: Ask,
        principal: Principal,
        request_id: str,
        down: Downstream,
        *,
        idempotency_key: str | None = None,
    ) -> Turn:
        """One whole turn. Raises ApiError only while nothing was sent to the client."""
        turn = await self._admission.admit(ask, principal, request_id)
        turn.idempotency_key = idempotency_key
        await self.carry(turn, down)
        return turn

    async def carry(
        self, turn: Turn, down: Downstream, failed: Flight | None = None, landed: Landed | None = None
    ) -> Flight | None:
        """An admitted turn, or what a `failed` flight left of one, to its end. Raises ApiError only while nothing was sent.

        With `landed` only until it is under way: then its flight is returned.
        """
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        flight = None
        try:
            flight = await self._dispatcher.dispatch(turn, down, failed, landed)
        except ApiError as error:
            self._refuse(turn, down, error)
        except asyncio.CancelledError:
            if task not in self._cut or down.is_gone:
                turn.outcome = "client_gone"
                raise
            task.uncancel()
            turn.outcome = "cut"
            self._refuse(turn, down, restarting())
        except ClientGone:
            turn.outcome = "client_gone"
            raise
        except Exception:
            turn.outcome, turn.status = "crashed", ApiError.status
            raise
        finally:
            self._running.discard(task)
            self._cut.discard(task)
            if flight is None:
                self._settle(turn)
        return flight

    # --- without a task -----------------------------------------------------------------------------------------

    async def send_off(
        self, ask: Ask, principal: Principal, request_id: str, down: Downstream, landed: Landed
    ) -> Flight | None:
        """Admit a turn and `carry` it until it is under way."""
        return await self.carry(await self._admission.admit(ask, principal, request_id), down, landed=landed)

    def try_admit(self, ask: Ask, principal: Principal, request_id: str) -> Turn | None:
        """The turn, if memory alone can tell that it may begin; None: `run` it. Raises ApiError."""
        return self._admission.try_admit(ask, principal, request_id)

    def launch(self, turn: Turn, down: Downstream, landed: Landed) -> Flight | None:
        """Send an admitted turn off without a task; None: `carry` it. Raises ApiError, having sent nothing."""
        try:
            return self._dispatcher.launch(turn, down, landed)
        except ApiError as error:
            self._refuse(turn, down, error)
            raise
        except Exception:
            turn.outcome, turn.status = "crashed", ApiError.status
            self._settle(turn)
            raise

    def leave(self, turn: Turn, flight: Flight | None) -> None:
        """The client of a turn that no task sees to has left."""
        if flight is not None:
            flight.abandon()
        if not turn.is_settled:
            turn.outcome = "client_gone"
            self._settle(turn)

    def _refuse(self, turn: Turn, down: Downstream, error: ApiError) -> None:
        """Say `error` in the way that is still open: raised while nothing was sent, else as the stream's last event."""
        turn.status = error.status
        error.headers |= turn.told
        self._settle(turn)
        if not down.is_started:
            raise error
        down.finish(error_event(error))

    @property
    def upstreams(self) -> Upstreams:
        """The connections to engines."""
        return self._dispatcher.upstreams

    @property
    def in_flight(self) -> int:
        """Turns that have not ended."""
        return len(self._running) + len(self._dispatcher.flights)

    def cut_all(self) -> None:
        """End every turn now, charged for what was delivered, its client told."""
        for task in list(self._running):
            self._cut.add(task)
            task.cancel()
        for flight in list(self._dispatcher.flights):
            flight.turn.outcome = "cut"
            flight.fail(restarting())

    async def run_clock(self) -> None:
        """End what takes longer than it may, and tell clients that wait, until cancelled."""
        while True:
            await asyncio.sleep(self._dispatcher.late_s)
            self._dispatcher.end_late()

    def _covers(self, turn: Turn, tokens: Tokens) -> int:
        """Output tokens that are paid for, once an engine went past the limit: the hold grows while the lease has room."""
        paid = turn.paid_tokens + OVERRUN_STEP
        prompt = min(tokens.prompt, turn.bound.prompt_tokens)
        lacking = self._cost(turn, Tokens(prompt=prompt, completion=paid)) - turn.hold.amount_nano
        if tokens.completion > paid or (lacking > 0 and not turn.hold.extend(lacking)):
            return 0
        turn.overrun_tokens += OVERRUN_STEP
        return paid

    def _cost(self, turn: Turn, tokens: Tokens) -> int:
        return cost_nano(turn.price, tokens.prompt, tokens.cached, tokens.completion, turn.ask.price_percent)

    def _settle(self, turn: Turn) -> None:
        """Price what was delivered, charge the hold with it and journal it: once, in memory, whatever way the turn ended."""
        if turn.is_settled:
            return
        turn.is_settled = True
        turn.amount_nano, turn.loss_nano = turn.hold.settle(self._cost(turn, turn.tokens))
        turn.quota.end(turn.limited_tokens)
        if turn.is_overcounted and turn.engine is not None:
            log.warning(
                "%s counted more than it can have done", turn.engine.key,
                extra={"action": "usage_disbelieved", "request_id": turn.request_id, "engine": turn.engine.key},
            )  # fmt: skip
        self._record(turn.usage_record())
