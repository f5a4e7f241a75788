"""A gateway that only takes heartbeats and events: it keeps every one, answers as told, and lets a test wait for one."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from nodes.agent.events import EVENT_PATH, READINESS_PATH
from nodes.protocol import HEARTBEAT_PATH, Heartbeat, HeartbeatReply


class HeartbeatGateway:
    """`status` other than 200 refuses; `reply` is what good heartbeats get."""

    def __init__(self) -> None:
        self.beats: list[Heartbeat] = []
        self.events: list[dict[str, Any]] = []
        self.readiness: list[dict[str, Any]] = []
        self.status = 200
        self.reply = HeartbeatReply(epoch=7, lease_s=90.0, heartbeat_interval_s=0.2)
        self.url = ""
        self.extra: dict[str, Callable[[web.Request], Awaitable[web.Response]]] = {}  # GETs, by path
        self._news = asyncio.Condition()

    async def handle(self, request: web.Request) -> web.Response:
        beat = Heartbeat.from_json(await request.json())
        async with self._news:
            self.beats.append(beat)
            self._news.notify_all()
        if self.status != 200:
            return web.json_response({"error": "as told"}, status=self.status)
        return web.json_response(self.reply.to_json())

    async def note_event(self, request: web.Request) -> web.Response:
        self.events.append(await request.json())
        return web.json_response({"success": True})

    async def answer_extra(self, request: web.Request) -> web.Response:
        handler = self.extra.get(request.path)
        return web.json_response({}, status=404) if handler is None else await handler(request)

    async def note_readiness(self, request: web.Request) -> web.Response:
        self.readiness.append(await request.json())
        return web.json_response({"success": True})

    async def until(
        self, fits: Callable[[Heartbeat], bool], *, after: int = 0, within_s: float = 60.0
    ) -> Heartbeat:
        """The first heartbeat from number `after` on that fits; fails when none comes."""
        async with asyncio.timeout(within_s), self._news:
            await self._news.wait_for(lambda: any(fits(beat) for beat in self.beats[after:]))
        return next(beat for beat in self.beats[after:] if fits(beat))

    async def until_state(self, state: str, **options: Any) -> Heartbeat:
        return await self.until(lambda beat: any(engine.state == state for engine in beat.engines), **options)


@asynccontextmanager
async def heartbeat_gateway(port: int = 0) -> AsyncIterator[HeartbeatGateway]:
    gateway = HeartbeatGateway()
    app = web.Application()
    app.router.add_post(HEARTBEAT_PATH, gateway.handle)
    app.router.add_post(EVENT_PATH, gateway.note_event)
    app.router.add_get("/{path:.*}", gateway.answer_extra)
    app.router.add_post(READINESS_PATH, gateway.note_readiness)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    gateway.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield gateway
    finally:
        await runner.cleanup()
