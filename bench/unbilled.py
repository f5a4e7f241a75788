"""A gateway worker whose money is switched off, to measure what it costs: `python -m bench.unbilled` in place of a worker.

Only here: a gateway has no setting for it. Nothing is bounded, limited, held, priced to be charged, journaled or shipped;
keys, routing, relay, metrics and the log line of a turn are as in `gateway.worker`.
"""

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import gateway.admission
import gateway.app
from billing.holds import Bound
from billing.incarnations import Incarnation
from billing.limits.limiter import UNLIMITED
from config.clock import Clock
from config.defaults import Settings
from config.ids import uuid7
from gateway import worker

BOUND = Bound(
    prompt_tokens=100_000, output_tokens=4096, choices=1, is_limited=True, has_media=False, usual_prompt_tokens=0
)  # fmt: skip
"""What every request is taken for: more than any of the benchmarks'. Past its bound an answer would be cut, and what an
engine counted would be doubted in a warning for each turn."""


class Free:
    """A hold that took nothing and charges nothing; one is enough for all turns."""

    amount_nano = 0
    budgets = ()

    def extend(self, amount_nano: int) -> bool:
        return True

    def settle(self, amount_nano: int) -> tuple[int, int]:
        return 0, 0

    def void(self) -> None:
        """Nothing was set aside."""


class NoLeases:
    """Holds without leases."""

    def __init__(self) -> None:
        self.is_lost = asyncio.Event()
        self._hold = Free()

    def try_hold(self, *_: object) -> Free:
        return self._hold


class NoLimits:
    """Admits everybody."""

    def try_admit(self, *_: object) -> Any:
        return UNLIMITED


class NoJournal:
    """Takes records and keeps none."""

    is_full = False
    pending = 0

    def append(self, record: object) -> None:
        """Gone."""


class Unbilled:
    """In the place of gateway.money.Money."""

    claims = None

    def __init__(self, settings: Settings, *, clock: Clock, **_: object) -> None:
        self.incarnation = Incarnation(uuid7(), Path("none"))
        self.journal = NoJournal()
        self.leases = NoLeases()
        self.limiter = NoLimits()

    async def register(self) -> bool:
        return True

    def parts(self) -> list[Coroutine[Any, Any, None]]:
        return []

    def set_gauges(self) -> None:
        """Nothing waits."""

    async def close(self) -> None:
        """Nothing is left."""


def main() -> int:
    """As gateway.worker, which a supervisor starts and tells its settings and its socket."""
    replaced: Any = gateway
    replaced.app.Money = Unbilled
    replaced.admission.bound_of = lambda *_: BOUND
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
