"""Limits on requests that are not turns: so many of a kind from one address, key or node in a window.

Counted in Valkey over all processes, exactly; while it is away each process counts alone. What a turn may cost and how
many an account may ask is billing's.
"""

import asyncio
import ipaddress
import logging
import math
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from redis.asyncio import Redis
from redis.exceptions import RedisError

from config.defaults import Settings
from config.gathering import Gathering
from config.valkey import end_if_cancelled
from gateway.edge.forwarded import client_address, networks
from gateway.errors import RateLimited

log = logging.getLogger("poolgate.limits")

SCRIPT = (Path(__file__).parent / "request_limits.lua").read_text()

MINUTE_S, HOUR_S = 60.0, 3600.0

SUBJECTS_MAX = 10_000
"""Of one process while Valkey is away; the one that was not seen for longest is forgotten."""

GATHERED_MAX = 256
"""Requests counted by one call to Valkey: those that came while the call before was under way."""

BEATS_GAP_S = 0.05
"""Heartbeats wait for each other this long, so that thousands of nodes ask Valkey 20 times a second. Nothing else does: who
asks one thing after the other would feel it."""

NEWS_FACTOR = 5
"""Our agent reports at once when an engine changes state, beside its beats: that many times the contract's number."""

UNLIMITED = ("/api/health", "/api/docs")
"""Answered from memory; balancers ask for the first one."""


@dataclass(frozen=True, slots=True)
class Rule:
    """So many requests of a kind in a window."""

    kind: str
    limit: int
    window_s: float


class RequestLimits:
    """`admit` counts a request or raises RateLimited."""

    def __init__(self, valkey: Redis, settings: Settings) -> None:
        self._script = valkey.register_script(SCRIPT)
        self._timeout_s = settings.valkey_timeout_s
        self._trusted = networks(settings.trusted_proxies)
        self._asked = Gathering(self._ask, gap_s=0.0, most=GATHERED_MAX)
        self._beats = Gathering(self._ask, gap_s=BEATS_GAP_S, most=GATHERED_MAX)
        self._alone: OrderedDict[str, deque[float]] = OrderedDict()
        self._is_alone = False
        self._any = Rule("api", settings.api_requests_minute, MINUTE_S)
        # Twice what the interval asks for, which is the contract's number at its interval, must always fit.
        beats = max(
            settings.heartbeat_requests_minute, math.ceil(2 * MINUTE_S / settings.heartbeat_interval_s)
        )
        self._heartbeat = Rule("heartbeat", beats, MINUTE_S)
        self._own_heartbeat = Rule("own_heartbeat", NEWS_FACTOR * beats, MINUTE_S)
        self._by_path = {
            "/api/providers/register": Rule("register", settings.register_requests_hour, HOUR_S),
            "/api/providers/marketplace": Rule("marketplace", settings.marketplace_requests_minute, MINUTE_S),
            "/api/providers/heartbeat": None,  # counted by node, once its key is known
        }
        self._admin = Rule("admin", settings.admin_requests_minute, MINUTE_S)

    def rule_of(self, path: str) -> Rule | None:
        """What limits requests for a path by their address."""
        if not path.startswith("/api/") or path.startswith(UNLIMITED):
            return None
        if path.startswith("/api/admin/"):
            return self._admin
        return self._by_path.get(path, self._any)

    async def admit_address(self, request: web.Request) -> None:
        """Count a request by its address, as its path asks."""
        rule = self.rule_of(request.path)
        if rule is not None:
            await self.admit(rule, f"ip:{self._address(request)}")

    async def admit_key(self, key_id: int) -> None:
        """Count a request by its key: one key from many addresses gets no more than one address does."""
        await self.admit(self._any, f"key:{key_id}")

    async def admit_beat(self, node_id: str, *, is_ours: bool) -> None:
        """Count a heartbeat by its node; `is_ours`: of our own agent, which tells news at once."""
        await self.admit(self._own_heartbeat if is_ours else self._heartbeat, f"node:{node_id}")

    async def admit_bad_beat(self, request: web.Request) -> None:
        """Count a heartbeat without a valid key by its address."""
        await self.admit(self._heartbeat, f"ip:{self._address(request)}")

    async def admit(self, rule: Rule, subject: str) -> None:
        """Raises RateLimited with the time until there is room."""
        asked = self._beats if rule in (self._heartbeat, self._own_heartbeat) else self._asked
        wait_s = await asked.add((rule, f"poolgate:requests:{rule.kind}:{subject}"))
        if wait_s > 0:
            raise RateLimited(
                f"Too many requests: {rule.limit} in {rule.window_s:g} s are allowed. Try again later.",
                retry_after_s=math.ceil(wait_s),
            )

    async def _ask(self, asked: list[tuple[Rule, str]]) -> list[float]:
        """Until when each has to wait, in seconds."""
        keys = [name for _, name in asked]
        bounds = [bound for rule, _ in asked for bound in (round(rule.window_s * 1e6), rule.limit)]
        try:
            async with asyncio.timeout(self._timeout_s):
                waits_us = await self._script(keys=keys, args=bounds)
        except (RedisError, OSError, TimeoutError) as error:
            end_if_cancelled()
            self._tell_alone(error)
            return [self._count_alone(rule, name) for rule, name in asked]
        self._is_alone = False
        return [int(wait_us) / 1e6 for wait_us in waits_us]

    def _tell_alone(self, error: Exception) -> None:
        if not self._is_alone:
            log.warning(
                "Valkey is away, so this process counts requests alone: %s", error or type(error).__name__,
                extra={"action": "request_limits_local"},
            )  # fmt: skip
        self._is_alone = True

    def _count_alone(self, rule: Rule, name: str) -> float:
        now_s = time.monotonic()
        times = self._alone.pop(name, None) or deque()
        self._alone[name] = times
        while len(self._alone) > SUBJECTS_MAX:
            self._alone.popitem(last=False)
        while times and times[0] <= now_s - rule.window_s:
            times.popleft()
        if len(times) >= rule.limit:
            return times[len(times) - rule.limit] + rule.window_s - now_s
        times.append(now_s)
        return 0.0

    def _address(self, request: web.Request) -> str:
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        address = peer[0] if isinstance(peer, tuple) else ""
        forwarded = ",".join(request.headers.getall("X-Forwarded-For", ()))
        return _whose(client_address(address, forwarded, self._trusted))


def _whose(address: str) -> str:
    """Who has one address of IPv6 has the 2^64 beside it, too."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if ip.version == 4:
        return address
    return str(ipaddress.ip_network((ip, 64), strict=False))


def limited(limits: RequestLimits) -> Middleware:
    """Counts every request by its address."""

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        await limits.admit_address(request)
        return await handler(request)

    return count
