"""Owns the listening sockets and the workers: starts them, replaces the dead, reloads on SIGHUP, ends all on SIGTERM.

What a worker does is `gateway.worker`'s. The sockets stay open here, so connections that queue on a dead worker's socket
wait for its successor instead of being reset.
"""

import logging
import os
import random
import resource
import select
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from config import cores, metrics
from config.defaults import Settings
from config.logs import setup_logs
from config.procs import Terminal
from config.settings import BadSetting
from gateway.probes import Board, Probes
from gateway.reload import Reload, reloadable
from gateway.slots import Slot
from gateway.sockets import PortInUse, deafen, exclusive_socket, joining, listening_sockets
from gateway.worker_process import WorkerProcess

log = logging.getLogger("poolgate.supervisor")

POLL_S = 0.1
CALM_S = 1.0
"""How often the supervisor looks after everything, and where all workers serve and nothing is going on. It is woken by what
they say, once a second, by their ends, and by signals."""

SIGNALS_MAX = 4096
"""Read at once; more of them say the same."""

KILL_AFTER_S = 25.0
"""Past `shutdown_grace_s`, before a worker is killed: 10 s for writing what turns used, and all other steps' bounds."""

HANDSHAKES_S = 0.25
"""From when sockets are deaf until workers leave them: handshakes under way end in a round trip."""

Reread = Callable[[], Settings]


def serve(settings: Settings, reread: Reread | None = None) -> int:
    """Run `settings.workers` workers until SIGTERM or SIGINT; the exit code. `reread` finds the settings of a reload, and
    raises BadSetting; without it SIGHUP starts workers with the same ones."""
    setup_logs(settings, "supervisor")
    raise_descriptor_limit()
    with ExitStack() as stack:
        signals = stack.enter_context(heeded_signals())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="poolgate-metrics-"))
        metrics.prepare_folder(Path(folder))
        board = Board()
        try:
            first = random.randrange(len(cores.ALL) or 1)  # noqa: S311 - so that two gateways begin on different ones
            slots = [Slot(sock, first + number) for number, sock in enumerate(listening_sockets(settings))]
            if settings.probe_port:
                probe = exclusive_socket(settings.probe_host, settings.probe_port, option="probe_port")
                stack.enter_context(Probes(probe, board))
        except PortInUse as error:
            log.critical("%s", error, extra={"action": "port_in_use"})
            return 1
        log.info(
            "listening on %s://%s:%d with %d worker(s)", "https" if settings.tls_certificate else "http",
            settings.host, settings.port, settings.workers, extra={"action": "listening"},
        )  # fmt: skip
        supervisor = Supervisor(settings, slots, board, reread or (lambda: settings))
        while not signals.stop:
            if signals.reload:
                signals.reload = False
                supervisor.wants_reload = True
            supervisor.tick(time.monotonic())
            signals.wait(supervisor.watched())
        return supervisor.stop()


class Signals:
    """What came since it was last looked at."""

    def __init__(self) -> None:
        self.stop = False
        self.reload = False
        self._terminal = Terminal()
        self._woken, self._wakes = os.pipe()
        for descriptor in (self._woken, self._wakes):
            os.set_blocking(descriptor, False)

    def note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP and not self._terminal.has_hung_up:
            self.reload = True
        else:
            self.stop = True
        with suppress(BlockingIOError):
            os.write(self._wakes, b"!")

    def wait(self, watched: Collection[int]) -> None:
        """For a signal, for something to read on one of `watched`, or for the time to look again, which is soon without."""
        poll = select.poll()
        for descriptor in (self._woken, *watched):
            poll.register(descriptor, select.POLLIN)
        poll.poll((CALM_S if watched else POLL_S) * 1000)
        with suppress(BlockingIOError):
            os.read(self._woken, SIGNALS_MAX)

    def close(self) -> None:
        """To be called when its signals come elsewhere."""
        os.close(self._woken)
        os.close(self._wakes)


@contextmanager
def heeded_signals() -> Iterator[Signals]:
    """SIGTERM and SIGINT ask for a stop, SIGHUP for a reload, or for a stop where the terminal has hung up."""
    signals = Signals()
    heeded = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signals.note) for number in heeded}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signals.close()


