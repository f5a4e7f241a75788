"""One listening socket and who serves it: a worker, one that died and is replaced, or two while one hands over to the other.

When a reload begins or everything ends is `gateway.supervisor`'s; how a worker is started `gateway.worker_process`'s.
"""

import logging
import socket
from dataclasses import dataclass
from typing import Literal

from config.defaults import Settings
from gateway.sockets import has_queued
from gateway.worker_process import WorkerProcess

log = logging.getLogger("poolgate.supervisor")

RESTART_MIN_S, RESTART_MAX_S = 0.1, 10.0
STEADY_S = 30.0
"""A worker that lived this long is taken as sound: its successor starts at once."""

HandOver = Literal["waiting", "done", "failed"]


@dataclass(slots=True)
class Slot:
    """A socket and its processes. Times are of the monotonic clock, in seconds."""

    sock: socket.socket
    number: int = 0  # of those of one gateway
    is_open: bool = True  # clients may be queued on it
    worker: WorkerProcess | None = None
    successor: WorkerProcess | None = None
    _given_up_at_s: float = 0.0
    _pause_s: float = RESTART_MIN_S
    _start_at_s: float = 0.0

    @property
    def workers(self) -> list[WorkerProcess]:
        """Those that are to serve, now or soon."""
        return [worker for worker in (self.worker, self.successor) if worker is not None]

    def tend(self, settings: Settings, now_s: float) -> None:
        """Note a worker that died, and start one where there is none."""
        worker = self.worker
        code = None if worker is None else worker.poll(now_s)
        if worker is not None and code is None and worker.is_hung(now_s):
            log.error(
                "worker %d hangs and is killed",
                worker.pid,
                extra={"action": "worker_hung", "pid": worker.pid},
            )
            worker.kill()
            code = worker.poll(now_s)
        if worker is not None and code is not None:
            log.error(
                "worker %d ended with %d; another one starts", worker.pid, code,
                extra={"action": "worker_died"},
            )  # fmt: skip
            self.worker = None
            is_sound = now_s - worker.started_s > STEADY_S
            self._pause_s = RESTART_MIN_S if is_sound else min(2 * self._pause_s, RESTART_MAX_S)
            self._start_at_s = now_s + self._pause_s
        if self.worker is None and self.successor is None and now_s >= self._start_at_s:
            self.worker = self._start(settings, now_s, waits=not self.is_open)
            if self.worker is None:
                self._start_at_s = now_s + RESTART_MAX_S
        self.is_open = self.is_open or (self.worker is not None and self.worker.says_ready)

    def last_call(self, settings: Settings, now_s: float) -> None:
        """At the end: clients that queue here after a worker's death get one more, which takes them and ends."""
        if all(worker.poll(now_s) is not None for worker in self.workers) and has_queued(self.sock):
            self.worker = self._start(settings, now_s, waits=False)

    def begin_hand_over(self, settings: Settings, now_s: float) -> bool:
        """Start a successor, which accepts when it is ready; `hand_over` until it is. False: it can't be started."""
        self.successor = self._start(settings, now_s, waits=True)
        self._given_up_at_s = now_s + settings.reload_ready_s
        return self.successor is not None

    def hand_over(self, now_s: float) -> tuple[HandOver, WorkerProcess | None]:
        """How far it is; once `done`, with the worker that was replaced, which is still to be told, if it lives."""
        successor = self.successor
        assert successor is not None, "not begun"
        if (code := successor.poll(now_s)) is not None:
            self.successor = None
            log.error(
                "the new worker %d ended with %d before it was ready", successor.pid, code,
                extra={"action": "successor_died"},
            )  # fmt: skip
            return "failed", None
        if successor.says_ready:
            replaced, self.worker, self.successor = self.worker, successor, None
            self.is_open, self._pause_s = True, RESTART_MIN_S
            return "done", replaced
        if now_s < self._given_up_at_s:
            return "waiting", None
        self.successor = None
        successor.kill()  # it has not accepted anything yet
        successor.poll(now_s)
        log.error(
            "the new worker %d is not ready in time and is given up", successor.pid,
            extra={"action": "successor_late"},
        )  # fmt: skip
        return "failed", None

    def _start(self, settings: Settings, now_s: float, *, waits: bool) -> WorkerProcess | None:
        try:
            return WorkerProcess(self.sock, settings, now_s, number=self.number, waits=waits)
        except OSError:  # no memory or processes left just now
            log.exception("a worker can't be started", extra={"action": "worker_not_started"})
            return None
