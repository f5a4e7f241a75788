"""How the gateway gets to this host's engines, as far as the agent has a say: straight, by its listener, by its tunnel.

A listener is offered once the gateway gave us the token that proves it ours; the gateway checks it and says which way it
goes. Until it goes by the listener, and whenever it does not, the tunnel stands.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import aiohttp

from config.defaults import Settings
from nodes.agent.doorway import Doorway
from nodes.agent.listener import Listener
from nodes.agent.tunnel import TunnelClient
from nodes.protocol import ReachAsked, ReachReply

log = logging.getLogger("poolgate.agent")

BY_LISTENER = "listener"


class Options(Protocol):
    """What of an agent's options is looked at."""

    @property
    def gateway(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def data_dir(self) -> Path: ...
    @property
    def reach(self) -> str: ...
    @property
    def advertise(self) -> str: ...
    @property
    def listen(self) -> str: ...
    @property
    def settings(self) -> Settings: ...


class AgentReach:
    """`async with` it while the agent runs; `heard` for each good heartbeat, `asked` goes into the next one."""

    def __init__(
        self,
        options: Options,
        node_id: str,
        session: aiohttp.ClientSession,
        *,
        engine_at: Callable[[str], str | None],
    ) -> None:
        self._mode = options.reach
        self._advertise = options.advertise
        self._door = Doorway(engine_at)
        self._listener: Listener | None = None
        if options.reach == "agent" and options.advertise:
            host, port = split_address(options.listen or f":{options.advertise.rpartition(':')[2]}")
            self._listener = Listener(self._door, options.data_dir, host, port)
        self._tunnel = TunnelClient(
            session, self._door, options.settings, gateway=options.gateway, key=options.key, node_id=node_id
        )
        self._problem = ""
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Raises CannotListen."""
        if self._listener is not None:
            await self._listener.start()
        self._running = asyncio.create_task(self._tunnel.run(), name="tunnel client")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._running is not None
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        if self._listener is not None:
            self._listener.close()
        self._door.close()

    def asked(self) -> ReachAsked:
        """For a heartbeat."""
        if self._listener is None or not self._door.token or not self._listener.fingerprint:
            return ReachAsked(mode=self._mode)
        return ReachAsked(mode=self._mode, advertise=self._advertise, fingerprint=self._listener.fingerprint)

    def heard(self, reply: ReachReply, changed: Callable[[], None]) -> None:
        """What the gateway said. `changed` asks for a heartbeat at once."""
        if self._mode != "agent":
            return
        is_first = not self._door.token and bool(reply.token)
        self._door.token = reply.token
        if is_first and self._listener is not None:
            changed()
        if reply.problem and reply.problem != self._problem:
            log.warning("the gateway says: %s", reply.problem, extra={"action": "listener_unusable"})
        self._problem = reply.problem
        self._tunnel.want(reply.way != BY_LISTENER)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; without a host, every address. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)
