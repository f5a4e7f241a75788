"""From worker to worker: a turn whose node's tunnel ends in another one goes there by one connection to its own port for it.

Each side proves to the other that it has the workers' secret, for a nonce of the other's choice, before anything else is
said: the address may have become somebody else's. Then the connection carries what the tunnel's stream does, both ways.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

from nodes.tunnel.splice import End
from nodes.tunnel.streams import Stream, TunnelLost

log = logging.getLogger("poolgate.tunnel")

NONCE_BYTES, PROOF_BYTES = 16, 32
NAMES_BYTES_MAX = 1024
HANDSHAKE_S = 5.0
"""For all of it: two round trips between processes of one host, or of one network."""

UNPROVED_MAX = 256
"""Connections that have not proved themselves yet; more are closed at once."""

GRANTED = b"\x01"


class Streams(Protocol):
    """Who has the tunnels of this worker."""

    def open(self, node_id: str, engine_id: str, protocol: asyncio.Protocol) -> Stream:
        """Raises TunnelLost."""
        ...


def proof(secret: bytes, role: bytes, theirs: bytes, ours: bytes, names: bytes = b"") -> bytes:
    """What shows that its maker, the `server` or the `client`, has the secret, for the other side's nonce `theirs`."""
    return hmac.digest(secret, b"|".join((role, theirs, ours, names)), hashlib.sha256)


class HopServer:
    """Takes hops of other workers to the tunnels that end here."""

    def __init__(self, secret: bytes, streams: Streams) -> None:
        self.secret = secret
        self.streams = streams
        self.ends: set[HopEnd] = set()
        self.unproved = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> str:
        """Listen on a free port; the address to be told, host:port."""
        self._server = await asyncio.get_running_loop().create_server(lambda: HopEnd(self), host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        """End all of it."""
        if self._server is not None:
            self._server.close()
        for end in list(self.ends):
            end.transport.abort()


class HopEnd(End):
    """One hop, from its handshake to its end."""

    is_asking = True

    def __init__(self, server: HopServer) -> None:
        super().__init__()
        self._server = server
        self._nonce = os.urandom(NONCE_BYTES)
        self._theirs = b""
        self._said = bytearray()
        self._is_proved = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        server = self._server
        server.ends.add(self)
        server.unproved += 1
        if server.unproved > UNPROVED_MAX:
            transport.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._is_proved:
            self.pass_on(data)
            return
        self._said += data
        said = self._said
        if not self._theirs and len(said) >= NONCE_BYTES:
            self._theirs = bytes(said[:NONCE_BYTES])
            del said[:NONCE_BYTES]
            self.transport.write(
                self._nonce + proof(self._server.secret, b"server", self._theirs, self._nonce)
            )
        if self._theirs and len(said) > PROOF_BYTES and b"\n" in said:
            self._judge(bytes(said))
        elif len(said) > PROOF_BYTES + NAMES_BYTES_MAX:
            self.transport.abort()

    def _judge(self, said: bytes) -> None:
        """The client's proof and, behind it in one line, what it wants. It waits for our answer before it says more."""
        theirs, names = said[:PROOF_BYTES], said[PROOF_BYTES:].rstrip(b"\n")
        if not hmac.compare_digest(
            theirs, proof(self._server.secret, b"client", self._nonce, self._theirs, names)
        ):
            log.warning("a hop without the workers' secret was refused", extra={"action": "hop_refused"})
            self.transport.abort()
            return
        self._prove()
        node_id, engine_id = json.loads(names)
        far = End()
        try:
            self._server.streams.open(node_id, engine_id, far)
        except TunnelLost:
            self.transport.abort()
            return
        self.transport.write(GRANTED)
        self.tie(far)

    def _prove(self) -> None:
        if not self._is_proved:
            self._is_proved = True
            self._server.unproved -= 1
        if self._timer is not None:
            self._timer.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        self._prove()
        self._server.ends.discard(self)
        super().connection_lost(error)


class HopClient(asyncio.Protocol):
    """Proves itself, says where to, and leaves the connection to `protocol` once it was granted."""

    def __init__(self, secret: bytes, node_id: str, engine_id: str, protocol: asyncio.Protocol) -> None:
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._secret = secret
        self._names = json.dumps([node_id, engine_id]).encode()
        self._protocol = protocol
        self._nonce = os.urandom(NONCE_BYTES)
        self._said = b""
        self._has_proved = False
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.write(self._nonce)

    def data_received(self, data: bytes) -> None:
        self._said += data
        if not self._has_proved and len(self._said) >= NONCE_BYTES + PROOF_BYTES:
            theirs = self._said[:NONCE_BYTES]
            shown = self._said[NONCE_BYTES : NONCE_BYTES + PROOF_BYTES]
            self._said = self._said[NONCE_BYTES + PROOF_BYTES :]
            if not hmac.compare_digest(shown, proof(self._secret, b"server", self._nonce, theirs)):
                self._transport.abort()
                self._fail("whoever answers there is no worker of ours")
                return
            self._has_proved = True
            mine = proof(self._secret, b"client", theirs, self._nonce, self._names)
            self._transport.write(mine + self._names + b"\n")
        elif self._has_proved and self._said[:1] == GRANTED and not self.granted.done():
            self._transport.set_protocol(self._protocol)
            self._protocol.connection_made(self._transport)
            self.granted.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the other worker has no tunnel of the node")

    def _fail(self, words: str) -> None:
        if not self.granted.done():
            self.granted.set_exception(TunnelLost(words))


async def hop(
    secret: bytes, worker: str, node_id: str, engine_id: str, factory: Callable[[], asyncio.Protocol]
) -> None:
    """A connection through the worker that takes hops at `worker`, for the protocol that `factory` makes. Raises OSError."""
    host, _, port = worker.rpartition(":")
    loop = asyncio.get_running_loop()
    protocol = factory()
    transport, client = await loop.create_connection(
        lambda: HopClient(secret, node_id, engine_id, protocol), host.strip("[]"), int(port)
    )
    try:
        await client.granted
    except BaseException:
        client.granted.cancel()
        transport.abort()
        raise
