"""A worker process as its supervisor sees it: started on a socket, heard through a pipe, asked to end, or ended.

What it does in there is `gateway.worker`'s; when one is started or ended, `gateway.supervisor`'s.
"""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from subprocess import PIPE

from config import metrics
from config.defaults import Settings
from config.procs import Child, spawn_python
from gateway.reports import READY, STALE_S, latest
from gateway.worker import orders

_KEPT = str(4 * 2**20)
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": _KEPT, "MALLOC_TRIM_THRESHOLD_": _KEPT}
"""glibc's allocator in a worker. One arena: threads that read and sync the journal would each keep the most they needed.
Fixed thresholds: a batch that was large once (PostgreSQL was slow) goes back to the system instead of staying in the heap,
whose bound glibc else raises to the largest block that it saw freed. Below 4 MiB memory is kept for the next request: to
give it back and have it again, page by page, took a third of what a prompt of 64 KB costs."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What is known of one worker, for whoever asks. Times are of the monotonic clock, in seconds."""

    pid: int
    says_ready: bool
    heard_at_s: float

    def is_alive(self, now_s: float) -> bool:
        """Its event loop turns."""
        return now_s - self.heard_at_s < STALE_S

    def is_ready(self, now_s: float) -> bool:
        """It serves."""
        return self.says_ready and self.is_alive(now_s)


class WorkerProcess:
    """One worker; `poll` it often. Main thread only: its death signal is tied to the thread that starts it."""

    def __init__(
        self, sock: socket.socket, settings: Settings, now_s: float, *, number: int = 0, waits: bool = False
    ) -> None:
        """`number`: its core follows from it. `waits`: it accepts only when it is ready, since others serve meanwhile.

        Raises OSError.
        """
        self.started_s = self._heard_at_s = now_s
        self._hung_s = settings.worker_hung_s
        self._says_ready = self._has_said = False
        self._hears, tells = os.pipe()
        try:
            os.set_blocking(self._hears, False)
            os.set_blocking(tells, False)
            self._child = _spawn(settings, sock.fileno(), tells, number=number, waits=waits)
        except BaseException:
            os.close(self._hears)
            raise
        finally:
            os.close(tells)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def hears(self) -> int:
        """The descriptor that becomes readable when it says something, and when it ends."""
        return self._hears

    @property
    def says_ready(self) -> bool:
        """By its last word."""
        return self._says_ready

    @property
    def state(self) -> WorkerState:
        return WorkerState(self.pid, self._says_ready, self._heard_at_s)

    def poll(self, now_s: float) -> int | None:
        """Hear what it says; its exit code if it has ended, and then its gauges end too."""
        word = latest(self._hears) if self._hears >= 0 else b""
        if word is None:  # it has ended, or is about to
            self._says_ready = False
        elif word:
            self._says_ready, self._heard_at_s, self._has_said = word == READY, now_s, True
        code = self._child.poll()
        if code is not None and self._hears >= 0:
            os.close(self._hears)
            self._hears, self._says_ready = -1, False
            metrics.forget_process(self.pid)
        return code

    def is_hung(self, now_s: float) -> bool:
        """It has begun, and its event loop turns no more. To be asked after `poll`."""
        return self._has_said and now_s - self._heard_at_s > self._hung_s

    def finish(self) -> None:
        """SIGTERM: it takes what is queued, ends its turns within their grace, and writes what they used."""
        self._child.terminate()

    def kill(self) -> None:
        """End it now. Its journal is brought into the book by another."""
        self._child.kill()
        self._child.wait()


def _spawn(settings: Settings, fd: int, report_fd: int, *, number: int, waits: bool) -> Child:
    env = {**MALLOC, **os.environ}
    with _sigterm_waits():
        child = spawn_python(
            "gateway.worker", env=env, pass_fds=(fd, report_fd), stdin=PIPE,
            death_signal=signal.SIGTERM,
        )  # fmt: skip
    assert child.stdin is not None
    # It may be dead already, as `poll` will find.
    with suppress(BrokenPipeError), child.stdin as stdin:
        stdin.write(orders(settings, fd, report_fd=report_fd, number=number, waits=waits))
    return child


@contextmanager
def _sigterm_waits() -> Iterator[None]:
    """A child started meanwhile gets a SIGTERM only when it says that it can: it must not die of one with clients queued."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
