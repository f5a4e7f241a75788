"""The tunnels that end in this worker: taken from agents, told to all workers, lent to turns, left without cutting any."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web

from config.defaults import Settings
from config.ids import uuid7
from config.postgres import AWAY
from gateway.errors import Forbidden, Unavailable
from nodes.reaching import ReachStore
from nodes.tunnel.carrier import CLOSE_S, HEARTBEAT_S, carry
from nodes.tunnel.frames import MESSAGE_BYTES_MAX
from nodes.tunnel.streams import Stream, Tunnel, TunnelLost

log = logging.getLogger("poolgate.tunnel")

RETRY_AFTER_S = 1

KeyIsGood = Callable[[], Awaitable[bool]]


class Tunnels:
    """By node. `worker` is where this worker takes hops, told to the others with each tunnel."""

    def __init__(self, settings: Settings, store: ReachStore) -> None:
        self.worker = ""
        self._settings = settings
        self._store = store
        self._tunnels: dict[str, Tunnel] = {}  # the newest of each node
        self._all: dict[Tunnel, KeyIsGood] = {}  # those that agents are leaving among them
        self._forgetting: set[asyncio.Task[None]] = set()
        self._is_draining = False
        self._key_news = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Tunnels {len(self._all)} draining={self._is_draining}>"

    def __len__(self) -> int:
        return len(self._all)

    def has(self, node_id: str) -> bool:
        """A tunnel of that node ends here, and takes new streams."""
        tunnel = self._tunnels.get(node_id)
        return tunnel is not None and not tunnel.is_draining

    def open(self, node_id: str, engine_id: str, protocol: asyncio.Protocol) -> Stream:
        """A stream to an engine of that node. Raises TunnelLost."""
        tunnel = self._tunnels.get(node_id)
        if tunnel is None:
            raise TunnelLost("the node has no tunnel here")
        return tunnel.open(engine_id, protocol)

    def key_news(self, _entity: str) -> None:
        """For the change feed: a key, which is known by its digest, so all are looked at; the keyring has them in memory."""
        self._key_news.set()

    async def run(self) -> None:
        """Leave the tunnels whose keys are good no more, until cancelled. Turns under way in them may end."""
        while True:
            await self._key_news.wait()
            self._key_news.clear()
            for tunnel, key_is_good in list(self._all.items()):
                if not tunnel.is_draining and not await key_is_good():
                    _leave(tunnel)

    async def serve(
        self, request: web.Request, account_id: int, node_id: str, key_is_good: KeyIsGood
    ) -> web.StreamResponse:
        """One agent's tunnel, to its end. Raises Forbidden, or Unavailable when another worker should have it."""
        if self._is_draining or len(self._all) >= self._settings.tunnels_max:
            raise Unavailable("This worker takes no more tunnels. Try again.", retry_after_s=RETRY_AFTER_S)
        tunnel_id = uuid7()
        try:
            is_opened = await self._store.tunnel_opened(node_id, account_id, tunnel_id, self.worker)
        except AWAY:
            raise Unavailable(
                "Tunnels can't be opened right now. Try again.", retry_after_s=RETRY_AFTER_S
            ) from None
        if not is_opened:
            raise Forbidden("This key has no such node: a node has a tunnel after its first heartbeat.")
        socket = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S, compress=False, max_msg_size=MESSAGE_BYTES_MAX, timeout=CLOSE_S
        )
        try:
            await socket.prepare(request)
            await self._carry(socket, node_id, key_is_good)
        finally:
            task = asyncio.create_task(self._forget(tunnel_id))
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)
        return socket

    async def _carry(self, socket: web.WebSocketResponse, node_id: str, key_is_good: KeyIsGood) -> None:
        tunnel = Tunnel(
            window=self._settings.tunnel_window_bytes, streams_max=self._settings.tunnel_streams_max,
            drained=_end_if_left, idle=_end_if_left,
        )  # fmt: skip
        older = self._tunnels.get(node_id)
        self._tunnels[node_id] = tunnel
        self._all[tunnel] = key_is_good
        if older is not None:
            _leave(older)
        if self._is_draining:
            _leave(tunnel)
        log.info("node %s opened a tunnel", node_id, extra={"action": "tunnel_opened", "node": node_id})
        reason = "the worker ends"
        try:
            reason = await carry(tunnel, socket)
        finally:
            del self._all[tunnel]
            if self._tunnels.get(node_id) is tunnel:
                del self._tunnels[node_id]
            log.info(
                "the tunnel of node %s ended: %s", node_id, reason, extra={"action": "tunnel_ended", "node": node_id}
            )  # fmt: skip

    async def _forget(self, tunnel_id: uuid.UUID) -> None:
        try:
            await self._store.tunnel_closed(tunnel_id)
        except AWAY:  # the row is replaced by the agent's next tunnel; who goes by it meanwhile finds nobody
            log.debug("a tunnel's end is not written", extra={"action": "tunnel_not_forgotten"})

    def drain(self) -> None:
        """Take no more tunnels, and ask agents to open theirs elsewhere; those without a stream end at once."""
        self._is_draining = True
        for tunnel in list(self._all):
            _leave(tunnel)

    async def close(self) -> None:
        """End all that are left; agents have a moment to say goodbye."""
        for tunnel in list(self._all):
            tunnel.lost("the worker ended")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * CLOSE_S):
                while self._all:  # noqa: ASYNC110 - once, at the end
                    await asyncio.sleep(CLOSE_S / 100)
        while self._forgetting:
            await asyncio.wait(self._forgetting)


def _leave(tunnel: Tunnel) -> None:
    tunnel.drain()
    _end_if_left(tunnel)


def _end_if_left(tunnel: Tunnel) -> None:
    """A tunnel that takes no new streams and has none left is over."""
    if tunnel.is_draining and not len(tunnel):
        tunnel.lost("the tunnel was left for another one")
