"""One small question to an engine, on a connection of its own that goes the way turns go: a probe, a count of tokens."""

import asyncio

from gateway.relay.upstream import UpstreamConnection, UpstreamPool


class NoAnswer(Exception):
    """The engine can't be reached, or gives no whole answer, in time."""


async def ask(pool: UpstreamPool, request: bytes, *, timeout_s: float, bytes_max: int) -> tuple[int, bytes]:
    """Status and body. Raises NoAnswer, and ConnectFailed as `UpstreamPool.connect` does."""
    try:
        async with asyncio.timeout(timeout_s):
            connection = await pool.connect()
            try:
                return await _answer(connection, request, bytes_max)
            finally:
                connection.close()
    except TimeoutError:
        raise NoAnswer("no answer in time") from None


async def _answer(connection: UpstreamConnection, request: bytes, bytes_max: int) -> tuple[int, bytes]:
    news = asyncio.Event()
    connection.begin(request, news.set)
    while not connection.is_over:
        if connection.buffered > bytes_max:
            raise NoAnswer("its answer is too long")
        connection.read_on()
        await news.wait()
        news.clear()
    if connection.failure is not None:
        raise NoAnswer(str(connection.failure))
    return connection.status, connection.take()
