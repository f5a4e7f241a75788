"""A relay on uvloop that looks at nothing: each client's bytes go to an engine's connection of its own, and back.

The floor of any gateway in Python: what it costs beside `nginx` is the event loop's, what others cost beside it is theirs.
`python -m bench.bare PORT ENGINE...`, with the engines' URLs.
"""

import asyncio
import itertools
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import uvloop


class Engine(asyncio.Protocol):
    """Hands what an engine says to its client."""

    def __init__(self, client: Any) -> None:
        self.data_received = client.write  # type: ignore[method-assign]
        self._client = client

    def connection_lost(self, error: Exception | None) -> None:
        self._client.close()


class Client(asyncio.Protocol):
    """Hands what a client says to its engine; what it says first, when that is connected."""

    def __init__(self, engines: Iterator[tuple[str, int]]) -> None:
        self._engines = engines
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client: Any = transport
        self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._engine, _ = await loop.create_connection(lambda: Engine(self._client), *next(self._engines))
        self._engine.writelines(self._early)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        if self._connecting.done():
            self._engine.write(data)
        else:
            self._early.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._connecting.cancel():
            self._engine.close()


async def relay(port: int, urls: list[str]) -> None:
    """Until the process is ended."""
    parts = [urlsplit(url) for url in urls]
    engines = itertools.cycle([(part.hostname or "", part.port or 80) for part in parts])
    server = await asyncio.get_running_loop().create_server(lambda: Client(engines), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(relay(int(sys.argv[1]), sys.argv[2:]))
