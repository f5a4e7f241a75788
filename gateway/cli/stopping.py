"""Owns the wish that `poolgate up` stops: by a signal, a second one in a hurry, or because its parent is gone.
A SIGHUP is a wish to reload, unless the terminal is gone.

What is stopped, and in which order, is parts.py's.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from config.procs import Terminal

# A signal to a whole process group comes twice within this, the second time from `make`.
ONE_REQUEST_S = 0.5


class Stopped(Exception):
    """Somebody asked for an end while the system was starting."""


class StopRequest:
    """SIGINT, SIGTERM and a terminal that hangs up as a request, and a second one as a hurry."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.because = ""
        self._count = 0
        self._last_s = 0.0
        self._interrupts = False
        self._wants_reload = False
        self._terminal = Terminal()
        # `make up` wants its child to end with it, even if it is killed.
        self._parent = os.getppid() if os.environ.get("POOLGATE_STOP_WITH_PARENT") else None

    @contextmanager
    def installed(self) -> Iterator[None]:
        for number in self.SIGNALS:
            signal.signal(number, self._note)
        sys.unraisablehook, before = self._unraised, sys.unraisablehook
        try:
            yield
        finally:
            sys.unraisablehook = before
            # One that comes after the end must not make an orderly stop look like a death.
            for number in self.SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a request raises Stopped at once: for calls that block and clean up after themselves."""
        self.check()
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def check(self) -> None:
        """Raises Stopped after a request."""
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            self._count += 1
            self.because = " (the parent process is gone)"
        if self._count:
            raise Stopped

    def takes_reload(self) -> bool:
        """A reload was asked for since the last call."""
        wanted, self._wants_reload = self._wants_reload, False
        return wanted

    def is_hurried(self) -> bool:
        return self._count > 1

    def _unraised(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """One that came inside a destructor could not raise there: the next `check` does, and nobody has to read it."""
        if unraisable.exc_type is not Stopped:
            sys.__unraisablehook__(unraisable)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP and not self._terminal.has_hung_up:
            self._wants_reload = True
            return
        # A signal to a whole process group comes twice, the second time from `make`: that is no hurry.
        now_s = time.monotonic()
        if self._count and now_s - self._last_s < ONE_REQUEST_S:
            return
        self._count, self._last_s = self._count + 1, now_s
        self.because = self.because or f" ({signal.Signals(number).name})"
        if self._interrupts:
            self._interrupts = False
            raise Stopped
