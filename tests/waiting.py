"""Waiting for a fact instead of sleeping for a guess: these fail only when it never comes true."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import psutil

# Long enough for a loaded machine; a test that is right never comes near it.
BOUND_S = 60.0
_POLL_S = 0.01


def wait_until(is_true: Callable[[], object]) -> None:
    """Block until it is true."""
    deadline = time.monotonic() + BOUND_S
    while not is_true():
        assert time.monotonic() < deadline, f"waited {BOUND_S:g} s in vain"
        time.sleep(_POLL_S)


async def eventually(is_true: Callable[[], object | Awaitable[object]]) -> None:
    """Let others run until it is true; a coroutine function is awaited each time."""
    deadline = time.monotonic() + BOUND_S
    while True:
        found = is_true()
        if await found if isinstance(found, Awaitable) else found:
            return
        assert time.monotonic() < deadline, f"waited {BOUND_S:g} s in vain"
        await asyncio.sleep(_POLL_S)


def is_gone(pid: int) -> bool:
    """True if there is no such process any more, or only what its parent has not read yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
