"""The agent's end of the control websocket: load goes up each second, commands and what is wanted come down.

Never gives up: it connects again with growing pauses, and heartbeats carry what can't wait. What messages are is
`nodes.control_messages`', doing what they ask `deeds`' and `conduct`'s.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from config.defaults import Settings
from nodes.agent.backoff import Backoff
from nodes.agent.lease import Lease
from nodes.control_messages import (
    CONTROL_PATH,
    FENCED,
    INSTANCE_HEADER,
    MESSAGE_BYTES_MAX,
    NODE_HEADER,
    Command,
    Progress,
    load_message,
    read_wanted,
)
from nodes.protocol import BadMessage, EngineLoad, Fields

log = logging.getLogger("poolgate.agent")

CONNECT_S = 10.0
PING_S = 15.0
RETRY_FIRST_S = 0.5
RETRY_MOST_S = 30.0
STEADY_S = 10.0  # a connection that lasted so long was a good one
WAITING_MAX = 256  # progress that waits to be sent; the last word of each command counts


class Control:
    """`run()` keeps a connection; callbacks do what comes. `is_up` while there is one."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        gateway: str,
        key: str,
        node_id: str,
        instance: str,
        settings: Settings,
        lease: Lease,
        loads: Callable[[], Mapping[str, EngineLoad]],
        take: Callable[[Command], None],
        want: Callable[[str], None],
        sent: Callable[[tuple[Progress, ...]], None],
        fenced: Callable[[], None],
        is_ready: asyncio.Event,
    ) -> None:
        """`is_ready`: a heartbeat has arrived, so that the gateway knows the node."""
        self._session = session
        self._url = gateway.rstrip("/") + CONTROL_PATH
        self._headers = {"x-provider-key": key, NODE_HEADER: node_id, INSTANCE_HEADER: instance}
        self._settings = settings
        self._lease, self._loads, self._take, self._want = lease, loads, take, want
        self._sent, self._fenced, self._is_ready = sent, fenced, is_ready
        self._backoff = Backoff(RETRY_FIRST_S, RETRY_MOST_S)
        self._waiting: dict[int, Progress] = {}
        self._news = asyncio.Event()
        self._is_complaining = False
        self.is_up = False

    def tell(self, progress: Progress) -> None:
        """Send it, if there is a connection: else the heartbeat does."""
        if self.is_up and progress.id and len(self._waiting) < WAITING_MAX:
            self._waiting[progress.id] = progress
            self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        await self._is_ready.wait()
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            try:
                code = await self._connected()
                trouble = f"was closed ({code})"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                trouble = str(error) or type(error).__name__
            finally:
                self.is_up = False
            if loop.time() - began_s > STEADY_S:
                self._backoff.reset()
            if not self._is_complaining:
                log.info("control connection: %s", trouble, extra={"action": "control_down"})
            self._is_complaining = True
            await asyncio.sleep(self._backoff.next_s())

    async def _connected(self) -> int | None:
        """One connection from its start to its end; the close code."""
        timeout = aiohttp.ClientWSTimeout(ws_close=2.0)
        async with (
            asyncio.timeout(CONNECT_S) as connecting,
            self._session.ws_connect(
                self._url, headers=self._headers, heartbeat=PING_S, max_msg_size=MESSAGE_BYTES_MAX,
                timeout=timeout,
            ) as socket,
        ):  # fmt: skip
            connecting.reschedule(None)
            log.info("control connection is up", extra={"action": "control_up"})
            self.is_up, self._is_complaining = True, False
            self._waiting.clear()
            telling = asyncio.create_task(self._tell(socket))
            try:
                await self._hear(socket)
            finally:
                telling.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError, aiohttp.ClientError):
                    await telling
            if socket.close_code == FENCED:
                self._fenced()
            return socket.close_code

    async def _tell(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            await socket.send_json(load_message(self._loads()))
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.engine_poll_s):
                    await self._news.wait()
            waiting, self._waiting = tuple(self._waiting.values()), {}
            for progress in waiting:
                await socket.send_json(progress.to_json())
            self._sent(waiting)

    async def _hear(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                return
            try:
                self._heed(json.loads(message.data))
            except (
                ValueError,
                BadMessage,
                RecursionError,
            ) as error:  # a newer gateway's: the rest still works
                log.debug("a message was not understood: %s", error, extra={"action": "control_odd"})

    def _heed(self, message: Any) -> None:
        match Fields(message, "").text("type"):
            case "command":
                self._take(Command.from_json(message))
            case "wanted":
                self._want(read_wanted(message))
            case "lease":
                # Sent when a load came: what it answers was asked one load ago at the latest.
                self._lease.renew(asyncio.get_running_loop().time() - self._settings.engine_poll_s)
