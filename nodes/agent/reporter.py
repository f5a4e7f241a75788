"""Tells the gateway how the node is: a heartbeat each interval, and at once when an engine changes state.

Never gives up: a gateway that is away is asked again with growing pauses. What a heartbeat says is put
together by `main`.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp

from config.defaults import Settings
from nodes.agent.backoff import Backoff
from nodes.protocol import HEARTBEAT_PATH, BadMessage, Heartbeat, HeartbeatReply

log = logging.getLogger("poolgate.agent")

TIMEOUT_S = 10.0  # a gateway answers in milliseconds
RETRY_FIRST_S = 0.5
RETRY_MOST_S = 30.0  # the contract's interval: an agent without a gateway asks no more often than one with it
REFUSED_RETRY_S = 60.0  # a bad key does not get better by itself; an approval may come
GAP_S = 0.1  # changes this close together go in one heartbeat
ANSWER_BYTES_MAX = 2**20
INTERVAL_MOST_S = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one heartbeat: a reply, or what was wrong (`is_refused`: with our key, not with the gateway)."""

    reply: HeartbeatReply | None = None
    trouble: str = ""
    is_refused: bool = False
    retry_after_s: float = 0.0


class Reporter:
    """Call `changed()` when there is news; `await announce()` to know that it has arrived."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        gateway: str,
        describe: Callable[[int], Awaitable[Heartbeat]],
        settings: Settings,
        heard: Callable[[HeartbeatReply], None] = lambda reply: None,
    ) -> None:
        self._session = session
        self._tell = heard
        self._url = gateway.rstrip("/") + HEARTBEAT_PATH
        self._describe = describe  # gets the epoch
        self._interval_s = settings.heartbeat_interval_s
        self._lease_s = settings.heartbeat_grace_s
        self._backoff = Backoff(RETRY_FIRST_S, RETRY_MOST_S)
        self._news = asyncio.Event()
        self._heard: list[asyncio.Future[None]] = []
        self._epoch = 0
        self._leased_at: float | None = None  # loop time of the last good heartbeat
        self._complaint = ""
        self._is_outdated = False

    def changed(self) -> None:
        self._news.set()

    async def announce(self, timeout_s: float = 2.0) -> None:
        """Send what is now, and wait until it has arrived or the time has passed."""
        heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heard.append(heard)
        self._news.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await heard

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._news.clear()
            waiting, self._heard = self._heard, []
            outcome = await self._beat()
            if outcome.reply is None:
                self._heard = waiting + self._heard
                self._complain(outcome)
                self._watch_lease()
                await asyncio.sleep(self._retry_pause(outcome))
                continue
            self._accept(outcome.reply)
            for heard in waiting:
                if not heard.done():
                    heard.set_result(None)
            await asyncio.sleep(GAP_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._interval_s - GAP_S)):
                    await self._news.wait()

    async def _beat(self) -> Outcome:
        heartbeat = await self._describe(self._epoch)
        try:
            async with self._session.post(
                self._url,
                json=heartbeat.to_json(),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
                allow_redirects=False,  # the key must not travel to where a redirect points
            ) as response:
                body = await response.content.read(ANSWER_BYTES_MAX)
                return read_outcome(response.status, body, response.headers.get("Retry-After", ""))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return Outcome(trouble=f"can't be reached: {str(error) or type(error).__name__}")

    def _retry_pause(self, outcome: Outcome) -> float:
        if outcome.is_refused:
            return REFUSED_RETRY_S
        return max(self._backoff.next_s(), min(outcome.retry_after_s, INTERVAL_MOST_S))

    def _accept(self, reply: HeartbeatReply) -> None:
        if self._complaint or self._leased_at is None:
            log.info("registered with the gateway", extra={"action": "node_registered"})
        self._complaint = ""
        self._backoff.reset()
        self._epoch = reply.epoch
        self._leased_at = asyncio.get_running_loop().time()
        if reply.heartbeat_interval_s:
            self._interval_s = min(reply.heartbeat_interval_s, INTERVAL_MOST_S)
        if reply.lease_s:
            self._lease_s = reply.lease_s
        if reply.needs_update and not self._is_outdated:
            log.warning(
                "this agent is older than the gateway wants (%s): update poolgate on this host",
                reply.min_version,
                extra={"action": "agent_outdated"},
            )
        self._is_outdated = reply.needs_update
        self._tell(reply)

    def _complain(self, outcome: Outcome) -> None:
        """Once for each kind of trouble, not once a try."""
        if outcome.trouble == self._complaint:
            return
        self._complaint = outcome.trouble
        action = "key_refused" if outcome.is_refused else "gateway_away"
        level = logging.ERROR if outcome.is_refused else logging.WARNING
        log.log(level, "gateway %s %s", self._url, outcome.trouble, extra={"action": action})

    def _watch_lease(self) -> None:
        if self._leased_at is None:
            return
        silent_s = asyncio.get_running_loop().time() - self._leased_at
        if silent_s > self._lease_s:
            self._leased_at = None
            log.warning(
                "no heartbeat has arrived for %.0f s: the gateway takes this node as gone; its engines stay up",
                silent_s,
                extra={"action": "lease_expired"},
            )


def read_outcome(status: int, body: bytes, retry_after: str) -> Outcome:
    """What the gateway's answer means."""
    if status == 200:
        try:
            return Outcome(reply=HeartbeatReply.from_json(json.loads(body)))
        except (BadMessage, ValueError) as error:
            return Outcome(trouble=f"answered something else than a heartbeat's reply: {error}")
    said = _error_text(body)
    if status == 401:
        return Outcome(trouble=f"refuses the key ({said})", is_refused=True)
    if status == 403:
        return Outcome(trouble=f"has not approved this provider: {said}", is_refused=True)
    seconds = float(retry_after) if retry_after.isdigit() else 0.0
    return Outcome(trouble=f"answered {status}: {said}", retry_after_s=seconds)


def _error_text(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return str(text)[:300]
