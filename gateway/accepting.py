"""Accepts connections from a listening socket that other processes may share, and at the end leaves none on it.

The socket is the supervisor's, the protocol its caller's. Closing the last descriptor of a listening socket resets what is
queued on it, and the last may be ours: so first everything that waits is taken, in one go, and then it is closed.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

from gateway.sockets import BACKLOG, take_queued

log = logging.getLogger("poolgate.gateway")

SHORT_RETRY_S = 0.02
SHORT_BOUND_S = 2.0
"""How long connections are waited for that can't be taken for want of descriptors: ended turns give theirs back."""

HANDSHAKE_S = 10.0


class Acceptor:
    """`start` accepts until `drain_and_close`, and each connection gets a protocol of the factory's."""

    def __init__(
        self,
        sock: socket.socket,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        *,
        tls: ssl.SSLContext | None = None,
        handshake_s: float = HANDSHAKE_S,
    ) -> None:
        """`sock` is bound; from now on it is ours to close. `handshake_s`: for a TLS handshake, if there is a context."""
        sock.setblocking(False)  # before `dup`: the mode is both descriptors'
        self._sock = sock
        self._spare = sock.dup()  # the event loop closes its own as soon as it stops accepting
        self._factory = protocol_factory
        self._tls = tls
        self._handshake_s = handshake_s
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen, if nobody does yet, and accept."""
        self._server = await asyncio.get_running_loop().create_server(
            self._factory,
            sock=self._sock,
            backlog=BACKLOG,
            ssl=self._tls,
            ssl_handshake_timeout=self._handshake_s if self._tls else None,
        )

    async def drain_and_close(self) -> int:
        """Take what is queued and give our hold on the socket up; how many were taken.

        When it returns they have protocols, as far as their TLS handshakes came about in time.
        """
        if self._server is not None:
            self._server.close()
        else:
            self._sock.close()
        taken = await self._take_all()
        self._spare.close()
        handed = [asyncio.ensure_future(self._hand_over(connection)) for connection in taken]
        if handed:
            await asyncio.wait(handed)
        return len(taken)

    async def _take_all(self) -> list[socket.socket]:
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + SHORT_BOUND_S
        taken, is_all = take_queued(self._spare)
        while not is_all and loop.time() < ends_s:
            await asyncio.sleep(SHORT_RETRY_S)
            more, is_all = take_queued(self._spare)
            taken += more
        if not is_all:
            log.error("connections are reset: no descriptors to take them", extra={"action": "queue_lost"})
        return taken

    async def _hand_over(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._factory,
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=self._handshake_s if self._tls else None,
            )
        except OSError as error:  # its client is gone, or speaks no TLS
            log.debug("a queued connection came to nothing: %s", error)
            connection.close()
