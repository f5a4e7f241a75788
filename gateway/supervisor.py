"""Owns the listening sockets and the worker processes: a dead worker gets a successor on the same socket.

What a worker does is `gateway.worker`'s. The sockets stay open here, so connections that queue on a dead worker's socket
wait for its successor instead of being reset.
"""

import logging
import os
import resource
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, TimeoutExpired
from types import FrameType

from config import metrics
from config.defaults import Settings
from config.logs import setup_logs
from config.procs import Child, spawn_python
from gateway.worker import orders

log = logging.getLogger("poolgate.supervisor")

POLL_S = 0.1
RESTART_MIN_S, RESTART_MAX_S = 0.1, 10.0
STEADY_S = 30.0
"""A worker that lived this long is taken as sound: its successor starts at once."""

BACKLOG = 4096
KILL_AFTER_S = 25.0
"""Past `shutdown_grace_s`, before a worker is killed: 10 s for writing what turns used, and all other steps' bounds."""


class PortInUse(OSError):
    """Another program listens on the address."""


@dataclass(slots=True)
class Slot:
    """One listening socket and the worker that serves it."""

    sock: socket.socket
    child: Child | None = None
    started_s: float = 0.0
    pause_s: float = RESTART_MIN_S
    start_at_s: float = 0.0


def serve(settings: Settings) -> int:
    """Run `settings.workers` workers until SIGTERM or SIGINT; the exit code."""
    setup_logs(settings, "supervisor")
    raise_descriptor_limit()
    with tempfile.TemporaryDirectory(prefix="poolgate-metrics-") as folder, stop_signals() as stop:
        metrics.prepare_folder(Path(folder))
        try:
            slots = [Slot(sock) for sock in listening_sockets(settings)]
        except PortInUse as error:
            log.critical("%s", error, extra={"action": "port_in_use"})
            return 1
        log.info(
            "listening on http://%s:%d with %d worker(s)", settings.host, settings.port, settings.workers,
            extra={"action": "listening"},
        )  # fmt: skip
        while not stop.is_set:
            for slot in slots:
                _tend(slot, settings)
            time.sleep(POLL_S)
        return _stop(slots, settings)


class StopFlag:
    """Set by the first SIGTERM or SIGINT."""

    is_set = False

    def __call__(self, _signum: int, _frame: FrameType | None) -> None:
        self.is_set = True


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """SIGTERM and SIGINT set the flag instead of ending the process."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listening_sockets(settings: Settings) -> list[socket.socket]:
    """One socket for each worker on the same address. Raises PortInUse."""
    family, kind, proto, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    # With SO_REUSEPORT alone, a second gateway of the same user would quietly get half of the connections.
    with socket.socket(family, kind, proto) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except OSError as error:
            raise PortInUse(
                f"can't listen on {settings.host}:{settings.port}: {error.strerror}; choose another --port"
            ) from None
    sockets = []
    for _ in range(settings.workers):
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        sockets.append(sock)
    return sockets


def raise_descriptor_limit() -> None:
    """A stream takes two descriptors: use all that the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tend(slot: Slot, settings: Settings) -> None:
    """Start a worker where there is none; note one that died."""
    now_s = time.monotonic()
    if slot.child is not None and (code := slot.child.poll()) is not None:
        log.error(
            "worker %d ended with %d; another one starts",
            slot.child.pid,
            code,
            extra={"action": "worker_died"},
        )
        metrics.forget_process(slot.child.pid)
        slot.child = None
        slot.pause_s = (
            RESTART_MIN_S if now_s - slot.started_s > STEADY_S else min(2 * slot.pause_s, RESTART_MAX_S)
        )
        slot.start_at_s = now_s + slot.pause_s
    if slot.child is None and now_s >= slot.start_at_s:
        try:
            slot.child, slot.started_s = _start(slot.sock, settings), now_s
        except OSError:  # no memory or processes left just now
            log.exception("a worker can't be started", extra={"action": "worker_not_started"})
            slot.start_at_s = now_s + RESTART_MAX_S


def _start(sock: socket.socket, settings: Settings) -> Child:
    fd = sock.fileno()
    # One arena for all threads of a worker: those that read and sync the journal would each keep the most they ever needed.
    env = {"MALLOC_ARENA_MAX": "1", **os.environ}
    child = spawn_python("gateway.worker", env=env, pass_fds=(fd,), stdin=PIPE, death_signal=signal.SIGTERM)
    assert child.stdin is not None
    with child.stdin as stdin:
        stdin.write(orders(settings, fd))
    return child


def _stop(slots: list[Slot], settings: Settings) -> int:
    """SIGTERM to all, then SIGKILL to those that are still there past every bound."""
    for slot in slots:
        slot.sock.close()  # the workers close theirs: a client is refused at once instead of waiting
    children = [slot.child for slot in slots if slot.child is not None]
    for child in children:
        child.terminate()
    ends_s = time.monotonic() + settings.shutdown_grace_s + KILL_AFTER_S
    for child in children:
        try:
            child.wait(max(0.1, ends_s - time.monotonic()))
        except TimeoutExpired:
            log.warning("worker %d does not end and is killed", child.pid, extra={"action": "worker_killed"})
            child.kill()
            child.wait()
    log.info("stopped", extra={"action": "stopped", "pid": os.getpid()})
    return 0
