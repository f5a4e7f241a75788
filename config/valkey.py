"""Owns connections to Valkey or Redis: every wait bounded, nothing retried, since callers go on without it.

What is kept there is left to its users.
"""

import asyncio

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

# Commands in flight at once from one process; each takes about 60 microseconds, so more only queue in the
# server.
CONNECTIONS_MAX = 32


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
