"""One gateway worker process: settings and a listening socket come from the supervisor, `gateway.app` does the rest."""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import uvloop

from config import compiled
from config.cores import core_of, keep, roam
from config.defaults import Settings
from config.logs import setup_logs
from config.procs import die_with_parent
from gateway.reports import LOOK_S, report

log = logging.getLogger("poolgate.worker")

GC_THRESHOLDS = (50_000, 20, 100)
"""Counts of new objects at which garbage in cycles is looked for. High enough that a turn ends before it counts as old: by
Python's own thresholds it soon does, and old garbage stays until a quarter of all that is remembered was added to it."""

FAILED = 70
"""Exit code of a worker in which a part failed (EX_SOFTWARE)."""


NO_REPORTS = -1


def orders(
    settings: Settings, fd: int, *, report_fd: int = NO_REPORTS, number: int = 0, waits: bool = False
) -> bytes:
    """What a supervisor writes to a worker's standard input: nothing of it shows in a process list.

    `fd` is a socket that listens or is bound, `report_fd` the pipe of `gateway.reports`, `number` this worker's among the
    gateway's. `waits`: accept only when ready, because another worker serves the socket meanwhile.
    """
    given = {"settings": asdict(settings), "fd": fd, "report_fd": report_fd, "number": number, "waits": waits}
    return json.dumps(given).encode()


def main() -> int:
    """Run until SIGTERM."""
    given = json.loads(sys.stdin.buffer.read())
    settings = Settings(**given["settings"])
    setup_logs(settings, f"worker-{os.getpid()}")
    # Ctrl-C reaches the whole group of a terminal; the supervisor says when to stop, and it alone reloads.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    die_with_parent(bound_s=settings.shutdown_grace_s + 15)
    gc.set_threshold(*GC_THRESHOLDS)
    sock = socket.socket(fileno=given["fd"])
    core = core_of(given["number"], settings.workers) if settings.worker_keeps_core else None
    serving = _serve(
        settings, sock, report_fd=given["report_fd"], accepts_when_ready=given["waits"], core=core
    )
    return uvloop.run(serving)


async def _serve(
    settings: Settings, sock: socket.socket, *, report_fd: int, accepts_when_ready: bool, core: int | None
) -> int:
    from gateway.app import Gateway  # after the metrics folder is in the environment, and logs are set up

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(initializer=roam))
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    # The supervisor started us with it blocked. One that came while we start is heeded when we serve: clients may be queued.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    gateway = Gateway(settings)
    await gateway.start(sock, accepts=not accepts_when_ready)
    log.info("started, %s", compiled.how(), extra={"action": "worker_started", "runs": compiled.how()})
    if accepts_when_ready:
        await _accept_when_ready(gateway, stop)
    beside = [asyncio.create_task(report(report_fd, lambda: gateway.health.is_ready))]
    if core is not None:
        beside.append(asyncio.create_task(keep(core)))
    waits: list[asyncio.Task[Any]] = [
        asyncio.create_task(stop.wait()),
        asyncio.create_task(gateway.failed.wait()),
    ]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await gateway.stop()
    for task in beside:
        task.cancel()
    return FAILED if gateway.failed.is_set() else 0


async def _accept_when_ready(gateway: Any, stop: asyncio.Event) -> None:
    """Or to end at once."""
    while not (gateway.health.is_ready or stop.is_set() or gateway.failed.is_set()):  # noqa: ASYNC110 - once
        await asyncio.sleep(LOOK_S)
    await gateway.acceptor.start()


if __name__ == "__main__":
    sys.exit(main())
