"""Owns that no process outlives its parent, by a pipe whose end says so and Linux's death signal, nor its terminal.

What a process does to end well, and who restarts it, is left to its owner.
"""

import contextlib
import ctypes
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PARENT_FD = "POOLGATE_PARENT_FD"
_PR_SET_PDEATHSIG = 1


class Child(subprocess.Popen[bytes]):
    """A child process that holds the reading end of a pipe of ours, its lifeline.

    We keep the only writing end and write nothing, so the child reads end-of-file when we are gone, in
    whatever way. It works only where the child calls `die_with_parent`; other programs want `pdeathsig`.
    """

    def __init__(self, args: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any) -> None:
        # Python makes pipes close-on-exec, so no other child of ours inherits the writing end and keeps it
        # open.
        reading, self._lifeline = os.pipe()
        environment = {**(os.environ if env is None else env), PARENT_FD: str(reading)}
        passed = (*options.pop("pass_fds", ()), reading)
        try:
            super().__init__(args, env=environment, pass_fds=passed, **options)
        except BaseException:
            self.cut_lifeline()
            raise
        finally:
            os.close(reading)

    def cut_lifeline(self) -> None:
        """Let the child believe that we are gone; it ends as it would then. Harmless when repeated."""
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)

    def poll(self) -> int | None:
        code = super().poll()
        if code is not None:
            self.cut_lifeline()
        return code

    def wait(self, timeout: float | None = None) -> int:
        code = super().wait(timeout)
        self.cut_lifeline()
        return code


def spawn(
    args: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    death_signal: int | None = None,
    **options: Any,
) -> Child:
    """Start a child with a lifeline; `death_signal` is sent to it by Linux as well, for when it hangs.

    `options` are those of `subprocess.Popen`. With `death_signal` it must be called from the main thread.
    """
    if death_signal is not None:
        options["preexec_fn"] = pdeathsig(death_signal)
    return Child(args, env=env, **options)


def spawn_python(module: str, *args: str, **options: Any) -> Child:
    """`spawn` for `python -m module args` with this interpreter."""
    return spawn([sys.executable, "-m", module, *args], **options)


def die_with_parent(on_death: Callable[[], None] | None = None, *, bound_s: float = 10.0) -> bool:
    """End this process when the one that spawned it is gone; False if it was not started by `spawn`.

    `on_death` runs in a thread of its own; without it this process gets SIGTERM, as if it had been asked to
    stop. Whatever it then does, it is gone after `bound_s` seconds.
    """
    value = os.environ.pop(PARENT_FD, "")  # popped: our own children must not take the number for theirs
    if not (value.isdigit() and _is_pipe(lifeline := int(value))):
        return False
    os.set_inheritable(lifeline, False)
    watch = threading.Thread(
        target=_await_death,
        args=(lifeline, on_death or _ask_to_stop, bound_s),
        name="parent-watch",
        daemon=True,
    )
    watch.start()
    return True


class Terminal:
    """What a SIGHUP means: the kernel sends it when the terminal hangs up, people send it to have settings read again."""

    def __init__(self) -> None:
        # `nohup` wants us to live on; a daemon has no terminal to lose.
        self._matters = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and _has_terminal()

    @property
    def has_hung_up(self) -> bool:
        """There was one when this process began, and it is gone."""
        return self._matters and not _has_terminal()


def pdeathsig(death_signal: int) -> Callable[[], None]:
    """A `preexec_fn` by which Linux signals the child when we die; on other systems it does nothing.

    Linux watches the thread that forks, not the process: a child started from a worker thread would be
    signalled when that thread ends. So it refuses every thread but the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "start this child from the main thread: Linux ties its death signal to the starting thread"
        )
    if not sys.platform.startswith("linux"):
        return _do_nothing
    # Loaded here: between fork and exec a child must not allocate or import more than it has to.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def set_death_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return set_death_signal


def _is_pipe(descriptor: int) -> bool:
    """False where the variable came from a grandparent that passed its descriptor only to our parent."""
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _await_death(lifeline: int, on_death: Callable[[], None], bound_s: float) -> None:
    with contextlib.suppress(OSError):
        while os.read(lifeline, 1):
            pass
    try:
        on_death()
        time.sleep(bound_s)
    finally:
        os._exit(1)


def _ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _do_nothing() -> None:
    pass
