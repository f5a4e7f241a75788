"""The agent's tunnel: a websocket that it keeps open to the gateway, for a gateway that can't reach this host.

It comes back after every cut, with growing pauses, and at once when the gateway's worker asks for another one; the old one
then goes on until its last stream has ended. What comes in is `doorway`'s.
"""

import asyncio
import logging

import aiohttp

from config.defaults import Settings
from nodes.agent.backoff import Backoff
from nodes.agent.doorway import Doorway
from nodes.protocol import NODE_HEADER, TUNNEL_PATH
from nodes.tunnel.carrier import CLOSE_S, HEARTBEAT_S, carry
from nodes.tunnel.frames import MESSAGE_BYTES_MAX
from nodes.tunnel.streams import Tunnel

log = logging.getLogger("poolgate.agent")

RETRY_FIRST_S, RETRY_MOST_S = 0.2, 30.0
CONNECT_S = 10.0
STEADY_S = 10.0
"""A tunnel that lived this long was good: the next pause is a first one again."""

OLD_MAX = 4
"""Tunnels that are being left at a time; the oldest is cut for one more."""


class TunnelClient:
    """`run` keeps one tunnel open while it is `wanted`."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        door: Doorway,
        settings: Settings,
        *,
        gateway: str,
        key: str,
        node_id: str,
    ) -> None:
        self._session = session
        self._door = door
        self._settings = settings
        self._url = gateway.rstrip("/") + TUNNEL_PATH
        self._headers = {"Authorization": f"Bearer {key}", NODE_HEADER: node_id}
        self._backoff = Backoff(RETRY_FIRST_S, RETRY_MOST_S)
        self._is_wanted = asyncio.Event()
        self._current: Tunnel | None = None
        self._carrying: list[asyncio.Task[str]] = []  # the newest last
        self._complaint = ""

    def want(self, is_wanted: bool) -> None:
        """Whether there should be a tunnel from now on; one that is not wanted ends with its last stream."""
        if is_wanted:
            self._is_wanted.set()
        elif self._is_wanted.is_set():
            self._is_wanted.clear()
            if self._current is not None:
                self._current.drain()

    async def run(self) -> None:
        """Until cancelled; then all that is left is cut."""
        try:
            while True:
                await self._is_wanted.wait()
                if await self._open():
                    self._backoff.reset()
                else:
                    await asyncio.sleep(self._backoff.next_s())
        finally:
            for task in self._carrying:
                task.cancel()
            await asyncio.gather(*self._carrying, return_exceptions=True)

    async def _open(self) -> bool:
        """One tunnel, until it ends or the gateway wants another one; whether it was a good one."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                socket = await self._session.ws_connect(
                    self._url, headers=self._headers, heartbeat=HEARTBEAT_S, compress=0,
                    max_msg_size=MESSAGE_BYTES_MAX, timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
                )  # fmt: skip
        except aiohttp.WSServerHandshakeError as error:
            self._complain(f"answered {error.status}")
            return False
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._complain(f"can't be reached: {str(error) or type(error).__name__}")
            return False
        self._complaint = ""
        log.info("a tunnel to the gateway is open", extra={"action": "tunnel_opened"})
        began_s, is_left = loop.time(), asyncio.Event()
        tunnel = self._current = Tunnel(
            window=self._settings.tunnel_window_bytes, streams_max=self._settings.tunnel_streams_max,
            accept=self._door.from_tunnel, drained=lambda _: is_left.set(),
        )  # fmt: skip
        carrying = asyncio.create_task(carry(tunnel, socket), name="tunnel")
        self._keep(carrying)
        leaving = asyncio.create_task(is_left.wait())
        try:
            await asyncio.wait((carrying, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
        if carrying.done() and not carrying.cancelled():
            log.info("the tunnel ended: %s", carrying.result(), extra={"action": "tunnel_ended"})
        return loop.time() - began_s > STEADY_S

    def _keep(self, task: "asyncio.Task[str]") -> None:
        self._carrying = [one for one in self._carrying if not one.done()]
        while len(self._carrying) >= OLD_MAX:
            self._carrying.pop(0).cancel()
        self._carrying.append(task)

    def _complain(self, trouble: str) -> None:
        """Once for each kind of trouble, not once a try."""
        if trouble != self._complaint:
            self._complaint = trouble
            log.warning("no tunnel: %s %s", self._url, trouble, extra={"action": "tunnel_refused"})
