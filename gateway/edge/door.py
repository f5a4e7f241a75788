"""All client connections of one worker: where they begin, what they share, and how they end when the worker does."""

import asyncio
from collections.abc import Callable

from config.defaults import Settings
from config.metrics import Metrics
from gateway.edge.connection import EdgeConnection, Turns
from gateway.edge.cors import Cors
from gateway.edge.handover import ClientProtocol
from gateway.edge.head import Head
from gateway.edge.refusals import refusal
from gateway.edge.refused import RefusedKeys
from gateway.errors import ApiError, BadRequest
from gateway.hints import NAMES as HINTS
from gateway.hints import hints_of
from gateway.relay.downstream import whole_head
from gateway.turn import new_request_id

NAMES = frozenset(name.encode() for name in HINTS)

TICK_S = 0.5
"""How often connections are looked at for being late: their bounds are seconds, and a timer each would cost more."""


class Door:
    """Makes connections, each of which asks it for what it needs.

    `now_s` is the loop's time, at most TICK_S old. `first_s` is what a new connection has for its first request's head,
    `idle_s` what one that was answered has until the next one begins.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        turns: Turns,
        handler: Callable[[], ClientProtocol],
        cors: Cors,
        refused_keys: RefusedKeys,
        metrics: Metrics,
    ) -> None:
        """`handler` makes aiohttp's part of a connection."""
        self.settings = settings
        self.turns = turns
        self.refused_keys = refused_keys
        self.handler = handler
        # Those whose handshake is under way and those whose last answer is still being read are among them.
        self.connections: set[EdgeConnection] = set()
        self.first_s = settings.head_timeout_s
        self.idle_s = settings.client_idle_s
        self.time = asyncio.get_running_loop().time
        self.now_s = self.time()
        self._cors = cors
        self._metrics = metrics

    def __call__(self) -> EdgeConnection:
        """A new connection (asyncio's protocol factory).

        With TLS it is made before the handshake. One that fails is not told to anybody, so it is forgotten when it is late.
        """
        connection = EdgeConnection(self)
        connection.ends_s = self.time() + self.settings.tls_handshake_s
        self.connections.add(connection)
        return connection

    def takes(self, head: Head) -> bool:
        """Whether this is a request for a turn that the edge serves itself; what it learns of it is kept in the head."""
        route = self.turns.routes.get(head.target) if head.method == b"POST" else None
        if route is None or not head.is_plain_json or head.body_bytes > self.settings.body_bytes_max:
            return False
        fields = head.fields
        if not NAMES.isdisjoint(fields):
            try:
                head.hints = hints_of(lambda name: fields.get(name.encode(), b"").decode("latin-1") or None)
            except BadRequest:  # which is rendered there
                return False
        head.for_ = route
        head.body_bytes_max = self.settings.body_bytes_max
        origin = head.fields.get(b"origin")
        head.own_lines = self._cors.lines(None if origin is None else origin.decode("latin-1"))
        head.slim()
        return True

    def refusal(self, error: ApiError) -> bytes:
        """The whole answer to what never became a request: no path is known, so the shape is OpenAI's."""
        status, headers, body = refusal(error, "openai", new_request_id(), self._metrics)
        headers = {**headers, "content-length": str(len(body)), "connection": "close"}
        return whole_head(status, headers) + body

    async def run(self) -> None:
        """Keep the time until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        """End what is late."""
        now_s = self.now_s = self.time()
        for connection in [each for each in self.connections if each.ends_s <= now_s]:
            connection.time_out()

    def drain(self) -> None:
        """The worker ends: answers close their connections, and those without a request have a little time to bring one."""
        self.turns.drain()
        self.first_s = self.idle_s = self.settings.drain_idle_s
        self.now_s = self.time()
        ends_s = self.now_s + self.settings.drain_idle_s
        for connection in self.connections:
            connection.drain(ends_s)

    @property
    def is_idle(self) -> bool:
        """Nobody may bring a request any more, waits for an answer, or has yet to read one."""
        return not self.connections

    def close(self) -> None:
        """End all that are left."""
        for connection in list(self.connections):
            if connection.transport is not None:
                connection.transport.abort()
