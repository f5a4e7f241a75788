"""Watches an engine that somebody else runs (`--engine-url`).

Reports it as it is, or as draining while no new turns are to come; starting and stopping it is its owner's affair.
"""

import asyncio
from collections.abc import Awaitable, Callable

from config.defaults import Settings
from nodes.agent.orders import SERVE, Orders
from nodes.agent.probe import EngineProbe, ProbeFailed
from nodes.agent.slot import Slot
from nodes.agent.stopping import Stopping
from nodes.protocol import DRAINING, FAILED, GENERATE, READY, STOPPED

POLL_FAILURES_MAX = 3  # in a row; a first contact that fails counts at once
MODELS_POLL_S = 5.0


class AttachedEngine:
    """One slot with an engine of others. `run()` returns when stopping was asked."""

    def __init__(
        self,
        slot: Slot,
        *,
        probe: EngineProbe,
        announce: Callable[[], Awaitable[None]],
        stopping: Stopping,
        settings: Settings,
    ) -> None:
        self.slot = slot
        self.orders = Orders()
        self._probe = probe
        self._announce = announce
        self._stopping = stopping
        self._settings = settings
        self._kind = GENERATE
        self._models_at = 0.0

    async def run(self) -> None:
        failures = POLL_FAILURES_MAX
        while not self._stopping.asked.is_set():
            try:
                await self._look()
            except ProbeFailed as failure:
                failures += 1
                if failures >= POLL_FAILURES_MAX:
                    self.slot.move(FAILED, f"{self.slot.url} {failure}")
            else:
                failures = 0
                duty = self.orders.now
                self.slot.move(READY if duty.level == SERVE else DRAINING, duty.reason)
            await self._stopping.pause(self._settings.engine_poll_s)
        if self.slot.state == READY:
            self.slot.move(DRAINING)
            await self._announce()
        self.slot.move(STOPPED)

    async def _look(self) -> None:
        await self._probe.check_health()
        metrics = await self._probe.metrics()
        now = asyncio.get_running_loop().time()
        if self.slot.state not in (READY, DRAINING):
            self._kind = await self._probe.kind()
        if not self.slot.models or now - self._models_at > MODELS_POLL_S:
            self.slot.learn_models(await self._probe.models(self._kind))
            self._models_at = now
        self.slot.metrics = metrics
