"""Where a gateway's connections come in, by listener or by tunnel, and go on to engines of this host, as far as they may."""

import asyncio
import hmac
import json
import logging
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from nodes.agent.gate import Answered, Head, RequestGate, refusal
from nodes.protocol import ENGINE_HEADER, PROOF_PATH, TOKEN_HEADER, listener_proof
from nodes.tunnel.splice import End

log = logging.getLogger("poolgate.agent")

ENGINE_CONNECT_S = 5.0
"""Connecting on one host takes a millisecond, unless the engine's queue of connections is full."""

FIRST_HEAD_S = 10.0
"""What a connection from outside has to bring a request that is allowed."""

CONNECTIONS_MAX = 8192
"""From outside; a gateway keeps some hundred idle ones for each of its workers."""

PROOF_QUESTION = re.compile(re.escape(PROOF_PATH) + r"\?nonce=([0-9a-f]{32})")


class Doorway:
    """`engine_at` finds the URL of an engine of this host. `token` is the secret that the gateway gave this node."""

    def __init__(self, engine_at: Callable[[str], str | None]) -> None:
        self.token = ""
        self._engine_at = engine_at
        self.fronts: set[Front] = set()

    def from_outside(self) -> "Front":
        """A connection to the listener: each request must have the token, and names its engine."""
        return Front(self, None)

    def from_tunnel(self, engine_id: str) -> "Front":
        """A stream of the tunnel, which the gateway opened to that engine."""
        return Front(self, engine_id)

    def check_token(self, shown: str) -> None:
        """Raises Answered."""
        if not self.token or not hmac.compare_digest(shown.encode(), self.token.encode()):
            raise refusal(401, "not the token of this node")

    def engine_address(self, engine_id: str) -> tuple[str, int]:
        """Raises Answered."""
        parts = urlsplit(self._engine_at(engine_id) or "")
        if parts.scheme != "http" or not parts.hostname or parts.port == 0:
            raise refusal(502, "no such engine here")
        return parts.hostname, parts.port or 80

    def close(self) -> None:
        """End every connection."""
        for front in list(self.fronts):
            front.transport.abort()


class Front(End):
    """One connection of a gateway, tied to one of an engine when its first request was allowed."""

    is_asking = True

    def __init__(self, door: Doorway, engine_id: str | None) -> None:
        super().__init__()
        self._door = door
        self._needs_token = engine_id is None
        self._engine_id = engine_id
        self._gate = RequestGate(self._allow)
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._door.fronts.add(self)
        if not self._needs_token:
            return
        if len(self._door.fronts) > CONNECTIONS_MAX:
            transport.abort()
        else:
            self._timer = asyncio.get_running_loop().call_later(FIRST_HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        try:
            passed = self._gate.feed(data)
        except Answered as answer:
            self._answer(answer)
            return
        if not passed:
            return
        self.pass_on(passed)
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())

    def _allow(self, head: Head) -> None:
        if self._needs_token:
            if (asked := PROOF_QUESTION.fullmatch(head.path)) and head.method == "GET" and self._door.token:
                raise Answered(200, {"proof": listener_proof(self._door.token, asked[1])})
            self._door.check_token(head.fields.get(TOKEN_HEADER, ""))
            engine_id = head.fields.get(ENGINE_HEADER, "")
            if self._engine_id not in (None, engine_id):
                raise refusal(403, "another engine than this connection's")
            self._engine_id = engine_id
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _connect(self) -> None:
        try:
            host, port = self._door.engine_address(self._engine_id or "")
            async with asyncio.timeout(ENGINE_CONNECT_S):
                _, engine = await asyncio.get_running_loop().create_connection(End, host, port)
        except Answered as answer:
            self._answer(answer)
            return
        except (OSError, TimeoutError):
            self._answer(refusal(502, "the engine can't be reached"))
            return
        if self.is_lost or self.transport.is_closing():
            engine.transport.abort()
        else:
            self.tie(engine)

    def _answer(self, answer: Answered) -> None:
        if answer.status != 200:  # not louder: anybody can ask a listener
            log.debug("a request was refused: %s", answer.body["error"], extra={"action": "request_refused"})
        body = json.dumps(answer.body).encode()
        status = HTTPStatus(answer.status)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        if not self.is_lost:
            self.transport.write(head.encode() + body)
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._door.fronts.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(error)
