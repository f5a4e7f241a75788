"""What this process's turns say about nodes, counted in memory and told to PostgreSQL now and then, beside the request path.

It feeds reputation and the comparison with what engines report (`nodes.reputation`); a crash loses some seconds of it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

from billing.usage import UsageRecord
from config.postgres import AWAY
from nodes.reputation import EngineTokens, ProviderTurns, ReputationStore
from nodes.routing.snapshot import Engine

log = logging.getLogger("poolgate.nodes")

ENGINES_MAX = 100_000
"""Engines counted while PostgreSQL is away; the turns of more are not told."""

SERVED_BELOW = 500
"""Statuses that are no fault of an engine."""


class Tally:
    """Counts turns and faults by provider, tokens by engine."""

    def __init__(self, store: ReputationStore, period_s: float) -> None:
        self._store = store
        self._period_s = period_s
        self._turns: Counter[int] = Counter()
        self._faults: Counter[int] = Counter()
        self._prompt: Counter[tuple[str, str]] = Counter()
        self._completion: Counter[tuple[str, str]] = Counter()

    def count(self, records: Sequence[UsageRecord]) -> None:
        """Turns that were settled."""
        sums: dict[tuple[str | None, str | None, int | None], list[int]] = {}  # there are few in a batch
        for record in records:
            by = record.node_id, record.engine_id, record.provider_id
            sum_ = sums.get(by)
            if sum_ is None:
                sum_ = sums[by] = [0, 0, 0]
            sum_[0] += record.status < SERVED_BELOW
            sum_[1] += record.prompt_tokens
            sum_[2] += record.completion_tokens
        for (node_id, engine_id, provider_id), (served, prompt, completion) in sums.items():
            if node_id is None or engine_id is None:
                continue
            if provider_id is not None and served:
                self._turns[provider_id] += served
            engine = node_id, engine_id
            if engine in self._prompt or len(self._prompt) < ENGINES_MAX:
                self._prompt[engine] += prompt
                self._completion[engine] += completion

    def count_fault(self, engine: Engine) -> None:
        """A turn failed by this engine's fault, whatever became of it."""
        self._faults[engine.account_id] += 1

    async def run(self) -> None:
        """Tell each `period_s`, until cancelled."""
        while True:
            await asyncio.sleep(self._period_s)
            await self.flush()

    async def flush(self) -> None:
        """Tell what was counted; it is kept where PostgreSQL is away."""
        turns, faults, prompt, completion = self._turns, self._faults, self._prompt, self._completion
        if not (turns or faults or prompt):
            return
        self._turns, self._faults, self._prompt, self._completion = Counter(), Counter(), Counter(), Counter()
        try:
            await self._store.add(
                [ProviderTurns(each, turns[each], faults[each]) for each in turns.keys() | faults.keys()],
                [EngineTokens(*engine, prompt[engine], completion[engine]) for engine in prompt],
            )
        except AWAY as error:
            log.debug("what nodes did is told later: %s", error, extra={"action": "tally_kept"})
            self._turns.update(turns)
            self._faults.update(faults)
            self._prompt.update(prompt)
            self._completion.update(completion)
