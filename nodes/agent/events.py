"""Tells the gateway what happened on this node (`daemon-event`), and once at the start whether it is fit (`readiness`).

Bounded: when the gateway is away the oldest events are dropped first. What is worth an event is decided where it happens.
"""

import asyncio
import logging
import platform
import socket
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import aiohttp

from nodes.agent.backoff import Backoff
from nodes.protocol import AGENT_VERSION

log = logging.getLogger("poolgate.agent")

EVENT_PATH = "/api/providers/daemon-event"
READINESS_PATH = "/api/providers/readiness"
DETAILS_MAX = 5000  # the contract's
WAITING_MAX = 100
TIMEOUT_S = 10.0
RETRY_FIRST_S, RETRY_MOST_S = 1.0, 60.0
GIVEN_UP = (400, 404, 405, 413, 422)  # it will not be taken the next time either


class Events:
    """`note(type, severity, details)` at any time; `run()` sends."""

    def __init__(self, session: aiohttp.ClientSession, *, gateway: str, key: str, node_id: str) -> None:
        self._session, self._gateway, self._key = session, gateway.rstrip("/"), key
        self._node_id = node_id
        self._waiting: deque[tuple[str, dict[str, Any]]] = deque(maxlen=WAITING_MAX)
        self._news = asyncio.Event()
        self._backoff = Backoff(RETRY_FIRST_S, RETRY_MOST_S)

    def note(self, event_type: str, severity: str, details: str) -> None:
        """`severity` is info, warning, error or critical."""
        self._add(
            EVENT_PATH,
            {
                "event_type": event_type,
                "severity": severity,
                "daemon_version": AGENT_VERSION,
                "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                "hostname": socket.gethostname(),
                "os_info": platform.platform(),
                "python_version": platform.python_version(),
                "details": details[-DETAILS_MAX:],
            },
        )

    def crashed(self, engine_id: str, reason: str) -> None:
        self.note("crash", "error", f"engine {engine_id} {reason}")

    def ready(self, checks: Mapping[str, Any]) -> None:
        """What this host has: `cuda`, `pytorch`, `vram_gb`, `driver`."""
        self._add(READINESS_PATH, {"daemon_version": AGENT_VERSION, "checks": dict(checks)})

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                path, body = self._waiting[0]
                if await self._send(path, body):
                    self._backoff.reset()
                    if self._waiting and self._waiting[0][1] is body:
                        self._waiting.popleft()
                else:
                    await asyncio.sleep(self._backoff.next_s())

    def _add(self, path: str, body: dict[str, Any]) -> None:
        self._waiting.append((path, body))
        self._news.set()

    async def _send(self, path: str, body: dict[str, Any]) -> bool:
        """Whether there is nothing more to do about it."""
        try:
            async with self._session.post(
                self._gateway + path,
                json={"api_key": self._key, "node_id": self._node_id, **body},
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
                allow_redirects=False,
            ) as answer:
                if answer.status in GIVEN_UP:
                    log.debug("an event was not taken: %d", answer.status, extra={"action": "event_refused"})
                return answer.status == 200 or answer.status in GIVEN_UP
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False
