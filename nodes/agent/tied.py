"""Starts a command under the watchdog, so that it never outlives this process: for engines and for builds.

Holds the write end of the watchdog's pipe. What the command does, and what its exit means, is the caller's
affair.
"""

import asyncio
import contextlib
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

WATCHDOG = "watchdog.py"
ROUNDS_MAX = 200
MARK = "POOLGATE_TIE"  # in the environment of all processes of one command: finds them in any session


class TiedProcess:
    """A command and all its descendants. `kill()` ends them; so does this process's own death."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        output: IO[Any] | int = subprocess.DEVNULL,
        cwd: Path | None = None,
    ) -> None:
        self._mark = uuid.uuid4().hex
        read_end, self._tie = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - no shell; the command is ours
                # -I -S: neither the user's site nor ours is needed, and the start takes 15 ms instead of 60
                [sys.executable, "-I", "-S", "-c", _watchdog(), str(read_end), "--", *command],
                env={**(os.environ if env is None else env), MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(read_end,),
                start_new_session=True,
                cwd=cwd,
            )
        except BaseException:
            os.close(self._tie)
            raise
        finally:
            os.close(read_end)
        self._lock = threading.Lock()  # `kill` and `wait` come from different threads
        self._is_closed = False
        self._is_swept = False

    @property
    def pid(self) -> int:
        """The watchdog's, which is also the process group's."""
        return self._process.pid

    def poll(self) -> int | None:
        """The command's exit code (128 + signal when it was killed), or None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._sweep()
            return 128 - code if code < 0 else code
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Block until it ended; raises `subprocess.TimeoutExpired`."""
        self._process.wait(timeout)
        code = self.poll()
        assert code is not None
        return code

    def exit_future(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Future[int]":
        """Done with the exit code at the moment of the end. A thread waits: that works on every system."""
        future: asyncio.Future[int] = loop.create_future()

        def wait() -> None:
            code = self.wait()
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody asks any more
                loop.call_soon_threadsafe(_settle, future, code)

        threading.Thread(target=wait, name=f"exit-{self.pid}", daemon=True).start()
        return future

    def terminate(self) -> None:
        """Ask the command, and only it, to end in order."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the command and every descendant now; `poll` tells when that is done."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._tie)

    def _sweep(self) -> None:
        """End what a watchdog that was killed itself could not: its group, and who left the group."""
        self.kill()
        with self._lock:
            if self._is_swept:  # once: later the number may be another group's
                return
            self._is_swept = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            if self._process.returncode < 0:
                _kill_marked(f"{MARK}={self._mark}".encode())


@cache
def _watchdog() -> str:
    """Its source, also where this package is a zipapp, of which no interpreter can start a part."""
    source = pkgutil.get_data(__package__, WATCHDOG)
    assert source is not None
    return f"# {WATCHDOG}\n{source.decode()}"  # the first line names it in lists of processes


def _kill_marked(mark: bytes) -> None:
    """Kill every process with the mark in its environment (Linux), until there is none: some may be forking."""
    for _ in range(ROUNDS_MAX):
        found = False
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it ended, or is another user's
                if mark in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)
                    found = True
        if not found:
            return
        time.sleep(0.01)


def _settle(future: "asyncio.Future[int]", code: int) -> None:
    if not future.done():
        future.set_result(code)
