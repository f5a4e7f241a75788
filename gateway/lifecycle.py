"""The life of a turn: admit, dispatch, settle. Every surface's inference request passes through `run`.

What a surface looks like is `gateway.api`; which engine a turn goes to and how it is relayed is `gateway.dispatch`. A turn
is settled exactly once whatever way it ended, in memory, before its last bytes go out; nothing here waits for a database.
"""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

from billing.prices import PriceBook, cost_nano
from billing.usage import UsageRecord
from config.clock import Clock
from config.defaults import Settings
from gateway.dispatch import NO_NODE_RETRY_AFTER_S, Dispatcher
from gateway.errors import ApiError, InsufficientQuota, ModelNotFound, Unavailable, error_event
from gateway.identity.keyring import Principal
from gateway.relay.downstream import ClientGone, Downstream
from gateway.relay.upstreams import Upstreams
from gateway.turn import Ask, Turn
from nodes.registry import Registry


class Lifecycle:
    """Runs turns. `record` gets one usage record for each, in memory; `is_full` says that no more can be taken."""

    def __init__(
        self,
        settings: Settings,
        *,
        registry: Registry,
        prices: PriceBook,
        clock: Clock,
        pepper: bytes,
        record: Callable[[UsageRecord], None],
        is_full: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._prices = prices
        self._clock = clock
        self._record = record
        self._is_full = is_full
        self._dispatcher = Dispatcher(settings, registry=registry, pepper=pepper, settle=self._settle)
        self._running: set[asyncio.Task[Any]] = set()
        self._cut: set[asyncio.Task[Any]] = set()

    async def run(self, ask: Ask, principal: Principal, request_id: str, down: Downstream) -> Turn:
        """One whole turn. Raises ApiError only while nothing was sent to the client."""
        turn = self._admit(ask, principal, request_id)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            await self._dispatcher.dispatch(turn, down)
        except ApiError as error:
            self._refuse(turn, down, error)
        except asyncio.CancelledError:
            if task not in self._cut or down.is_gone:
                turn.outcome = "client_gone"
                raise
            task.uncancel()
            turn.outcome = "cut"
            self._refuse(turn, down, Unavailable("The service is restarting. Try again.", retry_after_s=1))
        except ClientGone:
            turn.outcome = "client_gone"
            raise
        except Exception:
            turn.outcome, turn.status = "crashed", ApiError.status
            raise
        finally:
            self._running.discard(task)
            self._cut.discard(task)
            self._settle(turn)
        return turn

    def _refuse(self, turn: Turn, down: Downstream, error: ApiError) -> None:
        """Say `error` in the way that is still open: raised while nothing was sent, else as the stream's last event."""
        turn.status = error.status
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
        return len(self._running)

    def cut_all(self) -> None:
        """End every turn now, charged for what was delivered, its client told."""
        for task in list(self._running):
            self._cut.add(task)
            task.cancel()

    def _admit(self, ask: Ask, principal: Principal, request_id: str) -> Turn:
        """May this key have this turn at all? Limits, budgets and the hold have their place here, after the funds."""
        model = ask.body["model"]
        if principal.models is not None and model not in principal.models:
            raise ModelNotFound(param="model")
        served = self._registry.snapshot.by_model.get(model)
        if served is None and model not in self._prices.models():
            raise ModelNotFound(param="model")
        if served is not None and all(engine.models[model].kind != ask.kind for engine in served):
            raise ModelNotFound(f"The model can't be used with {ask.route}.", param="model")
        if not principal.has_funds:
            raise InsufficientQuota
        if self._is_full():
            raise Unavailable(retry_after_s=NO_NODE_RETRY_AFTER_S)
        now = self._clock.now()
        turn_id = uuid.UUID(request_id.removeprefix("req_"))
        return Turn(turn_id, request_id, principal, ask, model, self._prices.price(model, now), now)

    def _settle(self, turn: Turn) -> None:
        """Price what was delivered and record it: once, in memory, whatever way the turn ended."""
        if turn.is_settled:
            return
        turn.is_settled = True
        tokens = turn.tokens
        turn.amount_nano = cost_nano(turn.price, tokens.prompt, tokens.cached, tokens.completion)
        self._record(turn.usage_record())
