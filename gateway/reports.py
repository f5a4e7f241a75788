"""What a worker tells its supervisor through a pipe: a byte a second that says whether it is ready, sooner until it is.

The byte comes from the worker's event loop, so silence means a loop that does not turn. What follows from it is the
supervisor's and the probe listener's.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable

ALIVE, READY = b"a", b"r"
"""The loop turns; and it serves: the worker accepts, and a balancer may send it requests."""

BEAT_S = 1.0
LOOK_S = 0.05
"""How soon it is told that a worker became ready: a reload waits for it."""

STALE_S = 5.0
"""A worker silent for this long is not ready: its loop is blocked, or the machine has no time for it."""

_READ_BYTES = 4096


async def report(descriptor: int, is_ready: Callable[[], bool]) -> None:
    """Tell the supervisor until cancelled. `descriptor` is the pipe's writing end and does not block."""
    while True:
        state = READY if is_ready() else ALIVE
        # A full pipe: the supervisor is late and has enough to read. No pipe: it is gone, and we are about to be.
        with contextlib.suppress(OSError):
            os.write(descriptor, state)
        await asyncio.sleep(BEAT_S if state == READY else LOOK_S)


def latest(descriptor: int) -> bytes | None:
    """The last byte that came through the pipe since the last call, empty if none did; None: its other end is closed."""
    last = b""
    while True:
        try:
            read = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return last
        if not read:
            return None
        last = read[-1:]
