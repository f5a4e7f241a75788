"""Owns the running parts of `poolgate up`: child processes and stores, watched, restarted, stopped in order.

When a death is too much is restarts.py's; what the parts are for is up.py's.
"""

import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from config.embedded import EmbeddedStartFailed, EmbeddedStores
from config.procs import Child, spawn_python
from gateway.cli.logfiles import LogFile
from gateway.cli.restarts import Restarts, how_it_ended

KILL_BOUND_S = 5.0
HURRY_BOUND_S = 3.0


class GaveUp(Exception):
    """A part dies as often as it is started; the message has the reason and the end of its log."""


@dataclass(slots=True)
class ChildPart:
    """One of our own programs as a child: `python -m gateway COMMAND`. It ends when we do, however we do."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    log: LogFile
    stop_bound_s: float
    process: Child | None = None

    def start(self) -> None:
        with self.log.open() as stream:
            self.process = spawn_python(
                "gateway", *self.arguments, env=self.environment, stdin=subprocess.DEVNULL, stdout=stream,
                stderr=stream, start_new_session=True,  # Ctrl-C is for us: we stop the children in order
            )  # fmt: skip

    def death(self) -> int | None:
        """Its exit code if it is dead."""
        return self.process.poll() if self.process else None

    def stop(self, is_hurried: Callable[[], bool]) -> None:
        """Ask it to end and wait; past its bound, or in a hurry, end it by force. Harmless when repeated."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        if not _ends(process, self.stop_bound_s, is_hurried):
            process.terminate()  # the second one hurries the agent: its engines end at once, but by its own hand
            if not _ends(process, HURRY_BOUND_S, _never):
                # The whole session that `start` made: a supervisor's workers would else go on draining.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(KILL_BOUND_S)


@dataclass(slots=True)
class Parts:
    """All parts of the system. Main thread only: the stores' death signal is tied to it."""

    tell: Callable[[str], None]
    stores: EmbeddedStores | None = None
    children: list[ChildPart] = field(default_factory=list)
    _restarts: defaultdict[str, Restarts] = field(default_factory=lambda: defaultdict(Restarts))
    _due: dict[str, float] = field(default_factory=dict)

    def start(self, child: ChildPart) -> None:
        self.children.append(child)
        child.start()

    def tick(self, now: float) -> None:
        """Start again what died, after its pause. Raises GaveUp."""
        for name, how in self._dead():
            if name not in self._due:
                self._plan_restart(name, how, now)
        for name in [name for name, due in self._due.items() if now >= due]:
            del self._due[name]
            self._restart(name)
        for child in self.children:
            for line in child.log.loud_lines():
                self.tell(line)
            child.log.bound()

    def reload_gateway(self) -> None:
        """SIGHUP to the gateway, if it runs."""
        for child in self.children:
            if child.name == "gateway" and child.process is not None and child.death() is None:
                self.tell(
                    "SIGHUP: the gateway reads its settings again; data_dir/logs/gateway.log says what came of it"
                )
                child.process.send_signal(signal.SIGHUP)

    def stop(self, is_hurried: Callable[[], bool]) -> None:
        """The last started first: the agent drains while the gateway still relays, the stores go last."""
        for child in reversed(self.children):
            child.stop(is_hurried)
        if self.stores is not None:
            self.stores.stop()

    def _dead(self) -> list[tuple[str, str]]:
        dead = [(name, "died") for name in (self.stores.poll() if self.stores else [])]
        for child in self.children:
            code = child.death()
            if code is not None:
                dead.append((child.name, how_it_ended(code)))
        return dead

    def _plan_restart(self, name: str, how: str, now: float) -> None:
        child = self._child(name)
        # Exit code 2 is a refused setting or option: the next start would be refused as well.
        is_hopeless = child is not None and child.death() == 2
        pause_s = None if is_hopeless else self._restarts[name].pause_s(now)
        if pause_s is None:
            raise GaveUp(self._why(name, how, child))
        self.tell(f"{name} {how}: starting it again")
        self._due[name] = now + pause_s

    def _why(self, name: str, how: str, child: ChildPart | None) -> str:
        if child is None:
            return f"{name} {how} again and again: see its log in the data folder, or run `poolgate doctor`"
        return f"the {name} {how} and can't be kept running; {child.log.path} ends with:\n{child.log.tail()}"

    def _restart(self, name: str) -> None:
        child = self._child(name)
        if child is not None:
            child.start()
        elif self.stores is not None:
            try:
                self.stores.restart(name)
            except EmbeddedStartFailed as error:
                self.tell(str(error))  # it counts as dead at the next tick

    def _child(self, name: str) -> ChildPart | None:
        return next((child for child in self.children if child.name == name), None)


def _ends(process: Child, bound_s: float, is_hurried: Callable[[], bool]) -> bool:
    """Wait for the end of a process, but not past the bound, and not when nobody wants to wait any longer."""
    deadline = time.monotonic() + bound_s
    while process.poll() is None:
        if time.monotonic() >= deadline or is_hurried():
            return False
        time.sleep(0.05)
    return True


def _never() -> bool:
    return False