def raise_descriptor_limit() -> None:
    """A stream takes two descriptors: use all that the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass(slots=True)
class Finishing:
    """A worker that was told to end, and when its time is over."""

    worker: WorkerProcess
    ends_s: float


class Supervisor:
    """The slots, workers that are finishing, and a reload if one is going on."""

    def __init__(self, settings: Settings, slots: list[Slot], board: Board, reread: Reread) -> None:
        self.wants_reload = False
        self._settings = settings
        self._slots = slots
        self._board = board
        self._reread = reread
        self._reload: Reload | None = None
        self._finishing: list[Finishing] = []

    def tick(self, now_s: float) -> None:
        """Look after everything once; called every POLL_S."""
        for slot in self._slots:
            slot.tend(self._settings, now_s)
        self._part_from_finished(now_s)
        if self._reload is not None:
            self._go_on(self._reload, now_s)
        elif self.wants_reload:
            self.wants_reload = False
            self._begin_reload()
        self._board.workers = tuple(slot.worker.state for slot in self._slots if slot.worker is not None)

    def watched(self) -> list[int]:
        """Descriptors that tell when there is something to look after; none while it must be looked often."""
        workers = [slot.worker for slot in self._slots]
        is_calm = self._reload is None and not self._finishing
        ready = [worker.hears for worker in workers if worker is not None and worker.says_ready]
        return ready if is_calm and len(ready) == len(workers) else []

    def stop(self) -> int:
        """No new connections; the queued ones are answered and begun turns may end; past every bound workers are killed."""
        self._board.is_stopping = True
        self._leave(self._slots)
        while self._finishing:
            self._part_from_finished(time.monotonic())
            time.sleep(POLL_S / 5)
        log.info("stopped", extra={"action": "stopped", "pid": os.getpid()})
        return 0

    # --- reload -----------------------------------------------------------------------------------------------------

    def _begin_reload(self) -> None:
        try:
            settings, fixed = reloadable(self._settings, self._reread())
        except BadSetting as error:
            words = "no reload, the old settings stay: %s"
            log.error(words, error, extra={"action": "reload_refused"})  # noqa: TRY400 - a file to mend
            return
        if fixed:
            log.warning(
                "these settings change only by a restart: %s",
                ", ".join(fixed),
                extra={"action": "reload_fixed"},
            )
        log.info("reloading %d worker(s)", len(self._slots), extra={"action": "reload_begun"})
        self._reload = Reload(settings, self._slots, self._release)

    def _go_on(self, reload: Reload, now_s: float) -> None:
        state = reload.step(now_s)
        if reload.replaced:  # they have proved good: whoever dies from now on is replaced by one with these
            self._settings = reload.settings
        if state == "going":
            return
        self._reload = None
        if state == "failed":
            log.error(
                "the reload ended after %d of %d worker(s); the others go on as they are",
                reload.replaced, len(self._slots), extra={"action": "reload_failed"},
            )  # fmt: skip
            return
        setup_logs(reload.settings, "supervisor")
        self._resize(reload.settings.workers)
        log.info("reloaded, with %d worker(s)", len(self._slots), extra={"action": "reloaded"})

    def _resize(self, count: int) -> None:
        """The next ticks start workers on sockets that were added."""
        superfluous, self._slots = self._slots[count:], self._slots[:count]
        if superfluous:
            self._leave(superfluous)
        while len(self._slots) < count:
            self._slots.append(Slot(joining(self._slots[0].sock), self._slots[-1].number + 1, is_open=False))

    # --- ends -------------------------------------------------------------------------------------------------------

    def _leave(self, slots: list[Slot]) -> None:
        """Give sockets up so that no connection that was made is reset, and let their workers finish."""
        for slot in slots:
            deafen(slot.sock)
        time.sleep(HANDSHAKES_S)
        for slot in slots:
            slot.last_call(self._settings, time.monotonic())
            for worker in slot.workers:
                self._release(worker)
            slot.sock.close()  # the workers have theirs, and empty it before they close it

    def _release(self, worker: WorkerProcess) -> None:
        worker.finish()
        ends_s = time.monotonic() + self._settings.shutdown_grace_s + KILL_AFTER_S
        self._finishing.append(Finishing(worker, ends_s))

    def _part_from_finished(self, now_s: float) -> None:
        for finishing in list(self._finishing):
            worker = finishing.worker
            if worker.poll(now_s) is None and now_s > finishing.ends_s:
                log.warning(
                    "worker %d does not end and is killed", worker.pid, extra={"action": "worker_killed"}
                )
                worker.kill()
            if worker.poll(now_s) is not None:
                self._finishing.remove(finishing)
