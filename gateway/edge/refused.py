"""Requests without a valid key in the log: who sends them, one line an interval, so that a flood can't fill it."""

import logging
from collections.abc import Callable
from typing import Any

from config.defaults import Settings
from gateway.edge.forwarded import client_address, networks

log = logging.getLogger("poolgate.edge")

LINE_S = 10.0
"""One line in so long; it says how many others there were since the last one."""


class RefusedKeys:
    """Told of each refused key by both doors; never of the key itself."""

    def __init__(self, settings: Settings, time: Callable[[], float]) -> None:
        """`time`: monotonic seconds."""
        self._trusted = networks(settings.trusted_proxies)
        self._time = time
        self._next_s = float("-inf")
        self._since = 0

    def add(self, transport: Any, forwarded_for: str) -> None:
        """One was refused on the connection of `transport`; `forwarded_for` is its request's X-Forwarded-For."""
        self._since += 1
        now_s = self._time()
        if now_s < self._next_s:
            return
        count, self._since, self._next_s = self._since, 0, now_s + LINE_S
        peername = transport.get_extra_info("peername") if transport is not None else None
        peer = peername[0] if isinstance(peername, tuple) else ""
        address = client_address(peer, forwarded_for, self._trusted) or "an unknown address"
        log.warning(
            "a request without a valid key was refused, from %s (%d since the last line)", address, count,
            extra={"action": "key_refused", "client": address, "count": count},
        )  # fmt: skip
