"""The core that a busy thread keeps to. Left to itself, Linux wakes a worker on the core of whoever sent it something.

That one, an engine or a client, goes on there and the worker waits for it, while its caches are on another core: of 256
streams on two cores each chunk came a millisecond later. A thread that has to wait on its own core all the same, because
somebody else keeps to it, moves to another one.
"""

import asyncio
import logging
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("poolgate.worker")

ALL = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
"""Those that this process was given; none where they can't be had one by one."""

LOOK_S = 5.0

CROWDED_SHARE = 0.1
"""A thread that waited for its core for more of a time, and longer than it ran, looks for another one."""

_TIMES = Path("/proc/thread-self/schedstat")


class Times(NamedTuple):
    """What a thread's time went to so far, in seconds."""

    ran_s: float
    waited_s: float


def core_of(number: int, workers: int) -> int | None:
    """The core of the worker with that number; None: there are fewer than workers, or only one."""
    return ALL[number % len(ALL)] if 1 < len(ALL) >= workers else None


def roam() -> None:
    """Let the calling thread run on any core, as far as that may be said: for those that one which keeps to one starts."""
    if ALL:
        with suppress(OSError):
            os.sched_setaffinity(0, ALL)


async def keep(core: int) -> None:
    """Keep the calling thread to a core, and move to another where it is crowded; until that can't be done any more."""
    try:
        while True:
            os.sched_setaffinity(0, [core])
            before = _times()
            await asyncio.sleep(LOOK_S)
            if is_crowded(before, _times(), LOOK_S):
                core = random.choice([other for other in ALL if other != core])  # noqa: S311 - keeps no secret
                log.info("moves to core %d: its own is crowded", core, extra={"action": "core_changed"})
    except OSError as error:  # it was taken from us, or the system does not tell times
        log.warning("keeps to no core: %s", error, extra={"action": "core_left"})
        roam()


def is_crowded(before: Times, now: Times, for_s: float) -> bool:
    """Whether the core is rather somebody else's."""
    waited_s = now.waited_s - before.waited_s
    return waited_s > CROWDED_SHARE * for_s and waited_s > now.ran_s - before.ran_s


def _times() -> Times:
    ran_ns, waited_ns, _ = _TIMES.read_bytes().split()
    return Times(int(ran_ns) / 1e9, int(waited_ns) / 1e9)
