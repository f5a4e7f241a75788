"""One gateway worker process: settings and a listening socket come from the supervisor, `gateway.app` does the rest."""

import asyncio
import gc
import json
import os
import signal
import socket
import sys
from dataclasses import asdict
from typing import Any

import uvloop

from config.defaults import Settings
from config.logs import setup_logs
from config.procs import die_with_parent

GC_THRESHOLDS = (50_000, 20, 100)
"""Counts of new objects at which garbage in cycles is looked for. High enough that a turn ends before it counts as old: by
Python's own thresholds it soon does, and old garbage stays until a quarter of all that is remembered was added to it."""

FAILED = 70
"""Exit code of a worker in which a part failed (EX_SOFTWARE)."""


def orders(settings: Settings, fd: int) -> bytes:
    """What a supervisor writes to a worker's standard input: nothing of it shows in a process list."""
    return json.dumps({"settings": asdict(settings), "fd": fd}).encode()


def main() -> int:
    """Run until SIGTERM."""
    given = json.loads(sys.stdin.buffer.read())
    settings = Settings(**given["settings"])
    setup_logs(settings, f"worker-{os.getpid()}")
    # Ctrl-C reaches the whole group of a terminal; the supervisor says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(bound_s=settings.shutdown_grace_s + 15)
    gc.set_threshold(*GC_THRESHOLDS)
    return uvloop.run(_serve(settings, socket.socket(fileno=given["fd"])))


async def _serve(settings: Settings, sock: socket.socket) -> int:
    from gateway.app import Gateway  # after the metrics folder is in the environment, and logs are set up

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    gateway = Gateway(settings)
    await gateway.start(sock)
    waits: list[asyncio.Task[Any]] = [
        asyncio.create_task(stop.wait()),
        asyncio.create_task(gateway.failed.wait()),
    ]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await gateway.stop()
    return FAILED if gateway.failed.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
