"""Opens connections to engines, whichever way they have; who gets one can't tell them apart."""

import asyncio
from collections.abc import Callable

from gateway.reach.hop import hop
from gateway.reach.pinned import connect_pinned, pinning_context
from gateway.reach.tokens import hop_secret, node_token
from gateway.reach.tunnels import Tunnels
from nodes.protocol import ENGINE_HEADER, TOKEN_HEADER
from nodes.reach import Direct, Listener, Reach

Factory = Callable[[], asyncio.Protocol]


class Ways:
    """All ways from this worker."""

    def __init__(self, pepper: bytes, tunnels: Tunnels) -> None:
        self._pepper = pepper
        self._secret = hop_secret(pepper)
        self._tunnels = tunnels
        self._context = pinning_context()

    async def open(self, reach: Reach, factory: Factory) -> None:
        """Connect the protocol that `factory` makes. Raises OSError; the caller bounds the time."""
        if isinstance(reach, Direct):
            await asyncio.get_running_loop().create_connection(factory, reach.host, reach.port)
        elif isinstance(reach, Listener):
            await connect_pinned(
                factory, reach.host, reach.port, fingerprint=reach.fingerprint, context=self._context
            )
        elif self._tunnels.has(reach.node_id):
            self._tunnels.open(reach.node_id, reach.engine_id, factory())
        else:
            await hop(self._secret, reach.worker, reach.node_id, reach.engine_id, factory)

    def head_lines(self, reach: Reach) -> bytes:
        """What each request on such a connection says beside what it says to any engine; whole lines of its head."""
        if not isinstance(reach, Listener):
            return b""
        token = node_token(self._pepper, reach.account_id, reach.node_id)
        return f"{TOKEN_HEADER}: {token}\r\n{ENGINE_HEADER}: {reach.engine_id}\r\n".encode("ascii")
