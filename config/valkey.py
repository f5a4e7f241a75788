"""Owns connections to Valkey or Redis: every wait bounded, nothing retried, since callers go on without it.

What is kept there is left to its users.
"""

import asyncio
from collections.abc import Callable

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

# Commands in flight at once from one process; each takes about 60 microseconds, so more only queue in the
# server.
CONNECTIONS_MAX = 32

RECONNECT_MIN_S, RECONNECT_MAX_S = 0.1, 5.0
"""Pauses between attempts to subscribe: whoever listens goes on without it, so there is no hurry."""

QUIET_S = 15.0
"""After so long without a message the connection is tried: a host that vanished would never be noticed."""


def open_valkey(url: str, *, timeout_s: float) -> Redis:
    """A client that connects at its first command, and again at the next one after a failure.

    `timeout_s` bounds waiting for a free connection, connecting, and each answer; past one of them the
    command raises redis.exceptions.TimeoutError or ConnectionError.

    Give `pubsub.get_message` a timeout of its own; `listen` would wait for ever.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS_MAX,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        retry_on_timeout=False,
    )
    return Redis.from_pool(pool)


async def is_up(valkey: Redis) -> bool:
    """True if it answers within the client's time-out."""
    try:
        return bool(await valkey.ping())
    except (RedisError, OSError, TimeoutError):
        return False


def end_if_cancelled() -> None:
    """To be called after commands in a loop that only its cancellation ends: one that arrives just as a command is
    answered is lost in Python 3.11's `asyncio.wait_for`, and one while redis-py connects becomes its time-out.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def listen(
    valkey: Redis,
    channel: str,
    heard: Callable[[bytes], None],
    *,
    changed: Callable[[Exception | None], None] = lambda error: None,
) -> None:
    """Call `heard` with each message on `channel`, until cancelled. `changed` is told None when it listens, and the error
    each time that it can't."""
    pause_s = RECONNECT_MIN_S
    while True:
        try:
            async with valkey.pubsub() as connection:
                await connection.subscribe(channel)
                pause_s = RECONNECT_MIN_S
                await _hear(connection, heard, changed)
        except (RedisError, OSError, TimeoutError) as error:
            changed(error)
        end_if_cancelled()
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, RECONNECT_MAX_S)


async def _hear(
    connection: PubSub, heard: Callable[[bytes], None], changed: Callable[[Exception | None], None]
) -> None:
    """Until the connection fails, or nothing comes even after a ping: then the other side is gone."""
    is_asked = False
    while True:
        end_if_cancelled()
        message = await connection.get_message(timeout=QUIET_S)
        if message is None and is_asked:
            raise TimeoutError("no answer to a ping")
        is_asked = message is None
        if message is None:
            await connection.ping()
        elif message["type"] == "subscribe":
            changed(None)
        elif message["type"] == "message":
            heard(message["data"])
