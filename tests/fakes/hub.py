"""A Hugging Face hub with one model, which can be slow, cut a download once, or send something else than it says."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

NAME = "org/tiny"


class Hub:
    """`held`: no byte of the weights comes before it is set."""

    def __init__(self) -> None:
        self.files = {
            "config.json": b"{}",
            "model.safetensors": bytes(range(256)) * 4096,
            "pytorch_model.bin": b"a pickle",
            "../escape.json": b"{}",
        }
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.cuts = 0
        self.lies = False
        self.held = asyncio.Event()
        self.held.set()
        self.url = ""

    async def listing(self, request: web.Request) -> web.Response:
        siblings = [
            {
                "rfilename": name, "size": len(content),
                "lfs": {"sha256": hashlib.sha256(content).hexdigest()} if name.endswith("safetensors") else None,
            }
            for name, content in self.files.items()
        ]  # fmt: skip
        return web.json_response({"sha": "abc123", "siblings": siblings})

    async def file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["file"]
        self.asked.append(name)
        content = self.files[name]
        if self.lies and name == "model.safetensors":
            content = bytes(len(content))
        begin = 0
        if asked := request.headers.get("Range"):
            self.ranges.append(asked)
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
        answer = web.StreamResponse(status=206 if begin else 200)
        answer.content_length = len(content) - begin
        await answer.prepare(request)
        half = (len(content) - begin) // 2
        await answer.write(content[begin : begin + half])
        if name == "model.safetensors":
            await self.held.wait()
            if self.cuts:
                self.cuts -= 1
                assert request.transport is not None
                request.transport.abort()
                return answer
        await answer.write(content[begin + half :])
        return answer


@asynccontextmanager
async def model_hub() -> AsyncIterator[Hub]:
    hub = Hub()
    app = web.Application()
    app.router.add_get(f"/api/models/{NAME}/revision/main", hub.listing)
    app.router.add_get(f"/{NAME}/resolve/abc123/{{file:.*}}", hub.file)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield hub
    finally:
        await runner.cleanup()
