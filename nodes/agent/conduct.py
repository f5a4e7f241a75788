"""How the node behaves as a whole: what is wanted of it, its provider's preferences, its heat and its lease become duties.

The decisions are `preferences`', obeying is the engines'. Says once, with the reason, whenever the node's duty changes.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, time
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from config.defaults import Settings
from nodes.agent.inventory import Inventory
from nodes.agent.lease import Lease
from nodes.agent.orders import HOLD, SERVE, SERVING, Duty
from nodes.agent.plan import Device, devices_of
from nodes.agent.preferences import Heat, Preferences, duty_of, heat_now, read_preferences
from nodes.agent.stopping import Stopping
from nodes.control_messages import SERVE as WANTED_SERVE
from nodes.control_messages import WANTED
from nodes.protocol import HeartbeatReply

log = logging.getLogger("poolgate.agent")

TELEMETRY_LOOKS = 5
"""GPUs are asked at each fifth look: a driver takes some milliseconds, and heat comes slowly."""

UNLEASED = Duty(HOLD, "the gateway has not been heard for so long that this node's lease ran out")

Conducts = Callable[[str, Duty], None]
Event = Callable[[str, str, str], None]


class Conduct:
    """`conduct(side, duty)` passes a duty on to all engines; `event(type, severity, details)` tells the gateway."""

    def __init__(
        self,
        *,
        inventory: Inventory,
        lease: Lease,
        settings: Settings,
        conduct: Conducts,
        refit: Callable[[], None],
        event: Event,
        stopping: Stopping,
    ) -> None:
        self._inventory, self._lease, self._settings = inventory, lease, settings
        self._conduct, self._refit, self._event, self._stopping = conduct, refit, event, stopping
        self.preferences = self._with_own_limit(Preferences())
        self.wanted = WANTED_SERVE
        self._was_started = False
        self._heat = Heat()
        self._temp_c = 0.0
        self._duty = SERVING
        self._was_leased = True

    async def run(self) -> None:
        """Until stopping is asked: a node that ends needs no conduct."""
        looks = 0
        while not self._stopping.asked.is_set():
            if looks % TELEMETRY_LOOKS == 0:
                self._temp_c = hottest(await asyncio.to_thread(self._inventory.gpu_status))
            looks += 1
            self.apply()
            await self._stopping.pause(self._settings.engine_poll_s)

    def devices(self) -> tuple[Device, ...]:
        """What engines may take of this host now."""
        return devices_of(
            self._inventory.vram_mib, self._inventory.ram_mib,
            cap_pct=self.preferences.gpu_usage_cap_pct, reserve_gb=self.preferences.vram_reserve_gb,
        )  # fmt: skip

    def learn(self, reply: HeartbeatReply) -> None:
        """A heartbeat's reply tells what is wanted and preferred."""
        before = self.preferences
        self.preferences = self._with_own_limit(read_preferences(reply.preferences))
        self.want(reply.wanted)
        if before.gpu_usage_cap_pct != self.preferences.gpu_usage_cap_pct or (
            before.vram_reserve_gb != self.preferences.vram_reserve_gb
        ):
            self._refit()

    def want(self, wanted: str) -> None:
        """One of control_messages.WANTED; what this agent does not know changes nothing."""
        if wanted in WANTED:
            if wanted == WANTED_SERVE != self.wanted:
                self._was_started = True
            self.wanted = wanted
        self.apply()

    def was_started(self) -> None:
        """A person asked for an engine: that is what `run_mode` manual waits for."""
        self._was_started = True
        self.apply()

    def apply(self) -> None:
        """Decide, and pass on what has changed."""
        now_s = asyncio.get_running_loop().time()
        self._heat = heat_now(self._heat, self.preferences.temp_limit_c, self._temp_c, now_s)
        duty = duty_of(
            self.preferences, wanted=self.wanted, heat=self._heat, at=_clock(self.preferences.time_zone),
            was_started=self._was_started,
        )  # fmt: skip
        if duty != self._duty:
            self._say(duty)
            self._duty = duty
            self._conduct("node", duty)
        if self._lease.is_held != self._was_leased:
            self._was_leased = self._lease.is_held
            self._conduct("lease", SERVING if self._was_leased else UNLEASED)
            if not self._was_leased:
                log.warning("no new turns: %s", UNLEASED.reason, extra={"action": "lease_expired"})

    def _with_own_limit(self, preferences: Preferences) -> Preferences:
        """The lower of the provider's limit and this host's own."""
        limits = [limit for limit in (preferences.temp_limit_c, self._settings.temp_limit_c) if limit]
        return replace(preferences, temp_limit_c=min(limits, default=0))

    def _say(self, duty: Duty) -> None:
        if duty.level == SERVE:
            log.info("this node serves again", extra={"action": "node_serves"})
            self._event("serving", "info", "serves again")
            return
        log.warning("this node does not serve: %s", duty.reason, extra={"action": f"node_{duty.level}"})
        kind = "overheated" if self._heat.since_s is not None else "not_serving"
        self._event(kind, "warning", f"{duty.reason} (hottest GPU: {self._temp_c:.0f} °C)")


def _clock(time_zone: str) -> time:
    """The time there; the host's own where the zone is not known to it."""
    try:
        return datetime.now(ZoneInfo(time_zone) if time_zone else None).time()
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return datetime.now().astimezone().time()


def hottest(gpu_status: dict[str, Any]) -> float:
    """Of a host's GPUs, in °C; 0 where nothing tells."""
    return max((float(gpu.get("temp_c") or 0) for gpu in gpu_status["all_gpus"]), default=0.0)
