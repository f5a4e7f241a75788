"""Where a turn goes: the router's choice for it, or a place in the queue where every engine is full.

What a turn needs is said here in the router's words; asking the engine is `gateway.dispatch`.
"""

import json
from collections.abc import Sequence
from typing import Any

from config.defaults import Settings
from config.metrics import Metrics
from gateway.errors import EveryEngineFull, NoNodeAvailable
from gateway.hints import EXPLAIN
from gateway.relay.downstream import Downstream
from gateway.relay.faults import EngineFault
from gateway.turn import Turn
from gateway.waiting.queue import TurnQueue
from nodes.registry import Registry
from nodes.routing.explain import explain
from nodes.routing.filters import NO_WISHES
from nodes.routing.router import Need, NoEngine, Router
from nodes.routing.scorers import Policy
from nodes.routing.snapshot import Engine

NO_NODE_RETRY_AFTER_S = 5

CANDIDATES_TOLD = 8
"""Engines in the header of an explained answer: heads are short."""

ADMIN = "admin"
"""The scope whose keys may ask why."""


class Placement:
    """Finds engines for the turns of one worker."""

    def __init__(self, settings: Settings, *, registry: Registry, metrics: Metrics) -> None:
        self._registry = registry
        self.router = Router(
            Policy.of(settings), registry.prefixes, sessions_max=settings.routing_sessions_max
        )
        self.queue = TurnQueue(settings, registry=registry, route=self._route, metrics=metrics)
        registry.on_back = self.queue.pump_soon

    def choose(
        self, turn: Turn, tokens: int, tried: Sequence[Engine], last: EngineFault | None = None
    ) -> Engine:
        """The engine for a turn, which is taken to get it; `last` is what became of the last one tried.

        Raises EveryEngineFull where the turn may `wait` for one, NoNodeAvailable where not.
        """
        need, queue = self.need_of(turn, tokens, tried), self.queue
        if last is None and queue.waiting and queue.comes_after(need):
            raise EveryEngineFull(retry_after_s=queue.retry_after_s())
        hints = turn.ask.hints
        explained = None
        if hints is not None and hints.explains and ADMIN in turn.principal.scopes:
            explained = self.explain(need, CANDIDATES_TOLD)
        try:
            engine = self._route(need)
        except NoEngine as error:
            if error.is_full or (last is not None and is_full(last)):
                raise EveryEngineFull(retry_after_s=queue.retry_after_s()) from error
            raise NoNodeAvailable(retry_after_s=NO_NODE_RETRY_AFTER_S) from error
        if explained is not None:
            told = json.dumps({"chosen": engine.key, **explained}, separators=(",", ":"))
            turn.told = turn.told.with_more({EXPLAIN: told})
        return engine

    async def wait(self, turn: Turn, tokens: int, down: Downstream) -> Engine:
        """An engine for a turn that found every one full; to be taken at once. Raises NoNodeAvailable."""
        turn.outcome = "refused"  # what an engine that was full made of it is over
        return await self.queue.place(turn, self.need_of(turn, tokens, []), down)

    def need_of(self, turn: Turn, tokens: int, tried: Sequence[Engine]) -> Need:
        """What the turn asks of an engine."""
        ask, hints = turn.ask, turn.ask.hints
        return Need(
            turn.model, ask.kind, tokens, ask.provider_id, tried, tokens, turn.sent, turn.principal.account_id,
            NO_WISHES if hints is None else hints.wishes,
        )  # fmt: skip

    def explain(self, need: Need, shown_max: int) -> dict[str, Any]:
        """Why an engine would be chosen now, and others not."""
        return explain(self._registry.snapshot, need, self.router, shown_max=shown_max)

    def _route(self, need: Need) -> Engine:
        return self.router.route(self._registry.snapshot, need)


def is_full(fault: EngineFault) -> bool:
    """Whether the engine said that it has too much to do: it is there, and well."""
    return isinstance(fault.error, NoNodeAvailable) and not fault.is_broken
